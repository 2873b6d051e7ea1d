"""The warm server of a Python worker, and the ranks that it forks. Runs on: Spark task.

Python's own forkserver, with TensorFlow, Keras and Horovod imported before it forks. It starts with
a clean environment, which is all that ``/proc/PID/environ`` of a rank shows.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import select
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing import util as multiprocessing_util
from multiprocessing.connection import Connection
from typing import Any

from spark_mnist.ranks import warm_server

ENTRY = "spark_mnist.ranks.entry"
"""The module in which a rank begins; the server imports it, and nobody else."""
SERVER = "spark_mnist.ranks.warm_server"
"""The module that ends the server with its parent; the server imports it first."""


@dataclass(frozen=True)
class Child:
    """A process that waits to become a rank."""

    process: Any
    connection: Connection
    """Takes a slot and a plan, gives a report."""
    output: Connection
    """What the process prints."""

    @property
    def exit_code(self) -> int | None:
        """The exit code as shells have it: 128 and the number of a signal."""
        code: int | None = self.process.exitcode
        return 128 - code if code is not None and code < 0 else code

    def read_output(self, size: int) -> bytes:
        """Return some of what was printed, without waiting for it; nothing at its end."""
        if self.output.closed or not select.select([self.output], [], [], 0)[0]:
            return b""
        return os.read(self.output.fileno(), size)

    def end(self) -> None:
        """End the process, also one that was stopped."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def warm(environment: str, settings: Mapping[str, str]) -> None:
    """Start this worker's server where none runs; returns before its imports are done.

    Args:
        environment: A pattern for the names of variables that it keeps.
        settings: More variables for it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([SERVER, ENTRY])
    socket_directory = {warm_server.SOCKET_DIRECTORY: multiprocessing_util.get_temp_dir()}
    with _environment(environment, {**settings, **socket_directory}), _silence():
        forkserver.ensure_running()


def start(environment: str, settings: Mapping[str, str]) -> Child:
    """Fork a process; returns when it runs, and so after the server's imports."""
    warm(environment, settings)
    context = multiprocessing.get_context("forkserver")
    connection, its_connection = context.Pipe()
    output, its_output = context.Pipe(duplex=False)
    process = context.Process(target=_enter, args=(its_connection, its_output))
    with _no_main_module():
        process.start()
    its_connection.close()
    its_output.close()
    return Child(process, connection, output)


def _enter(connection: Connection, output: Connection) -> None:
    """Enter the rank's module, which is imported already, here alone."""
    importlib.import_module(ENTRY).main(connection, output)


@contextlib.contextmanager
def _environment(pattern: str, settings: Mapping[str, str]) -> Iterator[None]:
    """Have for a while only those variables whose names match a pattern, and some more."""
    before = dict(os.environ)
    for name in before:
        if not re.fullmatch(pattern, name):
            del os.environ[name]
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Let a process that starts here print nothing; what cannot be imported the rank says again."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(stream) for stream in (1, 2)]
    with open(os.devnull, "w") as null:
        for stream in (1, 2):
            os.dup2(null.fileno(), stream)
    try:
        yield
    finally:
        for stream, descriptor in zip((1, 2), before, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide the main module, which a new process would import: here it is Spark's daemon."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = type(sys)("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
