"""Warm server of a Python worker, and the ranks that it forks. Runs on: Spark task.

The server is Python's own forkserver, which imports TensorFlow, Keras and Horovod before it forks.
It starts with a clean environment, which is all that ``/proc/PID/environ`` of a rank shows.
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

from spark_mnist.launch import warm_server

ENTRY_MODULE = "spark_mnist.ranks.entry"
"""Module with the entry point of a rank; only the server imports it."""
SERVER_MODULE = "spark_mnist.launch.warm_server"
"""Module that ends the server with its parent; the server imports it first."""


@dataclass(frozen=True)
class Child:
    """A process that waits to become a rank."""

    process: Any
    connection: Connection
    """Connection that takes a slot and a plan, and gives a report."""
    output: Connection
    """Connection with everything that the process prints."""

    @property
    def exit_code(self) -> int | None:
        """Return the exit code in the form of shells: a signal is 128 and the signal's number."""
        code: int | None = self.process.exitcode
        return 128 - code if code is not None and code < 0 else code

    def read_output(self, size: int) -> bytes:
        """Return some of the output without waiting for it; nothing at the end of the output."""
        if self.output.closed or not select.select([self.output], [], [], 0)[0]:
            return b""
        return os.read(self.output.fileno(), size)

    def end(self) -> None:
        """Kill the process, even a stopped one, and close its connection."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def warm(environment: str, settings: Mapping[str, str]) -> None:
    """Start this worker's server where none runs, and return before the server's imports end.

    Args:
        environment: Pattern for the names of the variables that the server keeps.
        settings: Further variables for the server.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([SERVER_MODULE, ENTRY_MODULE])
    socket_directory = {warm_server.SOCKET_DIRECTORY: multiprocessing_util.get_temp_dir()}
    with _environment(environment, {**settings, **socket_directory}), _silence():
        forkserver.ensure_running()


def start(environment: str, settings: Mapping[str, str]) -> Child:
    """Fork a process, and return when the process runs and so after the server's imports."""
    warm(environment, settings)
    context = multiprocessing.get_context("forkserver")
    connection, child_connection = context.Pipe()
    output, child_output = context.Pipe(duplex=False)
    process = context.Process(target=_run_entry_point, args=(child_connection, child_output))
    with _hidden_main_module():
        process.start()
    child_connection.close()
    child_output.close()
    return Child(process, connection, output)


def _run_entry_point(connection: Connection, output: Connection) -> None:
    """Run the entry point of a rank, whose module the server of this process has imported."""
    importlib.import_module(ENTRY_MODULE).main(connection, output)


@contextlib.contextmanager
def _environment(pattern: str, settings: Mapping[str, str]) -> Iterator[None]:
    """Keep only the variables whose names match a pattern, and add settings, within a block."""
    variables = dict(os.environ)
    for name in variables:
        if not re.fullmatch(pattern, name):
            del os.environ[name]
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Make a process that starts in this block print nothing; a rank repeats import errors."""
    sys.stdout.flush()
    sys.stderr.flush()
    copies = [os.dup(stream) for stream in (1, 2)]
    with open(os.devnull, "w") as null:
        for stream in (1, 2):
            os.dup2(null.fileno(), stream)
    try:
        yield
    finally:
        for stream, copy in zip((1, 2), copies, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


@contextlib.contextmanager
def _hidden_main_module() -> Iterator[None]:
    """Hide the main module, Spark's daemon, since a new process would import it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = type(sys)("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
