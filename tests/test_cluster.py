"""Real executors: a Spark cluster of two worker processes, each with one slot."""

import pytest

from tests.conftest import run_on_cluster

pytestmark = pytest.mark.ranks


def test_two_executors_train_continue_and_score(tmp_path):
    done = run_on_cluster("local_cluster.py", tmp_path)
    assert done.stdout.splitlines()[-1] == "executors 2 epochs [9]"
    assert sorted(p.name for p in (tmp_path / "models" / "m").iterdir()) == ["v000001", "v000002"]
