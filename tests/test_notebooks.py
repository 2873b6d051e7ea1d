"""The notebooks: in a Jupyter kernel, and as Databricks runs their source."""

import sys

import nbformat
import pytest

from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "notebooks"))
import render

SOURCES = sorted((REPOSITORY / "notebooks").glob("[0-9]*.py"))
WORDS = {
    "01_quickstart": "('quickstart', 2, 12)",
    "02_continuous_training": "version 2: accuracy 0.",
    "03_own_model": "rows/s; seconds: prepare",
    "04_gpu_cluster": "\n",  # a hint or none; its log is on stderr
}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs_in_a_kernel(source):
    made = render.notebook(source.read_text())
    render.run(made)
    out = "".join(
        str(output.get("text", "")) for cell in made.cells for output in cell.get("outputs", ())
    )
    assert WORDS[source.stem] in out


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_what_is_kept_of_it_is_its_source_with_outputs(source):
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    made = render.notebook(source.read_text())
    assert [cell.source for cell in kept.cells] == [cell.source for cell in made.cells]
    outputs = [output for cell in kept.cells for output in cell.get("outputs", ())]
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)


class Widgets:
    """The part of Databricks' ``dbutils.widgets`` that notebooks use."""

    def __init__(self):
        self._values = {}

    def text(self, name, value):
        self._values[name] = value

    def get(self, name):
        return self._values[name]


class Utilities:
    """The part of Databricks' ``dbutils`` that notebooks use."""

    def __init__(self):
        self.widgets = Widgets()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs_as_databricks_source(source, spark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"spark": spark, "dbutils": Utilities(), "display": print}
    exec(compile(source.read_text(), source.name, "exec"), scope)
    assert list((tmp_path / "models").iterdir())
