"""Where the ranks leave each other their addresses: what Horovod's Gloo asks for. Runs on: driver.

A key-value store over HTTP, as Gloo's client in each rank speaks it: PUT, GET and DELETE of
``/scope/key``. Values are bytes that nobody here looks into. Horovod brings a server of the same
kind, whose import costs the driver as much as all else that a start needs.
"""

from __future__ import annotations

import threading
from http import server

READ_TIMEOUT_S = 3.0
"""Seconds in which a request must have arrived."""
MOST_BYTES = 1 << 20
"""Longest value; a rank's address is some hundred bytes."""


class _Handler(server.BaseHTTPRequestHandler):
    timeout = READ_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        value = self.server.values.get(self.path)
        self._answer(200 if value is not None else 404, value or b"")

    def do_PUT(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if length > MOST_BYTES:
            self._answer(413)
            return
        try:
            self.server.values[self.path] = self.rfile.read(length)
        except TimeoutError:
            self._answer(408)
            return
        self._answer(200)

    def do_DELETE(self) -> None:
        self.server.values.pop(self.path, None)
        self._answer(200)

    def _answer(self, status: int, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing of each request."""


class _Server(server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    values: dict[str, bytes]

    def handle_error(self, *_: object) -> None:
        """Print nothing of a rank that went away."""


class Rendezvous:
    """A context manager that listens while ranks find each other.

    Args:
        bind: The address to listen on.
    """

    def __init__(self, bind: str) -> None:
        self._server = _Server((bind, 0), _Handler)
        self._server.values = {}
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    def __enter__(self) -> Rendezvous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
