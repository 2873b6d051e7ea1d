"""Messages between the ranks, their agents and the driver: small, signed, never pickled.

A line is JSON behind its HMAC-SHA256. The key is this fit's alone and travels with the plan. The
signature covers a number that the driver drew for the connection, and the line's place on it: a
captured line is worth nothing on another connection, or a second time. A rank's line may get lost,
with a warning at most: the next ones tell the rest. A rank that cannot reach its driver for long
ends itself, since nobody waits for it any more.

The same port answers HTTP: there the ranks find each other (``rendezvous``).
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

GREETING = b"spark_mnist 1"
"""The first line of a connection that carries signed lines; any other is taken for HTTP."""
MOST_BYTES = 16 << 10
"""Longest line that is read."""
POLL_S = 0.1
"""Seconds after which the driver's thread looks whether it is to end."""
STRANGER_S = 10.0
"""Seconds that a connection may be silent before its first signed line."""
MOST_STRANGERS = 1024
"""Connections without a signed line that are kept open."""
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


def listen(bind: str, ports: Sequence[int]) -> socket.socket:
    """Listen on the first port that is free.

    Raises:
        OSError: None is.
    """
    for port in ports[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_server((bind, port), backlog=1024)
    return socket.create_server((bind, ports[-1]), backlog=1024)


class _Peer:
    """One connection, as the driver sees it."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.connection, self.number = connection, number
        self.nonce = secrets.token_hex(16).encode()
        self.since = time.monotonic()
        self.buffer = b""
        self.greeted = False
        """Whether it carries signed lines."""
        self.lines_received = self.lines_sent = 0
        """How many lines came, and went."""
        self.who: dict[str, int] = {}
        """``rank`` or ``agent``, once it has signed a line."""


class HeartbeatServer:
    """The driver's side: a context manager that hands each event to a function, in its thread.

    Args:
        host: Name or address of this machine, as executors reach it.
        bind: The address to listen on, where it is another.
        receive: Called with each event, one after the other. When the connection of a rank ends it
            gets ``{"rank": ..., "hung_up": True}``, of an agent the same with ``agent``. ``link``
            tells connections apart.
        answer: Called with an HTTP request as it arrives; returns the response once it is whole.
        ports: The ports to listen on, the first that is free; 0 is any.

    Raises:
        OSError: None of the ports is free.
    """

    def __init__(
        self,
        host: str,
        bind: str,
        receive: Callable[[Event], None],
        answer: Callable[[bytes], bytes | None] = lambda request: b"",
        ports: Sequence[int] = (0,),
    ) -> None:
        self._receive, self._answer = receive, answer
        self._server = listen(bind, ports)
        self._server.setblocking(False)
        self.address = Address(host, self._server.getsockname()[1], secrets.token_bytes(32))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> HeartbeatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for peer in [*self._peers.values()]:
            self._close(peer)
        self._server.close()
        self._selector.close()

    def tell(self, link: int, **message: Any) -> bool:
        """Send a message over a connection; returns whether it could be sent."""
        with self._lock:
            if not (peer := self._peers.get(link)):
                return False
            body = json.dumps(message).encode()
            signature = _sign(self.address.key, b"driver", peer.nonce, peer.lines_sent, body)
            peer.lines_sent += 1
            try:
                peer.connection.sendall(signature + b" " + body + b"\n")
            except OSError:  # its end shows when it is read
                return False
            return True

    def _serve(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(POLL_S):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._drop_strangers()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # it has gone again
            return
        connection.setblocking(False)
        self._count += 1
        peer = _Peer(connection, self._count)
        with self._lock:
            self._peers[peer.number] = peer
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            content = peer.connection.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:  # a rank that was killed resets its connection
            content = b""
        peer.buffer += content
        if not content or not (self._take_lines(peer) if self._greets(peer) else self._web(peer)):
            self._close(peer)

    def _greets(self, peer: _Peer) -> bool:
        """Return whether a connection carries signed lines; welcome it when it says so."""
        greeting = GREETING + b"\n"
        if not peer.greeted and peer.buffer.startswith(greeting):
            peer.greeted, peer.buffer = True, peer.buffer.removeprefix(greeting)
            with contextlib.suppress(OSError):  # its end shows when it is read
                peer.connection.sendall(peer.nonce + b"\n")
        return peer.greeted

    def _web(self, peer: _Peer) -> bool:
        """Answer an HTTP request; returns whether more of it is to come."""
        response = self._answer(peer.buffer)
        if response is None:
            return True
        with contextlib.suppress(OSError):  # whoever asked has gone
            peer.connection.sendall(response)
        return False

    def _take_lines(self, peer: _Peer) -> bool:
        """Hear the lines that are whole; returns whether their signatures were good."""
        *lines, peer.buffer = peer.buffer.split(b"\n")
        for line in lines:
            signature, _, body = line.partition(b" ")
            good = _sign(self.address.key, b"rank", peer.nonce, peer.lines_received, body)
            if not hmac.compare_digest(signature, good):
                return False
            peer.lines_received += 1
            self._hear(peer, json.loads(body))
        return len(peer.buffer) <= MOST_BYTES

    def _hear(self, peer: _Peer, event: Event) -> None:
        peer.who = {key: event[key] for key in ("rank", "agent") if key in event}
        try:
            self._receive({**event, "link": peer.number})
        except Exception:
            logger.debug("an event was lost", exc_info=True)

    def _close(self, peer: _Peer) -> None:
        with self._lock:
            if self._peers.pop(peer.number, None) is None:
                return
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.who:
            self._receive({**peer.who, "hung_up": True, "link": peer.number})

    def _drop_strangers(self) -> None:
        """Close connections over which nobody has signed a line for long."""
        now = time.monotonic()
        strangers = [peer for peer in self._peers.values() if not peer.who]
        for number, peer in enumerate(strangers):
            if now - peer.since > STRANGER_S or number < len(strangers) - MOST_STRANGERS:
                self._close(peer)


class Link:
    """A connection to the driver, over which lines go both ways.

    Args:
        address: Of the driver's ``HeartbeatServer``.

    Raises:
        OSError: The driver does not answer.
    """

    def __init__(self, address: Address) -> None:
        self._key = address.key
        target = (address.host, address.port)
        self.socket = socket.create_connection(target, timeout=SEND_TIMEOUT)
        self._buffer = b""
        self._sent = self._heard = 0
        try:
            self.socket.sendall(GREETING + b"\n")
            while b"\n" not in self._buffer:
                if not (content := self.socket.recv(4096)):
                    raise ConnectionError("the driver has hung up")
                self._buffer += content
        except OSError:
            self.socket.close()
            raise
        self._nonce, _, self._buffer = self._buffer.partition(b"\n")

    def send(self, event: Event) -> None:
        """Send one event; raises OSError where the connection has ended."""
        body = json.dumps(event).encode()
        line = _sign(self._key, b"rank", self._nonce, self._sent, body) + b" " + body + b"\n"
        self._sent += 1
        self.socket.sendall(line)

    def read(self) -> list[Event] | None:
        """Return the driver's next messages, once there are bytes to read; None at its end."""
        try:
            content = self.socket.recv(MOST_BYTES)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not content:
            return None
        *lines, self._buffer = (self._buffer + content).split(b"\n")
        messages = []
        for line in lines:
            signature, _, body = line.partition(b" ")
            good = _sign(self._key, b"driver", self._nonce, self._heard, body)
            if not hmac.compare_digest(signature, good):
                return None
            self._heard += 1
            messages.append(json.loads(body))
        return messages

    def close(self) -> None:
        """End the connection."""
        self.socket.close()


class HeartbeatClient:
    """A rank's side: a context manager that shows the driver that the rank lives.

    Args:
        address: Of the driver's ``HeartbeatServer``, or None to send nothing.
        rank: Who sends.
        patience: Seconds without the driver after which the process ends itself.
    """

    def __init__(self, address: Address | None, rank: int = 0, patience: float = 60.0) -> None:
        self._address, self._patience = address, patience
        self.rank = rank
        """Who sends."""
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._next = 0.0
        self._moves = 0
        self._busy = False
        self._ended = threading.Event()

    def __enter__(self) -> HeartbeatClient:
        if self._address:
            self.send()
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        any(self.send(ended=True) for _ in range(3))  # until it arrives
        with self._lock:
            if self._link:
                self._link.close()

    @contextlib.contextmanager
    def long_operation(self) -> Iterator[None]:
        """Tell the driver that what is done here may take long, though nothing moves."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self.tick()

    def tick(self) -> None:
        """Note that the rank is a little further than before."""
        self._moves += 1

    def send_throttled(self, **event: Any) -> None:
        """Send one event, unless another went this way a moment ago."""
        self.tick()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SELDOM
            self.send(**event)

    def send(self, **event: Any) -> bool:
        """Send one event; returns whether the driver's machine took it."""
        if not self._address:
            return False
        who = {"rank": self.rank, "pid": os.getpid(), "host": self._host}
        signs = {"moves": self._moves, "busy": self._busy, "cpu": time.process_time()}
        with self._lock:
            try:
                if self._link is None:
                    self._link = Link(self._address)
                self._link.send({**who, **signs, **event})
            except OSError:
                if self._link:
                    self._link.close()
                self._link = None
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

    def __init__(self, outbox: HeartbeatClient) -> None:
        super().__init__(logging.WARNING)
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, unless it is a library's that nobody asked for."""
        if record.name.partition(".")[0] not in NOISY:
            self._outbox.send(warning=record.getMessage()[:MOST_TEXT])


def _sign(key: bytes, side: bytes, nonce: bytes, place: int, body: bytes) -> bytes:
    """Sign a line for its place on its connection, and for its direction."""
    signed = b"%b %b %d %b" % (side, nonce, place, body)
    return hmac.digest(key, signed, "sha256").hex().encode()
