"""Every script in examples/, run as a user runs it, on the digits that need no download."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import spark_mnist
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.ranks

EXAMPLES = REPOSITORY / "examples"


def start(name, *words, cwd):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=cwd, env={**os.environ, "PATH": path},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def output_of(program):
    out, err = program.communicate(timeout=400)
    assert program.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def programs(digits, tmp_path_factory):
    """Two scripts with sessions of their own, which run at the same time; with their homes."""
    homes = [tmp_path_factory.mktemp(name) for name in ("keras", "stream")]
    rows = digits.select("image", digits["label"].cast("int"))
    for count in (256, 200):
        rows.limit(count).coalesce(1).write.mode("append").parquet(str(homes[1] / "incoming"))
    words = [str(homes[1] / name) for name in ("incoming", "checkpoints", "models")]
    running = [
        start("keras_tutorial.py", "digits", cwd=homes[0]),
        start("learn_from_stream.py", *words, cwd=homes[1]),
    ]
    outputs = [output_of(program) for program in running]
    return dict(zip(("keras", "stream"), zip(outputs, homes, strict=True), strict=True))


@pytest.fixture
def run_here(spark, tmp_path, monkeypatch, capsys):
    """Run a script in this process, whose session it then finds."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            spark.sparkContext.setLogLevel("OFF")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_mechanics_101_ends_in_the_tutorials_words(tmp_path):
    out = output_of(start("mechanics_101.py", "digits", cwd=tmp_path))
    pattern = (
        r"(\w+) Data Eval:\n  Num examples: (\d+)  Num correct: (\d+)  Precision @ 1: (0\.\d{4})\n"
    )
    found = re.findall(pattern, out)
    assert [(title, int(rows)) for title, rows, _, _ in found] == [
        ("Training", 1000),
        ("Validation", 433),
        ("Test", 364),
    ]
    for _, rows, correct, precision in found:
        assert float(precision) == pytest.approx(int(correct) / int(rows), abs=1e-4)
        assert float(precision) > 0.85


def test_the_keras_tutorial_reads_one_picture_in_spark_and_in_keras(programs):
    out, home = programs["keras"]
    assert float(re.search(r"accuracy: (0\.\d+)", out)[1]) > 0.85
    truth, spark, keras = re.search(
        r"the picture is a (\d): Spark reads (\d), Keras (\d)", out
    ).groups()
    assert spark == keras == truth
    assert (home / "keras_tutorial.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("softmax_tutorial.py", 0.85),
        pytest.param("cnn_tutorial.py", 0.93, marks=pytest.mark.slow),
    ],
)
def test_the_softmax_and_the_cnn_tutorial(run_here, name, least):
    out = run_here(name, "digits")
    assert float(re.search(r"test accuracy: (\d\.\d+)", out)[1]) > least


def test_iris_knows_the_two_new_flowers(run_here):
    out = run_here("iris.py")
    assert float(re.search(r"test accuracy: (\d\.\d+)", out)[1]) >= 0.93
    assert "[6.4, 3.2, 4.5, 1.5]: class 1, versicolor" in out
    assert "[5.8, 3.1, 5.0, 1.7]: class 2, virginica" in out


def test_store_sales_are_nearly_as_certain_as_their_noise_allows(run_here):
    out = run_here("store_sales.py")
    by_epoch = [float(value) for value in re.search(r"by epoch: \[(.+)\]", out)[1].split(", ")]
    error, of_means = map(float, re.search(r"RMSPE: (\S+), mean by store: (\S+)", out).groups())
    assert error < 0.12  # the noise alone gives 0.10
    assert error < of_means / 2
    assert by_epoch[-1] == pytest.approx(error, abs=1e-3)  # the metric of the ranks is Spark's


def test_wide_and_deep_is_nearly_as_good_as_the_true_probabilities(run_here):
    out = run_here("wide_and_deep.py")
    auc, best = map(float, re.search(r"auc: (\S+), of the true probabilities: (\S+)", out).groups())
    assert 0.85 < best - 0.02 < auc < best + 0.005


def test_the_network_knows_more_of_houses_than_linear_regression(run_here):
    out = run_here("house_prices.py")
    r2, of_linear = map(float, re.search(r"r2: (\S+), of linear regression: (\S+)", out).groups())
    assert r2 > of_linear + 0.04


@pytest.mark.slow
def test_the_network_knows_as_much_of_patients_as_linear_regression(run_here):
    out = run_here("house_prices.py", "diabetes")
    r2, of_linear = map(float, re.search(r"r2: (\S+), of linear regression: (\S+)", out).groups())
    assert r2 == pytest.approx(of_linear, abs=0.1)
    assert r2 > 0.3


def test_a_frozen_base_stays_as_it_is_and_helps_where_there_are_few_pictures(run_here):
    out = run_here("transfer_learning.py")
    frozen, without = (
        float(re.search(rf"test accuracy {how} the.* base: (\S+)", out)[1])
        for how in ("with", "without")
    )
    assert frozen > 0.8
    assert frozen > without + 0.05
    assert "weights of the base are as before: True" in out


def test_every_example_is_run_here():
    here = Path(__file__)
    submitted = here.with_name("test_submit.py")
    demo = "".join(path.read_text() for path in (REPOSITORY / "Makefile", here, submitted))
    assert all(f"{path.stem}.py" in demo for path in EXAMPLES.glob("*.py"))


def test_learning_from_a_stream_continues_with_every_batch(programs):
    out, home = programs["stream"]
    batches = re.findall(r"batch (\d): (\d+) rows, version (\d)", out)
    assert [(batch, version) for batch, _, version in batches] == [("0", "1"), ("1", "2")]
    assert sorted(count for _, count, _ in batches) == ["200", "256"]
    assert spark_mnist.describe("stream", store=str(home / "models")).num_epochs == 4
