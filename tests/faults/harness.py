"""Means to break a fit while it runs, and to see what is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

import spark_mnist

PATIENCE = 90.0
"""Seconds after which a test gives up waiting for something that should happen in a few."""


def wait(condition: Callable[[], object], seconds: float = PATIENCE) -> object:
    """Wait until a condition holds, and return what it gave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} seconds in vain")


def ranks() -> list[psutil.Process]:
    """Running ranks of this process's fit, in rank order."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name, _, rank = process.name().rpartition("-")
            if name == "mnist-rank":
                found.append((int(rank), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def all_ranks(count: int = 2) -> list[psutil.Process]:
    """All ranks of the fit under way, once they run."""
    return wait(lambda: found if len(found := ranks()) == count else None)


def trained(store: str, name: str, epochs: int) -> bool:
    """Return whether a running fit has a checkpoint of at least so many epochs."""
    if not epochs:
        return True
    paths = Path(store).glob(f"{name}/.work-*/attempt-*-epoch-*/v000001/manifest.json")
    return any(int(path.parent.parent.name.split("-")[3]) >= epochs for path in paths)


class Saboteur(threading.Thread):
    """Does harm once a condition holds; raises at the end of its block if it could not.

    Args:
        when: Looked at until it holds.
        harms: What is done, one after the other, each once its condition holds again.
    """

    def __init__(self, when: Callable[[], object], *harms: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._when, self._harms = when, harms
        self._error: BaseException | None = None
        self._left = len(harms)
        self._enough = threading.Event()

    def run(self) -> None:
        try:
            for harm in self._harms:
                while not self._when():
                    if self._enough.wait(0.05):
                        return
                harm()
                self._left -= 1
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Saboteur:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self.join()
        if self._error:
            raise self._error
        assert not self._left, f"{self._left} harms were not done: the block ended before"


def send(number: int, *which: int) -> Callable[[], None]:
    """Make a function that sends a signal to ranks of these numbers and waits for its effect."""

    def strike() -> None:
        running = all_ranks()
        for rank in which:
            running[rank].send_signal(number)
        if number == signal.SIGKILL:
            psutil.wait_procs([running[rank] for rank in which], timeout=PATIENCE)

    return strike


@contextlib.contextmanager
def nothing_left(store: str) -> Iterator[None]:
    """Check that a fit leaves no rank, no work directory and no changed signal handler."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    wait(lambda: not ranks())
    assert leftovers(store) == []


def leftovers(store: str) -> list[str]:
    """Return the files of a store that belong to no published version."""
    kept = {
        Path(store, model.name, f"v{version:06d}")
        for model in spark_mnist.models(store)
        for version in range(1, model.version + 1)
    }
    return [str(path) for path in Path(store).glob("*/*") if path not in kept]


def contents(store: str) -> dict[str, bytes]:
    """All files of a store, by path."""
    return {
        os.path.relpath(path, store): path.read_bytes()
        for path in Path(store).rglob("*")
        if path.is_file()
    }


def processes_in(home: Path) -> list[psutil.Process]:
    """Processes that work for drivers in this directory: the JVM, Python workers, ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == home:
                found.append(process)
        except psutil.Error:
            continue
    return found
