"""Executors that are killed or frozen, on a Spark cluster of two worker processes."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, spark_home
from tests.faults import harness

JOB = """
import json, logging, sys
from pyspark.sql import SparkSession
import spark_mnist
from tests.faults import harness

logging.basicConfig(level="WARNING")
spark = (
    SparkSession.builder.master("local-cluster[2,1,1024]")
    .config("spark.ui.enabled", "false")
    .getOrCreate()
)
spark.sparkContext.setLogLevel("OFF")
rows = spark_mnist.datasets.digits(spark, "train").orderBy("image").limit(256)
options = dict(epochs=40, batch_size=16, num_proc=2, seed=5, verbose=0, heartbeat_timeout=8.0)

def ancestor(process, words):
    return next(p for p in process.parents() if words in " ".join(p.cmdline()))

def executor():
    return ancestor(harness.all_ranks()[1], "CoarseGrainedExecutorBackend")

def worker():
    return ancestor(harness.all_ranks()[1], "pyspark.daemon")

HARMS = {
    "kill the executor": lambda: executor().kill(),
    "kill its Python worker": lambda: worker().kill(),
    "kill the rank": lambda: harness.all_ranks()[1].kill(),
    "freeze the executor with all below": lambda: [p.suspend() for p in victims],
}
victims = []

def harm():
    victims.extend([executor(), *executor().children(recursive=True)])
    HARMS[sys.argv[1]]()

when = lambda: harness.trained("models", "m", 3)
with harness.Saboteur(when, harm):
    result = spark_mnist.fit(rows, "m", store="models", **options)
again = spark_mnist.fit(rows, "m", store="models", continuous=True, **{**options, "epochs": 1})
for process in victims:
    if process.is_running():
        process.resume()
if "freeze" in sys.argv[1]:  # once it can, what was frozen ends by itself
    harness.wait(lambda: not any(process.is_running() for process in victims))
harness.wait(lambda: not harness.ranks())
print(json.dumps({
    "epochs": [record.epoch for record in result.epochs],
    "loss": result.epochs[-1].losses["loss"],
    "again": again.epochs[0].epoch,
    "left": harness.leftovers("models"),
    "count": spark.range(3).count(),
}))
spark.stop()
"""


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The last loss of the same fit when nothing happens, to which any cluster comes."""
    import spark_mnist

    rows = spark_mnist.datasets.digits(digits.sparkSession, "train").orderBy("image").limit(256)
    options = {"epochs": 40, "batch_size": 16, "num_proc": 2, "seed": 5, "verbose": 0}
    store = str(tmp_path_factory.mktemp("models"))
    return spark_mnist.fit(rows, "m", store=store, **options).epochs[-1].losses["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm",
    [
        "kill the executor",
        "kill its Python worker",
        "kill the rank",
        "freeze the executor with all below",
    ],
)
def test_a_part_of_an_executor_is_lost(tmp_path, undisturbed, harm):
    (tmp_path / "job.py").write_text(JOB)
    environment = {
        **os.environ,
        "SPARK_HOME": str(spark_home(tmp_path / "spark")),
        "PYTHONPATH": str(REPOSITORY),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "job.py", harm],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["epochs"] == list(range(1, 41))
    assert found["loss"] == pytest.approx(undisturbed, abs=1e-6)
    assert (found["again"], found["left"], found["count"]) == (41, [], 3)
    assert "all ranks start again" in done.stderr
    assert not harness.ranks()
