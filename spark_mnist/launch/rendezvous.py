"""Where the ranks leave each other their addresses: what Horovod's Gloo asks for. Runs on: driver.

A key-value store as Gloo's client in each rank speaks to it: PUT, GET and DELETE of ``/scope/key``
in HTTP/1.0. Values are bytes that nobody here looks into. Horovod brings a server of the same kind,
whose import costs the driver as much as all else that a start needs, and which takes a port.
"""

from __future__ import annotations

import re

MOST_BYTES = 1 << 20
"""Longest value; a rank's address is some hundred bytes."""
MOST_HEADER_BYTES = 16 << 10
"""Longest header of a request."""
END_OF_HEADER = b"\r\n\r\n"
STATUS = {200: "OK", 400: "Bad Request", 404: "Not Found", 413: "Content Too Large"}


class Rendezvous:
    """The store, without its network: takes requests and gives responses."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}

    def answer(self, request: bytes) -> bytes | None:
        """Answer an HTTP request.

        Args:
            request: What has arrived of it.

        Returns:
            The response, after which the connection is to end; None where more must arrive.
        """
        header, end, content = request.partition(END_OF_HEADER)
        first = re.match(rb"(GET|PUT|DELETE) (/\S+) HTTP/1\.[01]\r\n", request)
        if len(header) > MOST_HEADER_BYTES or (b"\n" in request and not first):
            return _response(400)
        if not end or not first:
            return None
        method, path = first.groups()
        length = re.search(rb"\r\ncontent-length: *(\d{1,15})(\r|$)", header, re.IGNORECASE)
        size = int(length[1]) if length else 0
        if size > MOST_BYTES:
            return _response(413)
        if len(content) < size:
            return None
        return self._do(method, path, content[:size])

    def _do(self, method: bytes, path: bytes, content: bytes) -> bytes:
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
    head = f"HTTP/1.0 {status} {STATUS[status]}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content
