"""Makes the .ipynb of each Databricks source file here, with what it puts out when it runs.

    python notebooks/render.py [NAME ...]

The source files are what is edited. Nothing a notebook writes stays.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
FIRST_LINE = "# Databricks notebook source\n"
BETWEEN = re.compile(r"^# COMMAND -+\n", re.M)
SESSION = """# Databricks has a session already, of the same name.
from pyspark.sql import SparkSession

spark = SparkSession.builder.config("spark.ui.enabled", "false").getOrCreate()"""
TIMEOUT = 300
"""Seconds for one cell."""


def notebook(source: str) -> nbformat.NotebookNode:
    """A notebook of the cells of a Databricks source file, without outputs."""
    if not source.startswith(FIRST_LINE):
        raise ValueError(f"a Databricks source file begins with {FIRST_LINE!r}")
    texts = [text.strip() for text in BETWEEN.split(source.removeprefix(FIRST_LINE))]
    cells = [_cell(text) for text in texts if text]
    cells.insert(1, nbformat.v4.new_code_cell(SESSION))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return nbformat.v4.new_notebook(cells=cells)


def run(made: nbformat.NotebookNode) -> None:
    """Run all cells in a kernel of their own; raises what a cell raises."""
    with tempfile.TemporaryDirectory() as directory:
        where = {"metadata": {"path": directory}}
        NotebookClient(made, timeout=TIMEOUT, resources=where).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            shown = [out for out in cell.outputs if out.get("name") != "stderr"]
            text = json.dumps(shown).replace(directory, "~")
            cell.outputs = [nbformat.from_dict(out) for out in json.loads(text)]


def _cell(text: str) -> nbformat.NotebookNode:
    lines = text.splitlines()
    if lines[0] != "# MAGIC %md":
        return nbformat.v4.new_code_cell(text)
    words = [line.removeprefix("# MAGIC").removeprefix(" ") for line in lines[1:]]
    return nbformat.v4.new_markdown_cell("\n".join(words))


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("[0-9]*.py"))
    for name in names:
        made = notebook((HERE / f"{name}.py").read_text())
        run(made)
        nbformat.write(made, HERE / f"{name}.ipynb")
