"""A model of 100 million parameters with the memory that Spark has by default."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, spark_home

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("cluster") / "large_model.py"


@pytest.mark.slow
@pytest.mark.parametrize("master", ["local[1]", "local-cluster[1,1,1024]"])
def test_a_model_larger_than_sparks_heap(tmp_path, master):
    environment = {
        **os.environ,
        "SPARK_HOME": str(spark_home(tmp_path / "spark")),
        "PYTHONPATH": str(REPOSITORY),
    }
    program = subprocess.run(
        [sys.executable, str(PROGRAM), master, str(tmp_path)],
        cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    steps = "fit, continued, predicted, evaluated, exported, stage saved, stage loaded"
    assert program.stdout.split("\n")[:-1] == steps.split(", "), program.stderr
    assert program.returncode == 0, program.stderr
