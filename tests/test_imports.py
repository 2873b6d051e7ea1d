import ast
import graphlib
import re
import subprocess
import sys

import pytest

import spark_mnist
from spark_mnist.core import keras_extras
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "spark_mnist"
HEAVY = {"tensorflow", "keras", "horovod"}
ORDER = [
    *(
        "_version",
        "errors",
        "schedules",
        "compat",
        "core",
        "networks",
        "options",
        "cluster",
        "data",
        "plots",
    ),
    *("store", "ranks", "scoring", "launch", "fitting", "catalog", "api", "datasets", "ml", "cli"),
]
"""Packages and modules of the package; each imports only from those before it."""
SIDES = {"driver", "rank", "Spark task"}
OF_DRIVER = {
    "options",
    "datasets",
    "cluster",
    "data",
    "plots",
    "scoring",
    "launch",
    "fitting",
    "catalog",
    "api",
    "ml",
    "cli",
}
"""Packages that no module of ``ranks`` imports at its top, nor any module that it imports there."""
SEAMS = {
    "horovod": {"ranks.collectives", "ranks.hooks", "ranks.trainer"},
    "petastorm": set(),  # it needs what compat gives it
    "spark_mnist.compat.petastorm": {"ranks.shard_reader", "data.shard_writer"},
    "tensorflow": {
        "catalog.exports",
        "networks.registry",
        "ranks.batches",
        "ranks.collectives",
        "ranks.gpus",
        "ranks.loop",
        "ranks.metrics",
        "ranks.objective",
        "ranks.summaries",
        "ranks.trainer",
        "scoring.executor",
    },
    "keras": {
        "networks.array_files",
        "networks.callbacks",
        "networks.custom",
        "networks.objectives",
        "networks.registry",
        "ranks.collectives",
        "ranks.hooks",
        "ranks.metrics",
        "ranks.objective",
        "ranks.summaries",
        "ranks.trainer",
    },
    "matplotlib": {"plots"},
    "PIL": {"data.image_files"},
    "mlflow": {"catalog.mlflow_runs"},
    "tf2onnx": {"catalog.exports"},
    "onnx": {"catalog.exports"},
}


def imported(path, *, late=True):
    """Names of the modules that a file imports: at its top, or also late, inside functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if late else outside_functions(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside_functions(node):
    """Statements of a module that run when it is imported, also those within its blocks."""
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not is_typing and not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def modules():
    return sorted(
        p for p in PACKAGE.rglob("*.py") if p.stem != "__main__" and p.parent != PACKAGE / "compat"
    )


def name(path):
    """A module's name inside the package, ``store.leases``; that of a package is its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def ours(path, **how):
    """Names inside the package of the modules of ours that a file imports."""
    known = {name(path) for path in modules()}
    for full in imported(path, **how):
        inner = full.removeprefix("spark_mnist.")
        if full != inner:
            yield next((n for n in (inner, inner.rpartition(".")[0]) if n in known), inner)


def test_every_package_has_its_place():
    assert {name(path).partition(".")[0] for path in modules()} - {"__init__"} == {*ORDER} - {
        "compat"
    }


@pytest.mark.parametrize("path", modules(), ids=name)
def test_a_module_imports_only_from_packages_before_its_own(path):
    if path == PACKAGE / "__init__.py":
        return
    place = ORDER.index(name(path).partition(".")[0])
    later = {other for other in ours(path) if ORDER.index(other.partition(".")[0]) > place}
    assert not later


def test_no_modules_import_each_other():
    graph = {
        name(path): {*ours(path)} - {name(path)} for path in modules() if path.stem != "__init__"
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def sides(path):
    """The machines that run a module, as its docstring says."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    match = re.search(r"Runs on: ([^.;]+)[.;]", docstring.replace("\n", " "))
    assert match, path
    return {*match[1].split(", ")}


def test_each_module_runs_where_its_package_does():
    for package in PACKAGE.glob("*/__init__.py"):
        assert sides(package) <= SIDES, package
        for path in package.parent.glob("*.py"):
            if path.stem != "__main__":
                assert sides(path) <= sides(package), path


def test_the_architecture_names_every_module_where_it_runs():
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert {row[0] for row in rows} >= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for package, text, places in rows:
        folder = PACKAGE / package
        names = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        assert {*re.findall(r"`(\w+)`", text)} >= names, package
        assert {*places.split(", ")} == sides(folder / "__init__.py"), package


def test_ranks_import_nothing_of_the_driver():
    """Neither at the top of a module nor of those that it imports: no PySpark, no package of the driver."""
    paths = {name(path): path for path in modules()}
    seen, left = set(), [n for n in paths if n.startswith("ranks.")]
    while left:
        if (module := left.pop()) not in seen:
            seen.add(module)
            left += [other for other in ours(paths[module], late=False) if other in paths]
    assert not {module for module in seen if module.partition(".")[0] in OF_DRIVER}
    users = {
        m for m in seen if any(n.startswith("pyspark") for n in imported(paths[m], late=False))
    }
    assert not users


@pytest.mark.parametrize("library", SEAMS)
def test_each_foreign_library_has_its_seam(library):
    inside = f"{library}."
    users = {name(p) for p in modules() if any(f"{n}.".startswith(inside) for n in imported(p))}
    assert users == SEAMS[library]


@pytest.mark.parametrize("package", [path.parent.name for path in PACKAGE.glob("*/__init__.py")])
def test_heavy_libraries_are_imported_on_ranks_alone(package):
    """But for the modules that make models, which are imported when a model is made."""
    allowed = {"ranks", "networks"}
    for path in (PACKAGE / package).glob("*.py"):
        heavy = {n.partition(".")[0] for n in imported(path, late=False)} & HEAVY
        assert package in allowed or not heavy, path


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (
            "spark_mnist",
            ("tensorflow", "keras", "horovod", "petastorm", "pyspark", "pandas", "lark", "tqdm"),
        ),
        ("spark_mnist.ranks.entry", keras_extras.PACKAGES),
    ],
)
def test_import_is_light(module, heavy):
    code = f"import sys, {module}; sys.exit(' '.join({set(heavy)} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_sorted_and_there():
    assert spark_mnist.__all__[1:] == sorted(spark_mnist.__all__[1:])
    for name in spark_mnist.__all__:
        assert getattr(spark_mnist, name) is not None
    assert spark_mnist.eval is spark_mnist.evaluate
    assert callable(spark_mnist.command)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = spark_mnist.fitt
