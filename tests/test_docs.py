"""Documentation, README and the package's metadata say what is so."""

import ast
import email
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spark_mnist
from spark_mnist import datasets, options
from spark_mnist.cli import app
from spark_mnist.core import plan
from spark_mnist.networks import objectives
from spark_mnist.options import grammar
from spark_mnist.ranks import metrics
from spark_mnist.scoring import measures
from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
SITE = REPOSITORY / ".mkdocs.yml"
PAGES = [
    README,
    *(DOCS / page for page in re.findall(r": ([a-z-]+\.md)$", SITE.read_text(), flags=re.M)),
]
"""README, and the pages of the site in their order."""


def blocks(language, pages=PAGES):
    """The code blocks of a language."""
    fence = re.compile(rf"```{language}\n(.*?)```", flags=re.S)
    return [block for page in pages for block in fence.findall(page.read_text())]


def commands():
    """The commands of all pages, each once."""
    lines = "\n".join(blocks("sh")).splitlines()
    return [*dict.fromkeys(line for line in lines if line.startswith("mymnist "))]


def test_every_page_is_in_the_menu():
    assert {page.name for page in DOCS.glob("*.md")} == {page.name for page in PAGES[1:]}


def test_the_readme_is_short_and_begins_with_the_quick_start():
    lines = README.read_text().splitlines()
    assert len(lines) <= 160
    assert "spark_mnist.fit(" in "\n".join(lines[:60])


def test_the_site_builds_without_a_broken_link(tmp_path):
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "-f",
        SITE,
        "-d",
        tmp_path / "site",
    ]
    done = subprocess.run(
        build, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api.html").read_text()
    for name in set(spark_mnist.__all__) - {
        "__version__",
        "datasets",
        "errors",
        "eval",
        "plots",
        "schedules",
    }:
        assert re.search(rf'id="spark_mnist\.[a-z_.]*{name}"', api), name


def test_the_tables_are_those_of_code_and_measurements():
    check = [sys.executable, DOCS / "tables.py", "--check"]
    subprocess.run(check, check=True, timeout=60)


def rows_of(page, heading, last=""):
    """The cells of a table by its heading, up to a text, without backticks."""
    after = (DOCS / page).read_text().split(heading)[1]
    lines = (after.split(last)[0] if last else after).splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def code_words(text):
    return tuple(re.findall(r"`([^`]+)`", text))


def test_the_losses_of_the_tasks_are_those_of_the_code():
    rows = rows_of("tasks.md", "<!-- losses: begin -->", "<!-- losses: end -->")
    assert {code_words(task)[0]: code_words(names) for task, names in rows} == objectives.LOSSES
    (aliases,) = re.findall(r"Short names are .*: ([^.]*)\.", (DOCS / "tasks.md").read_text())
    assert code_words(aliases) == tuple(objectives.ALIASES)


def test_the_metrics_of_the_tasks_are_those_of_the_code():
    rows = rows_of("tasks.md", "<!-- metrics: begin -->", "<!-- metrics: end -->")
    assert [code_words(row[0])[0] for row in rows] == [*plan.TASKS]
    for task, (*_, names) in zip(plan.TASKS, rows, strict=True):
        output = plan.Output(task=task, size=2)
        assert [*code_words(names)] == measures.metric_names([output])[1]
        row_metric = metrics.TASK_METRICS.get(task, metrics.NumberErrors)(output)
        sums = np.ones(row_metric.state[0].shape)
        of_fit = {*row_metric.results([sums]), *(["auc"] if task == plan.BINARY else [])}
        assert {*code_words(names)} == of_fit


def params_of(source, class_name):
    """The Params that a class of Horovod declares, from its source: an import needs Spark."""
    (body,) = [
        node.body
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    ]
    assignments = [ast.unparse(line).partition(" = Param(") for line in body]
    return [name for name, is_param, _ in assignments if is_param and name.isidentifier()]


def test_every_parameter_of_keras_estimator_has_a_row():
    (folder,) = importlib.util.find_spec("horovod").submodule_search_locations
    sources = Path(folder) / "spark"
    declared = [
        *params_of(sources / "common" / "params.py", "EstimatorParams"),
        *params_of(sources / "keras" / "estimator.py", "KerasEstimator"),
    ]
    assert len(declared) > 40
    rows = rows_of("compared.md", "## Every parameter", "## What only")
    assert sorted(code_words(theirs)[0] for theirs, *_ in rows) == sorted(declared)
    for _, ours, _ in rows:
        if not ours.startswith("none") and ours.startswith("`"):
            assert code_words(ours)[0].partition("=")[0] in options.FIELDS, ours


def test_the_commands_are_understood():
    assert len(commands()) >= 8
    for line in commands():
        command, *flags = line.removeprefix("mymnist ").split(" --")
        parsed = grammar.parse(command)
        assert parsed == grammar.parse_words(command.split())
        assert (parsed.operation in grammar.WITHOUT_ROWS) == (not flags)
    assert {line.strip() for line in app.EXAMPLES.splitlines()[1:]} <= set(commands())


def test_horovod_is_compiled_in_one_way():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    variables = project["tool"]["uv"]["extra-build-variables"]["horovod"]
    for page in (README, DOCS / "install.md"):
        (block,) = (text for text in blocks("sh", [page]) if "CXXFLAGS" in text)
        lines = [line for line in block.splitlines() if not line.startswith("pip ")]
        shown = subprocess.run(
            ["bash", "-c", "\n".join([*lines, "env"])], env={}, stdout=subprocess.PIPE, text=True
        ).stdout
        assert {name: variables[name] for name in variables} == {
            name: value
            for name, value in (line.split("=", 1) for line in shown.splitlines())
            if name in variables
        }
    assert f'CXXFLAGS="{variables["CXXFLAGS"]}"' in (REPOSITORY / "Makefile").read_text()


def test_the_make_targets_are_there():
    makefile = (REPOSITORY / "Makefile").read_text()
    named = re.findall(r"^(?:MNIST_DIR=\S+ )?make ([a-z-]+)", "\n".join(blocks("sh")), flags=re.M)
    for target in [
        *named,
        *re.findall(r"`make ([a-z-]+)", "".join(page.read_text() for page in PAGES)),
    ]:
        assert re.search(rf"^{target}:.*##", makefile, flags=re.M), target


def test_the_pictures_of_the_readme_are_there():
    curves, way_of_the_data = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text())
    assert (REPOSITORY / curves).read_bytes().startswith(b"\x89PNG")
    assert curves.rpartition("/")[2] in (REPOSITORY / "examples" / "pictures.py").read_text()
    assert (REPOSITORY / way_of_the_data).read_text().startswith("<svg")
    assert "examples/pictures.py" in (REPOSITORY / "Makefile").read_text()


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^):#]+)[#)]", README.read_text()):
        assert (REPOSITORY / target).exists(), target


@pytest.mark.ranks
def test_the_commands_run(spark, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "_session", lambda _: spark)
    for line in commands():  # the session's JVM runs in another directory
        words = line.replace("out.parquet", f"{tmp_path}/out.parquet").split()
        assert app.main(words[1:]) == 0, capfd.readouterr().err
    assert spark.read.parquet(str(tmp_path / "out.parquet")).count() == 364
    shown = [shutil.which("tensorboard"), "--inspect", "--logdir", "models/test_model"]
    said = subprocess.run(shown, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "epoch_loss" in said


NUMBER = re.compile(r"-?\d+\.\d+")


def assert_printed(output):
    """Compare what the README's example printed with the README; processors round in many ways."""
    (text,) = blocks("text", [README])
    shown, printed = (
        [line for line in lines.splitlines() if line.startswith("|")] for lines in (text, output)
    )
    for mine, other in zip(shown, printed, strict=True):
        words = ["".join(NUMBER.sub("", line).split()) for line in (mine, other)]
        assert words[0] == words[1]
        figures = [[*map(float, NUMBER.findall(line))] for line in (mine, other)]
        assert figures[0] == pytest.approx(figures[1], abs=0.03)


def run_blocks(page, scope):
    """Run the blocks of a page, without those that it repeats from the README."""
    repeated = [] if page == README else blocks("python", [README])
    for block in blocks("python", [page]):
        if block not in repeated:
            exec(compile(block, page.name, "exec"), scope)


@pytest.mark.ranks
def test_the_example_of_the_readme_prints_what_it_shows(spark, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(README, {"spark": spark, "__name__": "__main__"})
    assert_printed(capsys.readouterr().out)


def test_the_python_of_the_pages_runs(spark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    for number, row in enumerate(datasets.digits(spark, "test").limit(100).collect()):
        (folder / str(row["label"])).mkdir(parents=True, exist_ok=True)
        pixels = np.frombuffer(row["image"], np.uint8).reshape(28, 28)
        Image.fromarray(pixels).save(folder / str(row["label"]) / f"{number}.png")
    scope = {"spark": spark, "folder": str(folder), "__name__": "__main__"}
    for page in PAGES:
        run_blocks(page, scope)
    for name in ("curves.png", "mistakes.png", "confusion.png", "test_model.keras"):
        assert (tmp_path / name).stat().st_size > 5000


def test_the_wheels_metadata_is_whole(tmp_path):
    project = tmp_path / "project"  # setuptools writes beside what it builds
    shutil.copytree(REPOSITORY / "spark_mnist", project / "spark_mnist")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, project)
    build = [sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", tmp_path]
    subprocess.run([*build, project], check=True, timeout=300, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("spark-mnist", spark_mnist.__version__)
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert "# spark_mnist" in metadata.get_payload()
    assert sorted(metadata.get_all("Provides-Extra")) == [
        "cpu",
        "datasets",
        "gpu",
        "images",
        "mlflow",
        "onnx",
        "plots",
    ]
    requires = {re.split(r"[<>=\[ ]", line)[0] for line in metadata.get_all("Requires-Dist")}
    assert {
        "pyspark",
        "horovod",
        "petastorm",
        "numpy",
        "keras",
        "tensorflow",
        "tensorflow-cpu",
    } <= requires
    assert not any("#" in line for line in metadata.get_all("Requires-Dist"))
    assert "mymnist = spark_mnist.cli.app:main" in scripts
    assert "spark_mnist/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]


def test_the_changelog_knows_the_version():
    heading = rf"^## {re.escape(spark_mnist.__version__)} - \d{{4}}-\d\d-\d\d$"
    assert re.search(heading, (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.M)
