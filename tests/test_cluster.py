"""Real executors: a Spark cluster of two worker processes, each with one slot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROGRAMS, spark_home

pytestmark = pytest.mark.ranks


def run_on_cluster(program: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of ``PROGRAMS`` that makes a local cluster of its own, in a directory; it must succeed."""
    environment = {
        **os.environ,
        "SPARK_HOME": str(spark_home(directory / "spark")),
        "PYSPARK_PYTHON": sys.executable,
    }
    done = subprocess.run(
        [sys.executable, PROGRAMS / program],
        cwd=directory, env=environment, text=True, capture_output=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_two_executors_train_continue_and_score(tmp_path):
    done = run_on_cluster("local_cluster.py", tmp_path)
    assert done.stdout.splitlines()[-1] == "executors 2 epochs [9]"
    assert sorted(p.name for p in (tmp_path / "models" / "m").iterdir()) == ["v000001", "v000002"]
