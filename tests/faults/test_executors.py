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
    assert not harness.ranks()


@pytest.mark.slow
@pytest.mark.parametrize("min_proc", [2, 3])
def test_an_executor_that_stays_away(tmp_path, min_proc):
    """A fit goes on with two of three ranks, as one that continues on two; or it ends."""
    environment = {
        **os.environ,
        "SPARK_HOME": str(spark_home(tmp_path / "spark")),
        "PYTHONPATH": str(REPOSITORY),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, PROGRAMS / "fewer_executors.py", str(min_proc)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["left"] == []
    if min_proc == 3:
        assert "Nor could they start again: 3 ranks must run" in found["error"]
        return
    early = found["read"][0][3]
    assert found["error"] == ""
    assert found["epochs"] == list(range(1, 31))
    assert found["read"] == [
        *([rank, 69 - (rank > 0), 17, early] for rank in range(3)),
        *([rank, 103 - rank, 26 - rank, 30 - early] for rank in range(2)),
    ]
    assert found["ranks"] == 2
    assert found["losses"][early:] == found["calm"]
