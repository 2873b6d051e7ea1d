"""The driver's side of hundreds of ranks, simulated on one machine, without Spark and TensorFlow.

    python -m benchmarks.many_ranks [RANKS]

Real agents' messages go over real sockets from a few processes to the driver's server, its
registration, rendezvous and watchdog: each rank gets its slot, tells its address and asks for those
of all others, as Gloo does, and then sends signs of life. Prints a table: seconds until all have
their slots and know each other, CPU of the driver for a minute of training, and the seconds after
which silent ranks are taken for lost, beside the limit that was set.
"""

from __future__ import annotations

import http.client
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from spark_mnist.core import channel
from spark_mnist.launch import registration, rendezvous, watchdog

PROCESSES = 4
"""Processes that stand for the hosts of the ranks."""
HEARTBEAT_S = 2.0
"""Seconds between two signs of life, as of ranks with ``heartbeat_timeout=LIMIT_S``."""
LIMIT_S = 10.0
WATCH_S = 20.0
"""Seconds of training that are watched."""
LOCAL = "127.0.0.1"


def simulate(address: channel.Address, numbers: range, control: Connection) -> None:
    """Be the agents, and then the ranks, of some numbers; obey what comes over ``control``."""
    agents = {number: channel.Link(address) for number in numbers}
    for number, link in agents.items():
        link.send({"agent": number, "host": f"host-{number // 8}"})
        link.send({"agent": number, "host": f"host-{number // 8}", "ready": True, "boot": ""})
    ranks = [slot(link) for link in agents.values()]
    control.send("slots")
    control.recv()
    for rank in ranks:
        request(address, "PUT", f"/global/{rank}", b"an address of Gloo" * 8)
    control.send("told")
    total = control.recv()
    for _ in ranks:
        for other in range(total):
            request(address, "GET", f"/global/{other}")
    control.send("met")
    control.recv()
    links = {rank: channel.Link(address) for rank in ranks}
    silent: set[int] = set()
    moves = 0
    while True:
        moves += 1
        start = time.monotonic()
        for rank, link in links.items():
            if rank not in silent:
                identity = {"rank": rank, "pid": rank, "host": f"host-{rank // 8}"}
                place = {"epoch": 1, "step": moves, "means": {"loss": 0.1}}
                link.send({**identity, "moves": moves, "busy": False, "cpu": moves, **place})
        while (left := start + HEARTBEAT_S - time.monotonic()) > 0:
            if control.poll(left):
                message = control.recv()
                if message is None:
                    return
                silent = set(message)


def slot(link: channel.Link) -> int:
    """Wait for the rank that the driver gives an agent."""
    while not (messages := link.read()):
        assert messages is not None
    rank: int = messages[0]["rank"]
    return rank


def request(address: channel.Address, method: str, path: str, body: bytes | None = None) -> None:
    """Ask the rendezvous, on a connection of its own, as Horovod's client does."""
    connection = http.client.HTTPConnection(address.host, address.port)
    connection.request(method, path, body)
    response = connection.getresponse()
    assert response.status == 200, response.status
    response.read()
    connection.close()


class Simulation:
    """The driver's parts, and the processes with the ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._watch = watchdog.Watchdog(ranks, LIMIT_S)
        self._agents: registration.Agents | None = None

    def receive(self, event: channel.Event) -> None:
        """Pass an event on, as the launcher does."""
        if "agent" in event:
            assert self._agents
            self._agents.hear(event)
        else:
            self._watch.hear(event)

    def run(self) -> list[tuple[str, str]]:
        """Return what was measured, as rows of a table."""
        store, context = rendezvous.Rendezvous(), multiprocessing.get_context("spawn")
        rows = []
        with channel.HeartbeatServer(LOCAL, LOCAL, self.receive, store.answer) as server:
            self._agents = registration.Agents(self.ranks, server.tell, {})
            pipes = [context.Pipe() for _ in range(PROCESSES)]
            share = -(-self.ranks // PROCESSES)
            parts = [range(n * share, min(self.ranks, (n + 1) * share)) for n in range(PROCESSES)]
            processes = [
                context.Process(target=simulate, args=(server.address, part, pipe[1]))
                for part, pipe in zip(parts, pipes, strict=True)
            ]
            controls = [pipe[0] for pipe in pipes]
            for process in processes:
                process.start()
            rows.append(("seconds until all have their slots", seconds(lambda: hear(controls))))
            tell(controls, None)
            hear(controls)
            tell(controls, self.ranks)
            cpu = time.process_time()
            met = seconds(lambda: hear(controls))
            cpu = time.process_time() - cpu
            asked = f"{met}, of which the driver computed {cpu:.1f}"
            rows.append((f"seconds until each of {self.ranks:,} has asked for all others", asked))
            tell(controls, None)
            time.sleep(2 * HEARTBEAT_S)
            cpu = time.process_time()
            assert self._lost(WATCH_S) is None
            cpu = (time.process_time() - cpu) * 60 / WATCH_S
            rows.append(("CPU seconds of the driver for a minute of training", f"{cpu:.1f}"))
            for count in (1, 10, 100):
                tell(controls, range(count))
                verdict = self._lost(3 * LIMIT_S)
                assert verdict is not None, count
                what = f"seconds until {count} silent ones are lost, limit {LIMIT_S:.0f}"
                rows.append((what, verdict))
                tell(controls, [])
                time.sleep(2 * HEARTBEAT_S)
            tell(controls, None)
            for process in processes:
                process.join()
        return rows

    def _lost(self, limit: float) -> str | None:
        """Look at the ranks as the launcher does; return after how many seconds one was lost."""
        start = time.monotonic()
        while time.monotonic() < start + limit:
            if self._watch.failure_reason():
                return f"{time.monotonic() - start:.1f}"
            time.sleep(0.05)
        return None


def hear(controls: list[Connection]) -> None:
    """Wait for a message of each process."""
    for control in controls:
        control.recv()


def tell(controls: list[Connection], message: Any) -> None:
    """Send a message to each process."""
    for control in controls:
        control.send(message)


def seconds(function: Callable[[], None]) -> str:
    """Return how long a call takes."""
    start = time.monotonic()
    function()
    return f"{time.monotonic() - start:.1f}"


def main(ranks: int = 512) -> None:
    """Print the table."""
    sys.stdout.write(f"| {ranks} ranks | |\n|---|---|\n")
    for what, figure in Simulation(ranks).run():
        sys.stdout.write(f"| {what} | {figure} |\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
