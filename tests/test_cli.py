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
from spark_mnist import datasets, errors, options
from spark_mnist.cli import app, outputs
from spark_mnist.options import grammar
from tests.conftest import REPOSITORY
from tests.faults import harness

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


@pytest.mark.ranks
def test_fit_shows_its_table_and_nothing_else_on_stdout(home):
    lines = (home / "fit").read_text().strip().splitlines()
    header = [cell.strip() for cell in lines[1].split("|")[1:4]]
    assert header == ["epoch", "losses", "metrics"]
    assert [line.split("|")[1].strip() for line in lines[3:-1]] == ["1", "2", "3", "4", "5"]
    assert (home / "models" / "test_model" / "v000001" / "manifest.json").exists()


def test_predict_writes_any_format(here, root, tmp_path, spark):
    output = str(tmp_path / "out.parquet")
    words = ("predict", "m", f"store={root}", "batch_size=128", "interpret=true")
    assert here(*words, "--input", "digits:test", "--output", output) == ""
    table = spark.read.parquet(output)
    assert table.columns == ["image", "label", "prediction", "interpreted"]
    assert table.count() == datasets.digits(spark, "test").count()


def test_images_in_csv_read_back_as_the_same_pictures(here, root, spark, tmp_path):
    few, csv = str(tmp_path / "few.parquet"), str(tmp_path / "once.csv")
    datasets.digits(spark, "test").limit(20).write.parquet(few)
    here("predict", "m", f"store={root}", "interpret=true", "--input", few, "--output", csv)
    once = spark.read.csv(csv, header=True)
    again = spark_mnist.predict(
        once.drop("prediction").withColumnRenamed("interpreted", "before"),
        "m", interpret=True, store=root,
    )  # fmt: skip
    assert again.where("interpreted = before").count() == 20


def test_a_bad_row_is_told_in_one_line(here, root, spark, tmp_path):
    bad = datasets.digits(spark, "test").limit(2).selectExpr("substring(image, 2) AS image")
    bad.write.parquet(str(tmp_path / "bad.parquet"))
    words = ("predict", "m", f"store={root}", "--input", str(tmp_path / "bad.parquet"))
    said = here(*words, code=1).splitlines()
    assert "mymnist: a row to predict has no image of 784 pixels" in said


def test_eval_as_json(here, root):
    words = ("eval", "m", f"store={root}", "repeat=2", "batch_size=128", "rate=0.8")
    rows = [
        json.loads(line) for line in here(*words, "--input", "digits:test", "--json").splitlines()
    ]
    assert [row["no"] for row in rows] == [1, 2]
    assert all(set(row) == {"no", "losses", "metrics"} for row in rows)


@pytest.mark.ranks
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


@pytest.mark.ranks
def test_python_runs_the_package_as_a_program(tmp_path):
    done = run("--version", program=(sys.executable, "-m", "spark_mnist"), cwd=tmp_path)
    assert done.stdout == f"mymnist {spark_mnist.__version__}\n"


@pytest.fixture
def here(tmp_path, spark, capfd, monkeypatch):
    """Run a command in this process and a new directory, on the session of the tests."""
    monkeypatch.setattr(app, "_session", lambda _: spark)
    monkeypatch.chdir(tmp_path)  # the JVM's directory stays
    store = f"store={tmp_path / 'models'}"

    def run_here(*words, code=0):
        named = words if words[0] == "models" else words[:2]
        given = any(word.startswith("store=") for word in words)
        stored = [*named, *([] if given else [store]), *words[len(named) :]]
        capfd.readouterr()
        assert app.main(stored) == code, capfd.readouterr().err
        out, err = capfd.readouterr()
        return out if code == 0 else err

    return run_here


def test_a_table_from_csv_with_a_header_and_what_becomes_of_its_model(here, tmp_path, spark):
    flowers, figures = str(tmp_path / "iris.csv"), str(tmp_path / "figures.csv")
    datasets.iris(spark).drop("label").coalesce(1).write.csv(flowers, header=True)
    words = ("features=petal_length,petal_width", "label=species", "epochs=20", "batch_size=8")
    fit = here(
        "fit", "flowers", *words, "num_proc=1", "learning_rate=0.01", "--json",
        "--input", flowers, "--quiet",
    )  # fmt: skip
    assert json.loads(fit.splitlines()[-1])["metrics"]["val_accuracy"] > 0.8
    predicted = here("predict", "flowers", "interpret=true", "--input", flowers, "--json")
    rows = [json.loads(line) for line in predicted.splitlines()]
    assert len(rows) == 150
    assert np.mean([row["species"] == row["interpreted"] for row in rows]) > 0.9
    here("eval", "flowers", "rate=1", "details=true", "--input", flowers, "--output", figures)
    (row,) = spark.read.csv(figures, header=True).collect()
    assert row["num_examples"] == "150"
    assert json.loads(row["classes"])[2]["class"] == "virginica"
    again = ("eval", "flowers", "--input", flowers, "--output", figures)
    assert "figures.csv exists already: add --overwrite" in here(*again, code=2)
    here(*again, "--overwrite")
    assert spark.read.csv(figures, header=True).columns == ["no", "losses", "metrics"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.csv", "iris.csv", "models"]
    assert here("rollback", "flowers", "version=1", "--json") == '{"version":2}\n'
    assert [json.loads(line)["version"] for line in here("models", "--json").splitlines()] == [2]


def test_files_of_other_habits(here, tmp_path, spark):
    """A separator, a header with blanks, no header, JSON that is one array, no Parquet."""
    rows = [(2.0, 1.0, "a"), (3.0, 2.0, "b")] * 20
    lines = [";".join(map(str, row)) for row in rows]
    (tmp_path / "rows.csv").write_text("\n".join(["width; height; kind", *lines]))
    table = str(tmp_path / "rows.csv")
    fit = ("fit", "m", "features=width,height", "label=kind", "epochs=1", "num_proc=1", "--quiet")
    assert "separated by ';': read it with sep=';'" in here(*fit, "--input", table, code=1)
    here(*fit, "--input", table, "--read", "sep=;")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    without = here(*fit, "--input", table, "--read", "sep=;", code=1)
    assert "these look like values" in without
    assert len(without.splitlines()[-1]) < 300
    named = ("fit", "m", "features=_c0,_c1", "label=_c2", "epochs=1", "num_proc=1", "--quiet")
    here(*named, "--input", table, "--read", "sep=;", "--read", "header=false")
    array = json.dumps([{"width": 1, "kind": "a"}], indent=1)
    (tmp_path / "rows.json").write_text(array)
    assert "multiLine=true" in here(*fit, "--input", str(tmp_path / "rows.json"), code=1)
    (tmp_path / "rows.parquet").write_text("no parquet")
    refused = here(*fit, "--input", str(tmp_path / "rows.parquet"), code=1)
    assert "rows.parquet cannot be read as parquet: " in refused
    assert "Py4J" not in refused
    (tmp_path / "empty.csv").write_text("")
    assert "is the file empty?" in here(*fit, "--input", str(tmp_path / "empty.csv"), code=1)
    assert "--read sep: write KEY=VALUE" in here(*fit, "--input", table, "--read", "sep", code=2)


def test_outputs_are_looked_at_before_work_starts(here, tmp_path):
    there = tmp_path / "there.parquet"
    there.mkdir()
    fit = ("fit", "m", "epochs=1", "--input", "digits:train", "--output")
    assert "exists already" in here(*fit, str(there), code=2)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in here(*fit, str(tmp_path / "file" / "out.json"), code=1)
    assert not (tmp_path / "models").exists()


def test_csv_of_columns_with_backticks(spark):
    table = outputs.as_text(spark.createDataFrame([([1, 2],)], "`a``b` array<int>"))
    assert table.collect()[0].asDict() == {"a`b": "1,2"}


def test_json_has_null_fields(spark):
    (line,) = outputs.json_lines(spark.createDataFrame([(None, 1)], "note string, `a.b` int"))
    assert json.loads(line) == {"note": None, "a.b": 1}


CLOSES = ("| true", ">&-")
"""Ways to close the output of a command."""


@pytest.fixture(scope="module")
def closed(home):
    """Exit code and errors of a command whose output is closed, in each way, at the same time."""
    command = f"set -o pipefail; {MYMNIST} models --json --store models"
    programs = {
        close: subprocess.Popen(
            ["bash", "-c", f"{command} {close}"], cwd=home, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for close in CLOSES
    }  # fmt: skip
    errors_of = {close: program.communicate(timeout=200)[1] for close, program in programs.items()}
    return {close: (programs[close].returncode, errors_of[close]) for close in CLOSES}


@pytest.mark.ranks
@pytest.mark.parametrize("close", CLOSES)
def test_a_reader_that_has_read_enough_is_no_failure(closed, close):
    code, err = closed[close]
    assert (code, err) == (0, err)
    assert "Traceback" not in err


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
        (
            ["fit", "m", "--input", "rows"],
            2,
            "the name 'rows' does not say its format: add --format",
        ),
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
    assert app.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mymnist: ")
    assert message in err


@pytest.mark.ranks
def test_a_failure_is_one_line_and_exits_with_1(tmp_path):
    done = run("predict", "nobody", "--input", "digits:test", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mymnist:")]
    assert (
        line
        == f"mymnist: no model 'nobody' in file://{tmp_path}/models, which has none yet; fit one first"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.ranks
def test_an_interrupt_exits_with_130_and_leaves_the_version_before(home):
    before = {path: path.read_bytes() for path in (home / "models").rglob("*") if path.is_file()}
    command = [MYMNIST, "fit", "test_model", "epochs=5000", "--input", "digits:train"]
    with subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True) as process:
        harness.wait(lambda: harness.trained(str(home / "models"), "test_model", 3))
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
        app.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in options.FIELDS.items():
        assert f"  {name} " in text
        assert field.metadata["doc"].split()[0] in text
    for line in app.EXAMPLES.splitlines()[1:]:
        assert line in text
        words = line.split(" --")[0].split()
        assert grammar.parse_words(words[1:]).operation in options.OPERATIONS


def test_version(capsys):
    with pytest.raises(SystemExit):
        app.main(["--version"])
    assert capsys.readouterr().out == f"mymnist {spark_mnist.__version__}\n"


def test_debug_lets_the_traceback_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.CommandError):
        app.main(["fit", "--debug"])


def test_what_csv_cannot_hold_becomes_text(spark):
    vectors = spark.createDataFrame([(Vectors.dense([0.0, 0.5]),)], ["vector"])
    frame = vectors.selectExpr(
        "vector", "array(0.25D, null) AS array", "named_struct('a', 1) AS struct",
        "map('k', 2.0D) AS map", "array(map('k', 1)) AS maps",
    )  # fmt: skip
    (found,) = outputs.as_text(frame).collect()
    assert found.asDict() == {
        "array": "0.25,", "struct": '{"a":1}', "map": '{"k":2.0}', "maps": '[{"k":1}]', "vector": "0.0,0.5",
    }  # fmt: skip


def test_quiet_is_no_option_of_what_shows_no_progress(tmp_path, capfd, monkeypatch, spark):
    monkeypatch.setattr(app, "_session", lambda _: spark)
    assert app.main(["models", "--quiet", "--store", str(tmp_path)]) == 0
    assert "verbose" not in capfd.readouterr().err
