"""Messages between the ranks, their agents and the driver: small, signed, never pickled.

Runs on: driver, rank, Spark task.

A line is JSON behind its HMAC-SHA256. The key belongs to one start of the ranks and travels with
the plan. The signature covers a random number of the driver for the connection, and the line's
position on that connection: a captured line is rejected on another connection, and a second time on
its own. A rank's line may get lost, with a warning at most, since later lines repeat the state. A
rank that cannot reach its driver for long ends its process, since nobody waits for the rank any
more.

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
"""First line of a connection that carries signed lines; any other first line means HTTP."""
MAX_LINE_BYTES = 16 << 10
"""Length of the longest line that is read."""
POLL_S = 0.1
"""Seconds between two checks of the server's thread whether the server has stopped."""
UNSIGNED_TIMEOUT_S = 10.0
"""Seconds after which a connection without a signed line is closed."""
MAX_UNSIGNED_CONNECTIONS = 1024
"""Number of connections without a signed line that stay open."""
SEND_TIMEOUT_S = 5.0
"""Seconds that a rank waits for the driver to accept a line."""
EVENT_INTERVAL_S = 0.2
"""Least seconds between two events that ``send_throttled`` sends."""
MAX_WARNING_CHARS = 1000
"""Number of characters of a warning that are sent."""
LIBRARY_LOGGERS = ("tensorflow", "absl", "petastorm", "pyarrow", "py4j", "h5py", "matplotlib")
"""Loggers of libraries, whose warnings are not sent."""
CPU = "CPU"
"""Value of an event's ``device`` for a rank without a GPU."""
ORPHAN_EXIT_CODE = 75
"""Exit code of a rank that has lost its driver: EX_TEMPFAIL."""

Event = dict[str, Any]
"""Message about a rank, as the values of a JSON object.

Every event of a rank has ``rank``, ``pid``, ``host``; ``moves``, a counter that grows as the rank
advances; ``busy``, whether the current operation may take long; ``cpu``, CPU seconds of the rank's
process. The driver adds ``link``, the number of the connection. Some events have ``device``;
``epoch``, ``step`` and ``means`` of the metrics, and ``done`` at the end of an epoch; ``warning``,
a message; ``ended``: the rank leaves. ``hung_up`` comes from the driver alone. An event of an agent
has ``agent``, its number, and ``host``; ``ready`` and ``boot`` once its rank waits; ``output`` of
the rank; ``exited`` and ``reported`` at the rank's end.
"""


@dataclass(frozen=True)
class Address:
    """Host and port on which the driver listens, and the key that signs the lines."""

    host: str
    port: int
    key: bytes


def listen(bind: str, ports: Sequence[int]) -> socket.socket:
    """Listen on the first port that is free.

    Raises:
        OSError: No port is free.
    """
    for port in ports[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_server((bind, port), backlog=1024)
    return socket.create_server((bind, ports[-1]), backlog=1024)


class _Peer:
    """One connection, on the driver's side."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.connection, self.number = connection, number
        self.nonce = secrets.token_hex(16).encode()
        self.opened_s = time.monotonic()
        self.buffer = b""
        self.is_signed = False
        """Whether the connection carries signed lines."""
        self.lines_received = self.lines_sent = 0
        """Number of lines that the driver received, and sent."""
        self.sender: dict[str, int] = {}
        """Number of the ``rank`` or ``agent``, by that word; empty before its first signed line."""


class HeartbeatServer:
    """The driver's side: a context manager that passes each event to a function, in its thread.

    Args:
        host: Name or address of this machine, as executors reach it.
        bind: Address to listen on; it may differ from ``host``.
        receive: Called with each event, one after the other. When the connection of a rank ends,
            the event is ``{"rank": ..., "hung_up": True}``; for an agent the key is ``agent``.
            ``link`` tells connections apart.
        answer: Called with the bytes of an HTTP request that have arrived so far; returns the
            response once the request is complete, None before.
        ports: Ports to try in order, of which the first free one is used; 0 is any port.

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
        self._num_connections = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> HeartbeatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for peer in [*self._peers.values()]:
            self._close(peer)
        self._server.close()
        self._selector.close()

    def tell(self, link: int, **message: Any) -> bool:
        """Send a message over a connection, and return whether it could be sent."""
        with self._lock:
            if not (peer := self._peers.get(link)):
                return False
            body = json.dumps(message).encode()
            signature = _sign(self.address.key, b"driver", peer.nonce, peer.lines_sent, body)
            peer.lines_sent += 1
            try:
                peer.connection.sendall(signature + b" " + body + b"\n")
            except OSError:  # the next read finds that the connection has ended
                return False
            return True

    def _serve(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(POLL_S):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._close_unsigned()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # the other end has closed the connection already
            return
        connection.setblocking(False)
        self._num_connections += 1
        peer = _Peer(connection, self._num_connections)
        with self._lock:
            self._peers[peer.number] = peer
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            content = peer.connection.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:  # the connection of a killed rank is reset
            content = b""
        peer.buffer += content
        if not content or not (
            self._read_lines(peer) if self._read_greeting(peer) else self._answer_http(peer)
        ):
            self._close(peer)

    def _read_greeting(self, peer: _Peer) -> bool:
        """Answer the greeting, and return whether the connection carries signed lines."""
        greeting = GREETING + b"\n"
        if not peer.is_signed and peer.buffer.startswith(greeting):
            peer.is_signed, peer.buffer = True, peer.buffer.removeprefix(greeting)
            with contextlib.suppress(OSError):  # the next read finds the end of the connection
                peer.connection.sendall(peer.nonce + b"\n")
        return peer.is_signed

    def _answer_http(self, peer: _Peer) -> bool:
        """Answer an HTTP request, and return whether it is still incomplete."""
        response = self._answer(peer.buffer)
        if response is None:
            return True
        with contextlib.suppress(OSError):  # the other end has closed the connection
            peer.connection.sendall(response)
        return False

    def _read_lines(self, peer: _Peer) -> bool:
        """Deliver the complete lines, and return whether their signatures were valid."""
        *lines, peer.buffer = peer.buffer.split(b"\n")
        for line in lines:
            signature, _, body = line.partition(b" ")
            expected_signature = _sign(
                self.address.key, b"rank", peer.nonce, peer.lines_received, body
            )
            if not hmac.compare_digest(signature, expected_signature):
                return False
            peer.lines_received += 1
            self._deliver(peer, json.loads(body))
        return len(peer.buffer) <= MAX_LINE_BYTES

    def _deliver(self, peer: _Peer, event: Event) -> None:
        peer.sender = {key: event[key] for key in ("rank", "agent") if key in event}
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
        if peer.sender:
            self._receive({**peer.sender, "hung_up": True, "link": peer.number})

    def _close_unsigned(self) -> None:
        """Close the connections without a signed line that are too old or too many."""
        now = time.monotonic()
        unsigned_peers = [peer for peer in self._peers.values() if not peer.sender]
        for position, peer in enumerate(unsigned_peers):
            if (
                now - peer.opened_s > UNSIGNED_TIMEOUT_S
                or position < len(unsigned_peers) - MAX_UNSIGNED_CONNECTIONS
            ):
                self._close(peer)


class Link:
    """A connection to the driver, with lines in both directions.

    Args:
        address: Address of the driver's ``HeartbeatServer``.

    Raises:
        OSError: The driver does not answer.
    """

    def __init__(self, address: Address) -> None:
        self._key = address.key
        target = (address.host, address.port)
        self.socket = socket.create_connection(target, timeout=SEND_TIMEOUT_S)
        self._buffer = b""
        self._lines_sent = self._lines_received = 0
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
        """Send one event.

        Raises:
            OSError: The connection has ended.
        """
        body = json.dumps(event).encode()
        line = _sign(self._key, b"rank", self._nonce, self._lines_sent, body) + b" " + body + b"\n"
        self._lines_sent += 1
        self.socket.sendall(line)

    def read(self) -> list[Event] | None:
        """Wait for bytes, and return the complete messages of the driver.

        Returns:
            None where the connection has ended or a signature is wrong; an empty list where nothing
            arrived within ``SEND_TIMEOUT_S``.
        """
        try:
            content = self.socket.recv(MAX_LINE_BYTES)
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
            expected_signature = _sign(
                self._key, b"driver", self._nonce, self._lines_received, body
            )
            if not hmac.compare_digest(signature, expected_signature):
                return None
            self._lines_received += 1
            messages.append(json.loads(body))
        return messages

    def close(self) -> None:
        """End the connection."""
        self.socket.close()


class HeartbeatClient:
    """A rank's side: a context manager that shows the driver that the rank lives.

    Args:
        address: Address of the driver's ``HeartbeatServer``, or None to send nothing.
        rank: Number of the rank that sends.
        disconnect_timeout: Seconds without the driver after which the process ends itself.
        clock: Function that returns seconds since any moment.
    """

    def __init__(
        self,
        address: Address | None,
        rank: int = 0,
        disconnect_timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._disconnect_timeout, self._clock = address, disconnect_timeout, clock
        self.rank = rank
        """Number of the rank that sends."""
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._next_event_s = 0.0
        self._moves = 0
        self._busy = False
        self._stop = threading.Event()

    def __enter__(self) -> HeartbeatClient:
        if self._address:
            self.send()
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        any(self.send(ended=True) for _ in range(3))  # until it arrives
        with self._lock:
            if self._link:
                self._link.close()

    @contextlib.contextmanager
    def long_operation(self) -> Iterator[None]:
        """Tell the driver that the operation in this block may take long without progress."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self.tick()

    def tick(self) -> None:
        """Count one more step of progress."""
        self._moves += 1

    def send_throttled(self, **event: Any) -> None:
        """Count one step of progress, and send the event unless the last one is too recent."""
        self.tick()
        if self._clock() >= self._next_event_s:
            self._next_event_s = self._clock() + EVENT_INTERVAL_S
            self.send(**event)

    def send(self, **event: Any) -> bool:
        """Send one event, and return whether the driver's machine accepted it."""
        if not self._address:
            return False
        identity = {"rank": self.rank, "pid": os.getpid(), "host": self._host}
        state = {"moves": self._moves, "busy": self._busy, "cpu": time.process_time()}
        with self._lock:
            try:
                if self._link is None:
                    self._link = Link(self._address)
                self._link.send({**identity, **state, **event})
            except OSError:
                if self._link:
                    self._link.close()
                self._link = None
                return False
        return True

    def _beat(self) -> None:
        """Send a sign of life several times within the timeout, at least every five seconds.

        End the process where the driver cannot be reached for longer than the timeout.
        """
        last_contact_s = self._clock()
        while not self._stop.wait(min(5.0, self._disconnect_timeout / 5)):
            if self.send():
                last_contact_s = self._clock()
            elif self._clock() - last_contact_s > self._disconnect_timeout:
                os._exit(ORPHAN_EXIT_CODE)


class WarningHandler(logging.Handler):
    """Log handler that sends warnings and errors to the driver, which shows each of them once.

    Args:
        client: Client of this rank.
    """

    def __init__(self, client: HeartbeatClient) -> None:
        super().__init__(logging.WARNING)
        self._client = client

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, unless it comes from one of ``LIBRARY_LOGGERS``."""
        if record.name.partition(".")[0] not in LIBRARY_LOGGERS:
            self._client.send(warning=record.getMessage()[:MAX_WARNING_CHARS])


def _sign(key: bytes, side: bytes, nonce: bytes, position: int, body: bytes) -> bytes:
    """Return the signature of a line for its position on its connection and its direction."""
    message = b"%b %b %d %b" % (side, nonce, position, body)
    return hmac.digest(key, message, "sha256").hex().encode()
