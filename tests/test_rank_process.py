"""Warm servers and their ranks, without Spark."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("cluster") / "frozen_rank.py"


@pytest.fixture
def agent():
    with subprocess.Popen(
        [sys.executable, str(PROGRAM)], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("signal", ["kill", "terminate"])
def test_nothing_is_left_of_a_frozen_rank_whose_agent_ended(agent, signal):
    rank, server, directory = agent.stdout.readline().split()
    assert Path(directory).is_dir()
    rank, server = psutil.Process(int(rank)), psutil.Process(int(server))
    # Blocked in its first read, and so past the line that ties it to its server.
    while rank.status() != psutil.STATUS_SLEEPING:
        pass
    rank.suspend()
    getattr(agent, signal)()
    for process in (server, rank):
        assert ended(process)
    assert not Path(directory).exists()


def ended(process):
    try:
        process.wait(timeout=5)
    except psutil.TimeoutExpired:
        # Whoever adopts orphans here may not collect them.
        return process.status() == psutil.STATUS_ZOMBIE
    return True
