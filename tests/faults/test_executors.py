"""Executors that are killed or frozen, on a Spark cluster of two worker processes."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import PROGRAMS, REPOSITORY, spark_home
from tests.faults import harness

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The last loss of the same fit when nothing happens, to which any cluster comes."""
    import spark_mnist

    rows = spark_mnist.datasets.digits(digits.sparkSession, "train").orderBy("image").limit(256)
    options = {"epochs": 40, "batch_size": 16, "num_proc": 2, "seed": 5, "verbose": 0}
    store = str(tmp_path_factory.mktemp("models"))
    return spark_mnist.fit(rows, "m", store=store, **options).records[-1].losses["loss"]


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
    environment = {
        **os.environ,
        "SPARK_HOME": str(spark_home(tmp_path / "spark")),
        "PYTHONPATH": str(REPOSITORY),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, PROGRAMS / "harmed_executor.py", harm],
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
