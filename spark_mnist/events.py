"""Messages from the ranks to the driver while they train: small, signed, never pickled.

Horovod forwards the ranks' output in blocks of 64 KiB, hence at the end of most fits; so the ranks
tell the driver themselves how far they are: a line of JSON behind its HMAC-SHA256. The key is this
fit's alone and travels with the plan. Training never depends on a message's arrival.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MOST_BYTES = 4096
"""Longest line that is read."""
SEND_TIMEOUT = 5.0
"""Seconds that a rank waits for the driver before it goes silent."""
SELDOM = 0.2
"""Seconds between two events of the kind that may be left out."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """Where the driver listens."""

    host: str
    port: int
    key: bytes


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("an event was lost", exc_info=True)


class Inbox:
    """The driver's side: a context manager that hands each event to a function, in threads.

    Args:
        host: Name or address of this machine, as executors reach it.
        bind: The address to listen on, where it is another.
        receive: Called with each event; calls may overlap when several ranks send.
    """

    def __init__(self, host: str, bind: str, receive: Callable[[Event], None]) -> None:
        key = secrets.token_bytes(32)

        class Reader(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while line := self.rfile.readline(MOST_BYTES):
                    signature, _, body = line.rstrip(b"\n").partition(b" ")
                    if not hmac.compare_digest(signature, _sign(key, body)):
                        return  # a stranger: hang up
                    receive(json.loads(body))

        self._server = _Server((bind, 0), Reader)
        self.address = Address(host, self._server.server_address[1], key)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    def __enter__(self) -> Inbox:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Outbox:
    """A rank's side: sends events, and goes silent where the driver cannot be reached.

    Args:
        address: Of the driver's ``Inbox``, or None to send nothing.
    """

    def __init__(self, address: Address | None) -> None:
        self._key = address.key if address else b""
        self._next = 0.0
        self._socket: socket.socket | None = None
        if address:
            with contextlib.suppress(OSError):
                target = (address.host, address.port)
                self._socket = socket.create_connection(target, timeout=SEND_TIMEOUT)

    def send_seldom(self, **event: Any) -> None:
        """Send one event, unless another went this way a moment ago."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SELDOM
            self.send(**event)

    def send(self, **event: Any) -> None:
        """Send one event."""
        if self._socket is None:
            return
        body = json.dumps(event).encode()
        try:
            self._socket.sendall(_sign(self._key, body) + b" " + body + b"\n")
        except OSError:
            self._socket = None


def _sign(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256").hex().encode()
