"""What the README and the package's metadata say is so."""

import email
import re
import shutil
import subprocess
import sys
import zipfile

import spark_mnist
from spark_mnist import options
from spark_mnist.cli import app
from spark_mnist.options import grammar
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_table_of_options_is_the_codes():
    for name, field in options.FIELDS.items():
        users = options.users(name)
        of = "all" if len(users) == len(options.OPERATIONS) else ", ".join(users)
        default = field.metadata["shown"] or field.default
        row = f"| `{name}` | {of} | {field.metadata['doc']} | {field.metadata['kind'].words} | {default} |"
        assert row in README.splitlines()


def commands():
    lines = "\n".join(blocks("sh")).splitlines()
    return [line for line in lines if line.startswith("mymnist ")]


def test_the_commands_are_understood():
    assert len(commands()) >= 8
    for line in commands():
        command, *flags = line.removeprefix("mymnist ").split(" --")
        parsed = grammar.parse(command)
        assert parsed == grammar.parse_words(command.split())
        assert (parsed.operation in grammar.WITHOUT_ROWS) == (not flags)
    assert {line.strip() for line in app.EXAMPLES.splitlines()[1:]} <= set(commands())


def test_the_make_targets_are_there():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(
        r"^(?:MNIST_DIR=\S+ )?make (\w+)", "\n".join(blocks("sh")), flags=re.M
    ):
        assert re.search(rf"^{target}:.*##", makefile, flags=re.M)


def test_the_pictures_of_the_readme_are_there_and_made_by_the_demo():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    drawn = (REPOSITORY / "examples" / "pictures.py").read_text()
    for picture in pictures:
        assert (REPOSITORY / picture).read_bytes().startswith(b"\x89PNG")
        assert picture.rpartition("/")[2] in drawn
    assert "examples/pictures.py" in (REPOSITORY / "Makefile").read_text()


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^):#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_the_commands_of_the_readme_run(spark, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "_session", lambda _: spark)
    for line in commands():  # the session's JVM runs in another directory
        words = line.replace("out.parquet", f"{tmp_path}/out.parquet").split()
        assert app.main(words[1:]) == 0, capfd.readouterr().err
    assert spark.read.parquet(str(tmp_path / "out.parquet")).count() == 364
    assert [(model.name, model.version) for model in spark_mnist.models()] == [
        ("flowers", 1),
        ("test_model", 1),
    ]
    shown = [shutil.which("tensorboard"), "--inspect", "--logdir", "models/test_model"]
    said = subprocess.run(shown, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "epoch_loss" in said


def test_the_python_of_the_readme_runs(spark, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {"spark": spark, "__name__": "__main__"}
    for block in blocks("python"):
        exec(block, scope)
    assert "val_accuracy" in capsys.readouterr().out
    versions = {model.name: model.version for model in spark_mnist.models()}
    assert versions == {"flowers": 1, "ml_model": 1, "my_model": 1, "test_model": 4, "tracked": 1}
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
    assert "## The way of the data" in metadata.get_payload()
    assert sorted(metadata.get_all("Provides-Extra")) == [
        "cpu",
        "datasets",
        "gpu",
        "mlflow",
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
    assert f"## {spark_mnist.__version__}\n" in (REPOSITORY / "CHANGELOG.md").read_text()
