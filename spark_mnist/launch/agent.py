"""Agent of a rank: starts the rank, watches it, and ends it. Runs on: Spark task.

The rank is a child of a server that has already imported TensorFlow, Keras and Horovod. The server
belongs to Spark's Python worker, which Spark uses again for the next job: only the first rank that
a worker starts waits for these imports. When the worker is killed its server ends, and with the
server the rank, frozen or not.
"""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
from pyspark import TaskContext

from spark_mnist.cluster import task
from spark_mnist.core import channel, plan, processes
from spark_mnist.launch import rank_process

OUTPUT_MESSAGE_BYTES = 4000
"""Most bytes of output that one message carries."""
REPORTED_RANK_GRACE_S = 5.0
"""Seconds in which a rank that reported may end by itself."""
RECONNECT_INTERVAL_S = 1.0
"""Seconds between two tries to reach the driver again."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Instructions that every agent of a start gets with its task: small, and equal for all."""

    driver_address: channel.Address
    training: bytes
    """Pickled ``plan.TrainingPlan``."""
    environment: str
    """Pattern for the variables that ranks keep of their executor's environment."""
    settings: dict[str, str]
    """Further variables that ranks get."""
    disconnect_timeout: float
    """Seconds without the driver after which an agent ends its rank."""


def run(index: int, instructions: Instructions) -> Iterator[bytes]:
    """Run the agent of one rank until the rank has ended.

    Args:
        index: Index of the Spark task.
        instructions: Instructions of this start.

    Yields:
        The rank's pickled ``plan.RankReport``; nothing where it ended without one.
    """
    context = TaskContext.get()
    if context and context.attemptNumber() > 0:  # the ranks of the first attempt lost this rank
        return
    yield from _Agent(index, instructions).run()


class _Agent:
    def __init__(self, index: int, instructions: Instructions) -> None:
        self._index, self._instructions = index, instructions
        self._link: channel.Link | None = channel.Link(instructions.driver_address)
        self._disconnect_time: float | None = None
        self._rank: int | None = None
        self._report: bytes | None = None

    def run(self) -> Iterator[bytes]:
        self._send(host=socket.gethostname())
        # Returns once the server's imports are done.
        child = rank_process.start(self._instructions.environment, self._instructions.settings)
        try:
            self._send(ready=True, host=socket.gethostname(), boot=_boot_id())
            self._watch(child)
        finally:
            child.end()
        while self._read_output(child):
            pass
        self._send(
            rank=self._rank,
            exited=child.exit_code,
            reported=self._report is not None,
        )
        if self._link:
            self._link.close()
        if self._report is not None:
            yield self._report

    def _watch(self, child: rank_process.Child) -> None:
        """Pass on output, report and messages until the rank has ended or must end."""
        deadline = None
        sources: set[Any] = {child.process.sentinel, child.output, child.connection}
        while not self._driver_is_gone():
            link = {self._link.socket} if self._link else set()
            ready, _, _ = select.select([*sources, *link], [], [], RECONNECT_INTERVAL_S)
            if child.output in ready and not self._read_output(child):
                sources.discard(child.output)
            if child.connection in ready:
                sources.discard(child.connection)
                with contextlib.suppress(EOFError, OSError):
                    self._report = child.connection.recv_bytes()
                deadline = time.monotonic() + REPORTED_RANK_GRACE_S
            if child.process.sentinel in ready or (deadline and time.monotonic() > deadline):
                return
            if link & {*ready} and not self._hear(child):
                return

    def _hear(self, child: rank_process.Child) -> bool:
        """Follow the driver's messages, and return whether the rank is to go on."""
        assert self._link is not None
        messages = self._link.read()
        if messages is None:
            self._hang_up()
        for message in messages or []:
            if "end" in message:
                return False
            self._rank = message["rank"]
            local = self._link.socket.getsockname()[0]
            environment = {**message["environment"], "HOROVOD_GLOO_IFACE": _interface(local)}
            slot = plan.Slot(rank=message["rank"], environment=environment, gpus=task.gpus())
            with contextlib.suppress(OSError):  # the rank has ended: its exit code says why
                child.connection.send_bytes(pickle.dumps(slot))
                child.connection.send_bytes(self._instructions.training)
        return True

    def _read_output(self, child: rank_process.Child) -> bool:
        """Send some of the rank's output, and return whether there was any."""
        content = child.read_output(OUTPUT_MESSAGE_BYTES)
        if content:
            text = content.decode(errors="replace")
            self._send(output=text)
        return bool(content)

    def _send(self, **event: Any) -> None:
        if self._link:
            try:
                self._link.send({"agent": self._index, **event})
            except OSError:
                self._hang_up()

    def _hang_up(self) -> None:
        if self._link:
            self._link.close()
        self._link, self._disconnect_time = None, self._disconnect_time or time.monotonic()

    def _driver_is_gone(self) -> bool:
        """Try to reach a driver that was lost, and return whether it was away for too long."""
        if self._link or self._disconnect_time is None:
            return False
        with contextlib.suppress(OSError):
            self._link = channel.Link(self._instructions.driver_address)
            self._disconnect_time = None
            self._send(host=socket.gethostname())
            return False
        return (
            time.monotonic() - (self._disconnect_time or 0.0)
            > self._instructions.disconnect_timeout
        )


def _interface(address: str) -> str:
    """Return the name of the network interface that has an address."""
    address = address.partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if address in {entry.address.partition("%")[0] for entry in addresses}:
            return str(name)
    return ""


def _boot_id() -> str:
    """Return an id of this machine, or of this container's network; names may repeat."""
    with contextlib.suppress(OSError):
        return processes.machine_id("net")
    return ""
