"""TensorFlow from a slow disk: importing it is work, and not silence."""

import os
import subprocess
import sys

import pytest

from tests.conftest import PROGRAMS

pytestmark = pytest.mark.ranks

SLOWLY = """
import sys, time
from tests.conftest import PROGRAMS

class Slow:
    def find_spec(self, name, *_):
        if name == "tensorflow":
            sys.meta_path.remove(self)
            time.sleep(20)

sys.meta_path.insert(0, Slow())
"""


@pytest.mark.slow
def test_an_import_that_takes_longer_than_a_heartbeat_may(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOWLY)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, PROGRAMS / "slow_import.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("start ")
