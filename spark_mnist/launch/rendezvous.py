"""Rendezvous of the ranks: a store for the addresses that Gloo exchanges. Runs on: driver.

The key-value store serves the client of Horovod's Gloo in each rank: PUT, GET and DELETE of
``/scope/key`` in HTTP/1.0. Values are bytes that this module does not interpret. Horovod has a
server of the same kind, but that server's import costs the driver as much as the rest of a start,
and the server takes a port.
"""

from __future__ import annotations

import re

MAX_VALUE_BYTES = 1 << 20
"""Size of the longest value; a rank's address has some hundred bytes."""
MAX_HEADER_BYTES = 16 << 10
"""Size of the longest header of a request."""
END_OF_HEADER = b"\r\n\r\n"
REASON_PHRASES = {200: "OK", 400: "Bad Request", 404: "Not Found", 413: "Content Too Large"}


class Rendezvous:
    """Key-value store without its network: it takes requests and returns responses."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}

    def answer(self, request: bytes) -> bytes | None:
        """Answer an HTTP request.

        Args:
            request: Bytes of the request that have arrived.

        Returns:
            The response, after which the connection is to end; None where more must arrive.
        """
        header, separator, content = request.partition(END_OF_HEADER)
        request_line = re.match(rb"(GET|PUT|DELETE) (/\S+) HTTP/1\.[01]\r\n", request)
        if len(header) > MAX_HEADER_BYTES or (b"\n" in request and not request_line):
            return _response(400)
        if not separator or not request_line:
            return None
        method, path = request_line.groups()
        length = re.search(rb"\r\ncontent-length: *(\d{1,15})(\r|$)", header, re.IGNORECASE)
        size = int(length[1]) if length else 0
        if size > MAX_VALUE_BYTES:
            return _response(413)
        if len(content) < size:
            return None
        return self._execute(method, path, content[:size])

    def _execute(self, method: bytes, path: bytes, content: bytes) -> bytes:
        if method == b"PUT":
            self._values[path] = content
        elif method == b"DELETE":
            self._values.pop(path, None)
        elif path not in self._values:
            return _response(404)
        else:
            return _response(200, self._values[path])
        return _response(200)


def _response(status: int, content: bytes = b"") -> bytes:
    head = f"HTTP/1.0 {status} {REASON_PHRASES[status]}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content
