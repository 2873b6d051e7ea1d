"""The command line as a user runs it: in a process of its own."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyspark.ml.linalg import Vectors

import spark_mnist
from spark_mnist import cli, datasets, errors, grammar, options
from tests.conftest import REPOSITORY

MYMNIST = str(Path(sys.executable).parent / "mymnist")


def run(*words, program=(MYMNIST,), cwd):
    return subprocess.run(
        [*program, *words], cwd=cwd, text=True, capture_output=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory in which the manual's first example was run."""
    home = tmp_path_factory.mktemp("home")
    fit = run(
        "fit", "test_model", "batch_size=128", "epochs=5", "--input", "digits:train", cwd=home
    )
    (home / "fit").write_text(fit.stdout)
    assert fit.returncode == 0, fit.stderr
    assert "epoch 5/5: loss" in fit.stderr
    return home


def test_fit_shows_its_table_and_nothing_else_on_stdout(home):
    lines = (home / "fit").read_text().strip().splitlines()
    header = [cell.strip() for cell in lines[1].split("|")[1:4]]
    assert header == ["epoch", "losses", "metrics"]
    assert [line.split("|")[1].strip() for line in lines[3:-1]] == ["1", "2", "3", "4", "5"]
    assert (home / "models" / "test_model" / "v000001" / "manifest.json").exists()


def test_predict_writes_any_format(home, spark):
    words = ("predict", "test_model", "batch_size=128", "interpret=true", "--input", "digits:test")
    done = run(*words, "--output", "out.parquet", cwd=home)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    table = spark.read.parquet(str(home / "out.parquet"))
    assert table.columns == ["image", "label", "prediction", "interpreted"]
    assert table.count() == datasets.digits(spark, "test").count()
    again = run(*words, "--output", "out.parquet", cwd=home)
    assert again.returncode == 1
    assert "already exists" in again.stderr


def test_images_in_csv_read_back_as_the_same_pictures(home, spark):
    datasets.digits(spark, "test").limit(20).write.parquet(str(home / "few.parquet"))
    words = ("predict", "test_model", "interpret=true", "--input")
    assert run(*words, "few.parquet", "--output", "once.csv", cwd=home).returncode == 0
    once = spark.read.csv(str(home / "once.csv"), header=True)
    again = spark_mnist.predict(
        once.drop("prediction").withColumnRenamed("interpreted", "before"),
        "test_model", interpret=True, store=str(home / "models"),
    )  # fmt: skip
    assert again.where("interpreted = before").count() == 20


def test_a_bad_row_is_told_in_one_line(home, spark):
    bad = datasets.digits(spark, "test").limit(2).selectExpr("substring(image, 2) AS image")
    bad.write.parquet(str(home / "bad.parquet"))
    done = run("predict", "test_model", "--input", "bad.parquet", cwd=home)
    assert done.returncode == 1
    assert "mymnist: a row to predict has no image of 784 pixels" in done.stderr.splitlines()


def test_eval_as_json(home):
    words = (
        "eval",
        "test_model",
        "repeat=2",
        "batch_size=128",
        "rate=0.8",
        "--input",
        "digits:test",
    )
    done = run(*words, "--json", program=(sys.executable, "-m", "spark_mnist"), cwd=home)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["no"] for row in rows] == [1, 2]
    assert all(set(row) == {"no", "losses", "metrics"} for row in rows)


def test_a_csv_of_the_manuals_table_through_spark_submit(home, spark):
    text = "transform(sequence(1, 784), i -> conv(hex(substring(image, i, 1)), 16, 10) / 255)"
    few = datasets.digits(spark, "test").limit(5)
    few = few.selectExpr(f"array_join({text}, ',') AS image", "label").coalesce(1)
    few.write.csv(str(home / "in.csv"), header=True)
    conf = str(REPOSITORY / "conf" / "spark-defaults.conf")
    main = str(Path(spark_mnist.__file__).parent / "__main__.py")
    submit = ("spark-submit", "--master", "local[2]", "--properties-file", conf, main)
    words = ("predict", "test_model", "interpret=true", "--input", "in.csv", "--output", "out.csv")
    done = run(
        *words, program=(str(Path(sys.executable).with_name(submit[0])), *submit[1:]), cwd=home
    )
    assert done.returncode == 0, done.stderr
    rows = spark.read.csv(str(home / "out.csv"), header=True).collect()
    assert len(rows) == 5
    for row in rows:
        hot = [int(word) for word in row["prediction"].split(",")]
        assert hot.index(1) == int(row["interpreted"])
        assert len(row["image"].split(",")) == 784


def test_a_table_from_csv_with_a_header_and_what_becomes_of_its_model(tmp_path, spark):
    iris = datasets.iris(spark).drop("label")
    iris.coalesce(1).write.csv(str(tmp_path / "iris.csv"), header=True)
    words = ("features=petal_length,petal_width", "label=species", "epochs=20", "batch_size=8")
    fit = run(
        "fit", "flowers", *words, "num_proc=1", "learning_rate=0.01", "--json",
        "--input", "iris.csv", "--quiet", cwd=tmp_path,
    )  # fmt: skip
    assert fit.returncode == 0, fit.stderr
    assert json.loads(fit.stdout.splitlines()[-1])["metrics"]["val_accuracy"] > 0.8
    predict = ("predict", "flowers", "interpret=true", "--input", "iris.csv", "--json")
    rows = [json.loads(line) for line in run(*predict, cwd=tmp_path).stdout.splitlines()]
    assert len(rows) == 150
    assert np.mean([row["species"] == row["interpreted"] for row in rows]) > 0.9
    evaluate = ("eval", "flowers", "rate=1", "details=true", "--input", "iris.csv", "--output")
    assert run(*evaluate, "figures.csv", cwd=tmp_path).returncode == 0
    (figures,) = spark.read.csv(str(tmp_path / "figures.csv"), header=True).collect()
    assert figures["num_examples"] == "150"
    assert json.loads(figures["classes"])[2]["class"] == "virginica"
    back = run("rollback", "flowers", "version=1", "--json", cwd=tmp_path)
    assert (back.returncode, back.stdout) == (0, '{"version":2}\n'), back.stderr
    listed = run("models", "--json", cwd=tmp_path)
    assert [json.loads(line)["version"] for line in listed.stdout.splitlines()] == [2]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["fit", "m", "epochs=0", "--input", "digits:train"],
            2,
            "epochs must be int >= 1, not '0'",
        ),
        (["fit", "--input", "digits:train"], 2, "the model name is missing"),
        (["fit", "m"], 2, "--input is missing"),
        (["describe"], 2, "the model name is missing"),
        (["models", "m"], 2, "'m' is no option: write name=value"),
        (["delete", "m", "version=0"], 2, "version must be int >= 1"),
        (["fit", "m", "--input", "digits:dev"], 2, "digits has the splits train and test"),
        (["fit", "m", "--input", "rows"], 2, "the format of 'rows' is not clear: add --format"),
        (["predict", "m", "--input", "digits:test", "--output", "x"], 2, "add --output-format"),
        (
            ["fit", "m", "--num-proc", "0", "--input", "digits:train"],
            2,
            "num_proc must be int >= 1",
        ),
        (
            ["fit", "m", "store=a", "--store", "b", "--input", "digits:train"],
            2,
            "store is given twice",
        ),
    ],
)
def test_usage_errors_come_before_a_session_and_exit_with_2(words, code, message, capsys):
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mymnist: ")
    assert message in err


def test_a_failure_is_one_line_and_exits_with_1(tmp_path):
    done = run("predict", "nobody", "--input", "digits:test", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mymnist:")]
    assert (
        line
        == f"mymnist: no model 'nobody' in file://{tmp_path}/models: there is none yet; fit one first"
    )
    assert "Traceback" not in done.stderr


def test_an_interrupt_exits_with_130_and_leaves_the_version_before(home):
    before = {path: path.read_bytes() for path in (home / "models").rglob("*") if path.is_file()}
    command = [MYMNIST, "fit", "test_model", "epochs=5000", "--input", "digits:train"]
    with subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("epoch 3/"):
                break
        assert len(ranks(home)) >= 2
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    deadline = time.monotonic() + 20
    while ranks(home) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ranks(home) == []
    after = {path: path.read_bytes() for path in (home / "models").rglob("*") if path.is_file()}
    assert after == before
    assert [path.name for path in (home / "models" / "test_model").iterdir()] == ["v000001"]


def ranks(home):
    """Processes that are ranks of a fit that was started in this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (entry / "comm").read_text()
            if name.startswith("mnist-rank-") and (entry / "cwd").resolve() == home.resolve():
                found.append(name)
    return found


def test_help_has_every_option_and_the_manuals_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in options.FIELDS.items():
        assert f"  {name} " in text
        assert field.metadata["doc"].split()[0] in text
    for line in cli.EXAMPLES.splitlines()[1:]:
        assert line in text
        words = line.split(" --")[0].split()
        assert grammar.parse_words(words[1:]).operation in options.OPERATIONS


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"mymnist {spark_mnist.__version__}\n"


def test_debug_lets_the_traceback_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.CommandError):
        cli.main(["fit", "--debug"])


def test_what_csv_cannot_hold_becomes_text(spark):
    vectors = spark.createDataFrame([(Vectors.dense([0.0, 0.5]),)], ["vector"])
    frame = vectors.selectExpr(
        "vector", "array(0.25D, null) AS array", "named_struct('a', 1) AS struct",
        "map('k', 2.0D) AS map", "array(map('k', 1)) AS maps",
    )  # fmt: skip
    (found,) = cli._as_text(frame).collect()
    assert found.asDict() == {
        "array": "0.25,", "struct": '{"a":1}', "map": '{"k":2.0}', "maps": '[{"k":1}]', "vector": "0.0,0.5",
    }  # fmt: skip


def test_quiet_is_no_option_of_what_shows_no_progress(tmp_path, capfd, monkeypatch, spark):
    monkeypatch.setattr(cli, "_session", lambda _: spark)
    assert cli.main(["models", "--quiet", "--store", str(tmp_path)]) == 0
    assert "verbose" not in capfd.readouterr().err
