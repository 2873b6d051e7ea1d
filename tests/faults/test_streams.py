"""Ctrl-C while a stream's micro-batch is fitted, which Spark does in another thread."""

import subprocess
import sys

import pytest

from tests.conftest import PROGRAMS
from tests.faults import harness

pytestmark = pytest.mark.ranks

PROGRAM = PROGRAMS / "interrupted_stream.py"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stop", "notebook"])
def test_the_fit_of_a_stream_that_was_interrupted_ends(tmp_path, way):
    done = subprocess.run(
        [sys.executable, PROGRAM, way],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert set(done.stdout.splitlines()) == {
        "interrupted", "fit was cancelled", "active False versions []"
    }, done.stderr  # fmt: skip
    assert harness.leftovers(str(tmp_path / "models")) == []


@pytest.mark.slow
def test_no_rank_outlives_a_script_that_was_interrupted(tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, "script"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert "KeyboardInterrupt" in done.stderr
    harness.wait(lambda: not harness.processes_in(tmp_path))
    assert not list((tmp_path / "models").glob("m/v*"))
