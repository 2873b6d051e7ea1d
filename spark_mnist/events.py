"""Messages from the ranks to the driver while they train: small, signed, never pickled.

Horovod forwards the ranks' output in blocks of 64 KiB, hence at the end of most fits; so the ranks
tell the driver themselves how far they are. The driver listens on the address that Spark's own
executors use; both sides prove by HMAC that they know the key of this fit, which travels with the
plan. Training never depends on a message's arrival.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError, connection
from typing import Any

MOST_BYTES = 4096
"""Longest message that is read."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """Where the driver listens."""

    host: str
    port: int
    key: bytes


class Inbox:
    """The driver's side: a context manager that hands each event to a function, in threads.

    Args:
        host: Name or address of this machine, as executors reach it.
        receive: Called with each event; calls may overlap when several ranks send.
    """

    def __init__(self, host: str, receive: Callable[[Event], None]) -> None:
        key = secrets.token_bytes(32)
        self._receive = receive
        self._listener = connection.Listener((host, 0), authkey=key)
        self.address = Address(host, self._listener.address[1], key)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Inbox:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError, EOFError, AuthenticationError):  # wakes the listener
            connection.Client(
                (self.address.host, self.address.port), authkey=self.address.key
            ).close()
        self._thread.join(timeout=5)
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError, EOFError, AuthenticationError):
                sender = self._listener.accept()
                threading.Thread(target=self._read, args=(sender,), daemon=True).start()

    def _read(self, sender: connection.Connection[Any, Any]) -> None:
        with sender, contextlib.suppress(OSError, EOFError):
            while not self._closed.is_set():
                self._receive(json.loads(sender.recv_bytes(MOST_BYTES)))


class Outbox:
    """A rank's side: sends events, and goes silent where the driver cannot be reached.

    Args:
        address: Of the driver's ``Inbox``, or None to send nothing.
    """

    def __init__(self, address: Address | None) -> None:
        self._connection = None
        if address is not None:
            with contextlib.suppress(OSError, EOFError, AuthenticationError):
                self._connection = connection.Client(
                    (address.host, address.port), authkey=address.key
                )

    def send(self, **event: Any) -> None:
        """Send one event."""
        if self._connection is None:
            return
        try:
            self._connection.send_bytes(json.dumps(event).encode())
        except OSError:
            self._connection = None
