"""Messages from the ranks to the driver while they run: small, signed, never pickled.

Horovod forwards the ranks' output in blocks of 64 KiB, hence at the end of most fits, and under
Gloo it does not notice a rank that hangs; so the ranks tell the driver themselves that they live
and how far they are: a line of JSON behind its HMAC-SHA256. The key is this fit's alone and travels
with the plan. A line may get lost, with a warning at most: the next ones tell the rest. A rank that
cannot reach its driver for long ends itself, since nobody waits for it any more.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MOST_BYTES = 16 << 10
"""Longest line that is read."""
SEND_TIMEOUT = 5.0
"""Seconds that a rank waits for the driver to take a line."""
SELDOM = 0.2
"""Seconds between two events of the kind that may be left out."""
MOST_TEXT = 1000
"""Characters of a warning that are sent."""
NOISY = ("tensorflow", "absl", "petastorm", "pyarrow", "py4j", "h5py", "matplotlib")
"""Loggers whose warnings are not for the user."""
CPU = "CPU"
"""What a rank says that it computes on where it has no GPU."""
ORPHANED = 75
"""Exit code of a rank whose driver is gone: EX_TEMPFAIL."""

Event = dict[str, Any]
"""Each has ``rank``, ``pid``, ``host``; ``moves``, which grows with what the rank does; ``busy``,
whether that may take long; ``cpu``, seconds of its process. The driver adds ``link``, the
connection. Some have ``device``; ``epoch``, ``step`` and ``means`` of the metrics, and ``done`` at
an epoch's end; ``warning``, a message; ``ended``: the rank leaves. ``hung_up`` is the driver's own.
"""


@dataclass(frozen=True)
class Address:
    """Where the driver listens."""

    host: str
    port: int
    key: bytes


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type) -> None:
        super().__init__(address, handler)
        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close all connections, so that ranks that still live learn that nobody listens."""
        for request in list(self._open):
            with contextlib.suppress(OSError):  # it has ended by itself
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("an event was lost", exc_info=True)


class Inbox:
    """The driver's side: a context manager that hands each event to a function, in threads.

    Args:
        host: Name or address of this machine, as executors reach it.
        bind: The address to listen on, where it is another.
        receive: Called with each event; calls may overlap when several ranks send. When a rank's
            connection ends it gets ``{"rank": ..., "hung_up": True}``. ``link`` tells connections
            apart.
    """

    def __init__(self, host: str, bind: str, receive: Callable[[Event], None]) -> None:
        key = secrets.token_bytes(32)

        class Reader(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                rank = None
                while line := self._line():
                    signature, _, body = line.rstrip(b"\n").partition(b" ")
                    if not hmac.compare_digest(signature, _sign(key, body)):
                        break  # a stranger: hang up
                    event = json.loads(body)
                    rank = event["rank"]
                    receive({**event, "link": id(self)})
                if rank is not None:
                    receive({"rank": rank, "hung_up": True, "link": id(self)})

            def _line(self) -> bytes:
                try:
                    return self.rfile.readline(MOST_BYTES)
                except OSError:  # a rank that was killed resets its connection
                    return b""

        self._server = _Server((bind, 0), Reader)
        self.address = Address(host, self._server.server_address[1], key)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    def __enter__(self) -> Inbox:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()


class Outbox:
    """A rank's side: a context manager that shows the driver that the rank lives.

    Args:
        address: Of the driver's ``Inbox``, or None to send nothing.
        rank: Who sends.
        patience: Seconds without the driver after which the process ends itself.
    """

    def __init__(self, address: Address | None, rank: int = 0, patience: float = 60.0) -> None:
        self._address, self._patience = address, patience
        self.rank = rank
        """Who sends."""
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._next = 0.0
        self._moves = 0
        self._busy = False
        self._ended = threading.Event()

    def __enter__(self) -> Outbox:
        if self._address:
            self.send()
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        any(self.send(ended=True) for _ in range(3))  # until it arrives
        with self._lock:
            if self._socket:
                self._socket.close()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Tell the driver that what is done here may take long, though nothing moves."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self.move()

    def move(self) -> None:
        """Note that the rank is a little further than before."""
        self._moves += 1

    def send_seldom(self, **event: Any) -> None:
        """Send one event, unless another went this way a moment ago."""
        self.move()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SELDOM
            self.send(**event)

    def send(self, **event: Any) -> bool:
        """Send one event; returns whether the driver's machine took it."""
        if not self._address:
            return False
        who = {"rank": self.rank, "pid": os.getpid(), "host": self._host}
        signs = {"moves": self._moves, "busy": self._busy, "cpu": time.process_time()}
        body = json.dumps({**who, **signs, **event}).encode()
        line = _sign(self._address.key, body) + b" " + body + b"\n"
        with self._lock:
            try:
                if self._socket is None:
                    target = (self._address.host, self._address.port)
                    self._socket = socket.create_connection(target, timeout=SEND_TIMEOUT)
                self._socket.sendall(line)
            except OSError:
                if self._socket:
                    self._socket.close()
                self._socket = None
                return False
        return True

    def _beat(self) -> None:
        """Send a sign of life several times in each span of the driver's patience."""
        heard = time.monotonic()
        while not self._ended.wait(min(5.0, self._patience / 5)):
            if self.send():
                heard = time.monotonic()
            elif time.monotonic() - heard > self._patience:
                os._exit(ORPHANED)


class Warnings(logging.Handler):
    """Sends what is logged as a warning, or worse, to the driver, which tells it once.

    Args:
        outbox: Of this rank.
    """

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(logging.WARNING)
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, unless it is a library's that nobody asked for."""
        if record.name.partition(".")[0] not in NOISY:
            self._outbox.send(warning=record.getMessage()[:MOST_TEXT])


def _sign(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256").hex().encode()
