"""A driver that is interrupted, terminated or killed in each phase of a fit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import spark_mnist
from spark_mnist.store import model_store
from tests.conftest import PROGRAMS
from tests.faults import harness

pytestmark = pytest.mark.ranks

PHASES = {
    "looking at the rows": lambda home: python_workers(home),
    "writing shards": lambda home: [*home.glob("models/m/.work-*/.owner")],
    "starting ranks": lambda home: written_shards(home),
    "training": lambda home: harness.trained(str(home / "models"), "m", 1),
    "publishing": lambda home: [
        weights
        for weights in home.glob("models/m/v*/weights.npz")
        if not weights.with_name("manifest.json").exists()
    ],
}
"""Conditions on the files of a fit's directory that hold once it is in a phase."""


def python_workers(home):
    """Spark's Python workers of drivers in this directory."""
    workers = []
    for process in harness.processes_in(home):
        with contextlib.suppress(psutil.Error):
            workers += [process] if "pyspark.daemon" in process.cmdline() else []
    return workers


def written_shards(home):
    """Files of shards that Spark has put in their place."""
    files = home.glob("models/m/.work-*/**/*.parquet")
    return [file for file in files if "_temporary" not in file.parts]


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
QUICK = {("training", signal.SIGKILL)}


def cases(*numbers):
    for number in numbers:
        for phase in PHASES:
            marks = [] if (phase, number) in QUICK else [pytest.mark.slow]
            yield pytest.param(phase, number, id=f"{phase}-{number.name}", marks=marks)


class Driver:
    """A process that fits a model in a directory of its own."""

    def __init__(self, home):
        self.home, self.store = home, str(home / "models")

    def start(self, epochs, slow=0.0, rounds=1, output="output"):
        """Start the process; its output goes to a file."""
        environment = {**os.environ, "SLOW": str(slow), "ROUNDS": str(rounds)}
        with (self.home / output).open("w") as file:
            return subprocess.Popen(
                [sys.executable, PROGRAMS / "driver.py", str(epochs)],
                cwd=self.home,
                env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self, output="output"):
        """Return the output of a process."""
        return (self.home / output).read_text()

    def fit(self, epochs=1):
        """Fit, wait until Spark's processes have ended, too, and return what was said."""
        assert self.start(epochs).wait(300) == 0, self.said()
        harness.wait(lambda: not harness.processes_in(self.home))
        return self.said()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver"))
    driver.fit()
    return driver


def struck(driver, phase, number, *, alone=False):
    """A driver that got a signal in a phase, and what it said.

    A terminal sends SIGINT to the driver and its children, a notebook to the driver alone.
    """
    process = driver.start(5000 if phase == "training" else 2, slow=20.0)
    harness.wait(lambda: PHASES[phase](driver.home))
    if number == signal.SIGINT and not alone:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(harness.PATIENCE)
    harness.wait(lambda: not harness.processes_in(driver.home))
    return process, driver.said()


@pytest.mark.parametrize(("phase", "number"), cases(signal.SIGINT, signal.SIGTERM))
def test_an_interrupt_in_any_phase_leaves_the_version_before_and_nothing_else(
    driver, phase, number
):
    check_interrupt(driver, phase, number)


def test_a_notebooks_interrupt_in_the_middle_of_training(driver):
    check_interrupt(driver, "training", signal.SIGINT, alone=True)


def check_interrupt(driver, phase, number, **how):
    before = harness.contents(driver.store)
    process, said = struck(driver, phase, number, **how)
    # Python itself ends with SIGINT where KeyboardInterrupt is not caught.
    assert process.returncode in (CODES[number], -number), said
    assert "restored True" in said
    assert harness.contents(driver.store) == before
    assert harness.leftovers(driver.store) == []


@pytest.mark.parametrize(("phase", "number"), cases(signal.SIGKILL))
def test_a_killed_driver_leaves_the_version_before_and_the_next_fit_sweeps(driver, phase, number):
    models = model_store.Store(driver.store)
    newest = models.resolve_version("m")
    before = models.read("m", newest)
    process, _ = struck(driver, phase, number)
    assert process.returncode == -signal.SIGKILL
    assert models.resolve_version("m") == newest
    assert models.read("m", newest) == before
    assert harness.leftovers(driver.store) or phase == "looking at the rows"
    said = driver.fit(epochs=2)
    assert ("removed what killed fits left behind" in said) or phase == "looking at the rows"
    if phase == "publishing":  # what it trained is not lost
        [work] = Path(driver.store).glob("m/.work-*")
        assert str(work) in said
        assert spark_mnist.publish("m", str(work), store=driver.store) == models.resolve_version(
            "m"
        )
        assert models.manifest("m", models.resolve_version("m"))["parent"] == newest
    assert harness.leftovers(driver.store) == []
    assert models.read("m", newest) == before


ROUNDS = 20


@pytest.mark.slow
def test_two_processes_that_fit_one_name_at_once_both_keep_their_work(tmp_path):
    driver = Driver(tmp_path)
    driver.fit()
    outputs = ("first", "second")
    processes = [driver.start(2, rounds=ROUNDS, output=output) for output in outputs]
    codes = [process.wait(1800) for process in processes]
    said = [driver.said(output) for output in outputs]
    assert codes == [0, 0], said
    models = model_store.Store(driver.store)
    assert models.versions("m") == list(range(1, 2 * ROUNDS + 2))
    for first in range(2, 2 * ROUNDS + 2, 2):
        pair = [models.read("m", version)[0] for version in (first, first + 1)]
        assert [manifest["parent"] for manifest in pair] == [first - 1] * 2
        assert json.dumps(pair[0]["history"]) == json.dumps(pair[1]["history"])
    assert harness.leftovers(driver.store) == []
