"""The driver's view of the agents: who is there, who gets which rank, how ranks ended. On: driver.

Knows no Spark. Ranks of a host follow each other, and hosts are told apart by more than their
names, which may repeat.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spark_mnist.core import channel

logger = logging.getLogger(__name__)

TAIL_LINES = 30
"""Last lines of the ranks' output that an error shows."""
AWAY_S = 12.0
"""Seconds in which an agent whose connection ended may come back."""
CODES = {
    137: ", as of a process that was killed, often for lack of memory",
    channel.ORPHANED: ": it could not reach the driver",
}
"""What some exit codes tell."""


@dataclass
class _Agent:
    """What was heard of one agent."""

    link: int = 0
    host: str = ""
    boot: str = ""
    pid: int = 0
    ready: bool = False
    rank: int | None = None
    exited: bool = False
    hung_up: float | None = None


@dataclass(frozen=True)
class Exit:
    """How the process of a rank ended that gave no report."""

    rank: int
    code: int

    def __str__(self) -> str:
        return f"exit code {self.code}{CODES.get(self.code, '')}"


class Agents:
    """Gives each agent its rank once all are there, and hears how ranks end.

    Args:
        count: How many there are.
        tell: Sends a message over a connection.
        environment: Horovod's settings that are alike for all ranks.
    """

    def __init__(
        self,
        count: int,
        tell: Callable[..., bool],
        environment: dict[str, str],
    ) -> None:
        self._tell, self._environment = tell, environment
        self._lock = threading.Lock()
        self._agents = [_Agent() for _ in range(count)]
        self._lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._ended = False
        self.exit: Exit | None = None
        """The first process of a rank that ended without a report."""

    @property
    def tail(self) -> str:
        """The last output of the ranks, for an error's end."""
        lines = "\n".join(self._lines)
        return f"\nLast output of the ranks:\n{lines}" if lines else ""

    def hear(self, event: channel.Event) -> None:
        """Take one event of an agent."""
        with self._lock:
            agent = self._agents[event["agent"]]
            if event.get("hung_up"):
                if event["link"] == agent.link:
                    agent.hung_up = time.monotonic()
                return
            agent.link, agent.hung_up = event["link"], None
            if "host" in event:
                agent.host = event["host"]
            if "output" in event:
                self._take_output(event["output"])
            if "ready" in event:
                agent.ready, agent.pid, agent.boot = True, event["pid"], event["boot"]
                if all(other.ready for other in self._agents):
                    self._give_ranks()
            if "exited" in event:
                self._take_exit(agent, event)

    def end(self) -> None:
        """Tell all agents to end their ranks."""
        with self._lock:
            self._ended = True
            links = [agent.link for agent in self._agents if agent.link]
        for link in links:
            self._tell(link, end=True)

    def name(self, rank: int) -> str | None:
        """Return what the process of a rank is called, where it never said so itself."""
        for agent in self._agents:
            if agent.rank == rank:
                return f"process {agent.pid} on {agent.host}"
        return None

    def lost(self) -> int | None:
        """Return a rank whose agent has gone before its rank ended, and does not come back."""
        with self._lock:
            for index, agent in enumerate(self._agents):
                away = agent.hung_up is not None and time.monotonic() - agent.hung_up > AWAY_S
                if away and not agent.exited:
                    return agent.rank if agent.rank is not None else index
        return None

    def _take_output(self, text: str) -> None:
        for line in text.splitlines():
            self._lines.append(line)
            logger.debug("%s", line)

    def _take_exit(self, agent: _Agent, event: channel.Event) -> None:
        agent.exited = True
        unexpected = not event["reported"] and not self._ended
        if unexpected and self.exit is None and event["exited"] is not None:
            rank = event["rank"] if event["rank"] is not None else event["agent"]
            self.exit = Exit(rank, event["exited"])

    def _give_ranks(self) -> None:
        slots = assign([f"{agent.host} {agent.boot}" for agent in self._agents])
        for agent, slot in zip(self._agents, slots, strict=True):
            agent.rank = int(slot["HOROVOD_RANK"])
            environment = {name: str(value) for name, value in slot.items()}
            message = {"rank": agent.rank, "environment": {**self._environment, **environment}}
            self._tell(agent.link, **message)


def assign(hosts: Sequence[str]) -> list[dict[str, int | str]]:
    """Number the ranks: all, those of a host, and those of equal number on all hosts.

    Args:
        hosts: Of each agent; equal ones are one host.

    Returns:
        Horovod's settings for each agent, in the order of ``hosts``. The first agent is rank 0.
    """
    order = list(dict.fromkeys(hosts))
    members = {host: [n for n, other in enumerate(hosts) if other == host] for host in order}
    ranks = {n: rank for rank, n in enumerate(n for host in order for n in members[host])}
    slots: list[dict[str, int | str]] = []
    for number, host in enumerate(hosts):
        local = members[host].index(number)
        across = [other for other in order if len(members[other]) > local]
        slots.append(
            {
                "HOROVOD_HOSTNAME": hashlib.sha256(host.encode()).hexdigest()[:16],
                "HOROVOD_RANK": ranks[number],
                "HOROVOD_SIZE": len(hosts),
                "HOROVOD_LOCAL_RANK": local,
                "HOROVOD_LOCAL_SIZE": len(members[host]),
                "HOROVOD_CROSS_RANK": across.index(host),
                "HOROVOD_CROSS_SIZE": len(across),
            }
        )
    return slots
