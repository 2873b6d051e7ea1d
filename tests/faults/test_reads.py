"""A thousand reads of shards on a machine that has too much to do: every row, every time."""

import os
import subprocess
import sys

import numpy as np
import pytest

from spark_mnist.core import plan
from spark_mnist.data import profile, shard_writer
from tests.conftest import CaseCounter, read_shard

pytestmark = pytest.mark.ranks

counted = CaseCounter("reads")


@pytest.fixture
def load():
    """More processes that compute than the machine has cores."""
    command = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 2))]
    yield
    for burner in burners:
        burner.kill()
        burner.wait()


def test_every_read_has_every_row(digits, tmp_path, load):
    source = profile.profile_rows(digits, plan.InputSpec(), seed=0)
    options = {"url": f"file://{tmp_path}", "ranks": 2, "ratio": 0.8}
    with shard_writer.write_shards(source, **options) as (train, _):
        first = [read_shard(train, rank=rank, ranks=2) for rank in range(2)]
        assert sum(map(len, first)) == train.rows == 205
        for number in range(1000 if counted.full else 100):
            rank = number % 2
            shard = read_shard(train, rank=rank, ranks=2)
            np.testing.assert_array_equal(shard.labels, first[rank].labels)
            np.testing.assert_array_equal(shard.features, first[rank].features)
            counted.add()
