import ast
import subprocess
import sys

import pytest

import spark_mnist
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "spark_mnist"
LAYERS = [
    {"_version", "warm_server", "shipment", "retries", "errors"},
    {"compat", "world", "events", "fork", "leases", "files", "interrupts", "rendezvous"},
    {"plan", "watchdog", "agents"},
    {"own"},
    {"networks"},
    {"kinds", "store", "versions"},
    {"options"},
    {"cluster", "receipts", "recovery", "timing"},
    {"schema", "executors", "agent"},
    {"labels", "grammar", "manifests", "checkpoint", "averaging", "progress", "tensorboard"},
    {"census", "evaluation", "meters", "rowgroups", "steps"},
    {"shards", "batches", "plots", "lineage", "gpus", "params"},
    {"worker", "results", "job"},
    {"entry"},
    {"launch", "scoring", "catalog"},
    {"preparation"},
    {"fitting"},
    {"exports"},
    {"tracking"},
    {"verbs"},
    {"datasets", "ml", "outputs"},
    {"cli"},
]
SEAMS = {
    "horovod": {"averaging", "worker"},
    "petastorm": set(),  # it needs what compat gives it
    "spark_mnist.compat.petastorm": {"rowgroups", "shards"},
    "tensorflow": {
        "averaging",
        "batches",
        "gpus",
        "exports",
        "meters",
        "scoring",
        "steps",
        "tensorboard",
        "worker",
    },
    "keras": {"averaging", "checkpoint", "meters", "networks", "own", "tensorboard", "worker"},
    "matplotlib": {"plots"},
    "mlflow": {"tracking"},
}


def imported(path):
    """Names of all modules that a file imports, at any depth, outside type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if not p.stem.startswith("__"))


def part(path):
    """What a module is called in the layers: by its package, where it is in one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_layer():
    assert {part(p) for p in modules()} == set.union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_a_module_imports_only_from_lower_layers_or_its_own(path):
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    ours = {n.split(".")[1] for n in imported(path) if n.startswith("spark_mnist.")}
    upward = {name for name in ours if height[name] > height[part(path)]}
    assert not upward


@pytest.mark.parametrize("library", SEAMS)
def test_each_foreign_library_has_its_seam(library):
    inside = f"{library}."
    users = {p.stem for p in modules() if any(f"{n}.".startswith(inside) for n in imported(p))}
    assert users == SEAMS[library]


def test_import_is_light():
    heavy = ("tensorflow", "keras", "horovod", "petastorm", "pyspark", "pandas", "lark", "tqdm")
    code = f"import sys, spark_mnist; sys.exit(' '.join({set(heavy)} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_sorted_and_there():
    assert spark_mnist.__all__ == sorted(spark_mnist.__all__)
    for name in spark_mnist.__all__:
        assert getattr(spark_mnist, name) is not None
    assert spark_mnist.eval is spark_mnist.evaluate
    assert callable(spark_mnist.command)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = spark_mnist.fitt
