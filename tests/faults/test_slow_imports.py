"""TensorFlow from a slow disk: importing it is work, and not silence."""

import os
import subprocess
import sys

import pytest

SLOWLY = """
import sys, time

class Slow:
    def find_spec(self, name, *_):
        if name == "tensorflow":
            sys.meta_path.remove(self)
            time.sleep(20)

sys.meta_path.insert(0, Slow())
"""
FIT = """
import logging
from pyspark.sql import SparkSession
import spark_mnist

logging.basicConfig(level="WARNING")
builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
rows = spark_mnist.datasets.digits(spark, "train").limit(64)
result = spark_mnist.fit(
    rows, "m", epochs=1, num_proc=2, batch_size=16, heartbeat_timeout=4, verbose=0
)
print("start", result.timing.start)
"""


@pytest.mark.slow
def test_an_import_that_takes_longer_than_a_heartbeat_may(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOWLY)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", FIT], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "start again" not in done.stderr
    assert done.stdout.startswith("start ")
