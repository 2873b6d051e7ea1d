"""Registration of the agents: it assigns ranks and records how ranks end. Runs on: driver.

The module does not depend on Spark. Ranks of a host follow each other. Hosts are distinguished by
more than their names, which may repeat.
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
AGENT_RECONNECT_S = 12.0
"""Seconds in which an agent whose connection ended may come back."""
EXIT_CODE_TEXTS = {
    137: ", as of a process that was killed, often for lack of memory",
    channel.ORPHAN_EXIT_CODE: ": it could not reach the driver",
}
"""Explanations of some exit codes, for messages."""


@dataclass
class _Agent:
    """State of one agent, from its events."""

    link: int = 0
    host: str = ""
    boot: str = ""
    ready: bool = False
    rank: int | None = None
    has_exited: bool = False
    hangup_time: float | None = None


@dataclass(frozen=True)
class Exit:
    """End of a rank's process that gave no report."""

    rank: int
    code: int

    def __str__(self) -> str:
        return f"exit code {self.code}{EXIT_CODE_TEXTS.get(self.code, '')}"


class Agents:
    """Agents of one start: each gets its rank when all are ready, and reports how its rank ends.

    Args:
        count: Number of agents.
        tell: Function that sends a message over a connection.
        environment: Horovod's settings that are equal for all ranks.
        clock: Function that returns seconds since any moment.
    """

    def __init__(
        self,
        count: int,
        tell: Callable[..., bool],
        environment: dict[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._environment, self._clock = tell, environment, clock
        self._lock = threading.Lock()
        self._agents = [_Agent() for _ in range(count)]
        self._lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._is_ending = False
        self.exit: Exit | None = None
        """Exit of the first rank whose process ended without a report."""

    @property
    def tail(self) -> str:
        """Return the last output of the ranks, for the end of an error message."""
        lines = "\n".join(self._lines)
        return f"\nLast output of the ranks:\n{lines}" if lines else ""

    def hear(self, event: channel.Event) -> None:
        """Process one event of an agent."""
        with self._lock:
            agent = self._agents[event["agent"]]
            if event.get("hung_up"):
                if event["link"] == agent.link:
                    agent.hangup_time = self._clock()
                return
            agent.link, agent.hangup_time = event["link"], None
            if "host" in event:
                agent.host = event["host"]
            if "output" in event:
                self._record_output(event["output"])
            if "ready" in event:
                agent.ready, agent.boot = True, event["boot"]
                if all(other.ready for other in self._agents):
                    self._assign_ranks()
            if "exited" in event:
                self._record_exit(agent, event)

    def end(self) -> None:
        """Tell all agents to end their ranks."""
        with self._lock:
            self._is_ending = True
            links = [agent.link for agent in self._agents if agent.link]
        for link in links:
            self._tell(link, end=True)

    def lost(self) -> int | None:
        """Return a rank whose agent disconnected before the rank ended, and does not come back."""
        with self._lock:
            for index, agent in enumerate(self._agents):
                is_away = (
                    agent.hangup_time is not None
                    and self._clock() - agent.hangup_time > AGENT_RECONNECT_S
                )
                if is_away and not agent.has_exited:
                    return agent.rank if agent.rank is not None else index
        return None

    def _record_output(self, text: str) -> None:
        for line in text.splitlines():
            self._lines.append(line)
            logger.debug("%s", line)

    def _record_exit(self, agent: _Agent, event: channel.Event) -> None:
        agent.has_exited = True
        is_failure = not event["reported"] and not self._is_ending
        if is_failure and self.exit is None and event["exited"] is not None:
            rank = event["rank"] if event["rank"] is not None else event["agent"]
            self.exit = Exit(rank, event["exited"])

    def _assign_ranks(self) -> None:
        slots = assign([f"{agent.host} {agent.boot}" for agent in self._agents])
        for agent, slot in zip(self._agents, slots, strict=True):
            agent.rank = int(slot["HOROVOD_RANK"])
            environment = {name: str(value) for name, value in slot.items()}
            message = {"rank": agent.rank, "environment": {**self._environment, **environment}}
            self._tell(agent.link, **message)


def assign(hosts: Sequence[str]) -> list[dict[str, int | str]]:
    """Give each rank its numbers: among all, on its host, and among equal local ranks of all hosts.

    Args:
        hosts: Host of each agent; equal texts are one host.

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
