"""Names that Petastorm needs of pyarrow, numpy and Python, and their replacements."""

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from spark_mnist.compat import petastorm

FOREIGN = ("pyarrow", "numpy", "distutils")
PROVIDED = {
    "distutils.version.LooseVersion",
    "numpy.in1d",
    "numpy.string_",
    "numpy.unicode_",
    "pyarrow.LocalFileSystem",
    "pyarrow.filesystem.LocalFileSystem",
    "pyarrow.hdfs.HadoopFileSystem",
    "pyarrow.hdfs.connect",
    "pyarrow.lib.ArrowIOError",
    "pyarrow.localfs",
    "pyarrow.parquet.ParquetDataset",
    "pyarrow.parquet.ParquetDatasetPiece",
}


def loaded():
    """Petastorm's modules that reading and writing shards load."""
    petastorm.module()
    petastorm.module("petastorm.spark")
    return [module for name, module in sys.modules.items() if name.startswith("petastorm.")]


def names_asked_for(module):
    """Full names of all that a module's code takes from the foreign libraries."""
    tree = ast.parse(Path(module.__file__).read_text())
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    yield from known.values()
    for node in ast.walk(tree):
        words = []
        while isinstance(node, ast.Attribute):
            words.insert(0, node.attr)
            node = node.value
        if words and isinstance(node, ast.Name) and node.id in known:
            yield ".".join([known[node.id], *words])


def lacks(name):
    """Return whether the installed libraries lack a name or one of its parents."""
    words = name.split(".")
    found = importlib.import_module(words[0]) if words[0] != "distutils" else None
    for number, word in enumerate(words[1:], start=1):
        if not hasattr(found, word):
            try:
                found = importlib.import_module(".".join(words[: number + 1]))
            except ImportError:
                return True
        else:
            found = getattr(found, word)
    return False


def test_every_name_that_petastorm_asks_for_is_there_or_provided():
    asked = {name for module in loaded() for name in names_asked_for(module)}
    asked = {name for name in asked if name.partition(".")[0] in FOREIGN and "." in name}
    assert len(asked) > 20
    missing = {name for name in asked if lacks(name)}
    modules = {name.rpartition(".")[0] for name in PROVIDED}
    assert missing - PROVIDED - modules == set()


def test_nothing_is_provided_that_is_not_asked_for():
    asked = {name for module in loaded() for name in names_asked_for(module)}
    assert PROVIDED - asked == set()
    told = petastorm._dropped_names()
    assert {f"{name}.{key}" for name, members in told.items() for key in members} == PROVIDED


def _run(program):
    """Run a program of ``tests/programs`` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.programs.{program}"]
    subprocess.run(command, check=True)


def test_the_libraries_stay_as_they_are():
    loaded()
    _run("libraries_unchanged")


@pytest.mark.skipif(pa.__version__.startswith("14."), reason="pyarrow 14 has all of it")
def test_an_import_that_failed_before_does_no_harm():
    _run("petastorm_after_failure")


def test_pieces_and_datasets_read_row_groups(tmp_path):
    table = pa.table({"b": [1, 2, 3, 4], "a": ["x", "y", "z", "w"], "c": [0, 0, 0, 0]})
    path = str(tmp_path / "some.parquet")
    pq.write_table(table, path, row_group_size=2)
    dataset = petastorm.Dataset([path], filesystem=LocalFileSystem(), validate_schema=False)
    (piece,) = dataset.pieces
    assert piece.get_metadata().num_row_groups == 2
    assert piece.read(columns={"b", "a"}).to_pydict() == {"a": list("xyzw"), "b": [1, 2, 3, 4]}
    second = petastorm.DatasetPiece(path, open_file_func=dataset.fs.open, row_group=1)
    assert second.read(columns={"b"}, partitions=None).to_pydict() == {"b": [3, 4]}
    assert petastorm.Dataset(path, filesystem=LocalFileSystem()).pieces[0].path == path


@pytest.mark.skipif(pa.__version__.startswith("14."), reason="pyarrow 14 has its own")
def test_a_name_node_is_reached_through_todays_pyarrow(monkeypatch, tmp_path):
    """HDFS itself is not here: what Petastorm asks of it reaches fsspec's client."""
    (tmp_path / "there").write_bytes(b"something")
    asked = []

    def hadoop(host, port, user=None):
        asked.append((host, port, user))
        return LocalFileSystem()

    monkeypatch.setattr(petastorm, "HadoopFileSystem", hadoop)
    namenode = petastorm.module("petastorm.hdfs.namenode")
    one = namenode.HdfsConnector.hdfs_connect_namenode(types.SimpleNamespace(hostname="n", port=9))
    assert asked == [("n", 9, None)]
    assert one.exists(f"{tmp_path}/there")
    both = namenode.HdfsConnector.connect_to_either_namenode(["n1:1", "n2:2"], user="someone")
    assert asked[1:] == [("n1", 1, "someone")]
    with both.open(f"{tmp_path}/there") as file:
        assert file.read() == b"something"
    both.delete(f"{tmp_path}/there")
    assert not both.exists(f"{tmp_path}/there")
