"""Ctrl-C while a CrossValidator fits in threads of a pool."""

import subprocess
import sys

import pytest

from tests.conftest import PROGRAMS

pytestmark = pytest.mark.ranks


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["1", "2"])
@pytest.mark.parametrize(("phase", "versions"), [("shards", "[]"), ("publish", "[1]")])
def test_no_fit_goes_on_when_its_cross_validator_was_interrupted(
    tmp_path, parallelism, phase, versions
):
    done = subprocess.run(
        [sys.executable, PROGRAMS / "interrupted_tuning.py", parallelism, phase], cwd=tmp_path,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["interrupted", f"versions {versions}"], done.stderr
