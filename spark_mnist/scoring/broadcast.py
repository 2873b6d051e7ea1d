"""Models on their way from the driver to executors, in parts. Runs on: driver, Spark task.

Spark holds a broadcast whole in the heap of a JVM while it is made, and a model may be larger than
that heap. Each part is small, and parts that find no place in memory lie on disk.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyspark import Broadcast, SparkContext

PART_BYTES = 16 << 20
"""Size of a part; the last one may be shorter."""

_sent: weakref.WeakValueDictionary[tuple[str | None, str, int], Broadcast[bytes]] = (
    weakref.WeakValueDictionary()
)
"""Broadcasts that a DataFrame still uses, by application, digest and place: sent once."""


@dataclass(frozen=True)
class Shipment:
    """A content on its way; equal to every other of the same content."""

    digest: str
    """SHA-256 of the content."""
    parts: tuple[Broadcast[bytes], ...] = field(compare=False)

    def unpack(self) -> bytes:
        """Return the content. In a task."""
        return b"".join(part.value for part in self.parts)


def split(content: bytes) -> Iterator[bytes]:
    """Yield the parts of a content, in order; none of nothing."""
    for start in range(0, len(content), PART_BYTES):
        yield content[start : start + PART_BYTES]


def send(context: SparkContext, content: bytes) -> Shipment:
    """Broadcast a content, unless it is on its way already."""
    digest = hashlib.sha256(content).hexdigest()
    parts = []
    for place, part in enumerate(split(content)):
        key = (context.applicationId, digest, place)
        broadcast = _sent.get(key)
        if broadcast is None:
            broadcast = _sent[key] = context.broadcast(part)
        parts.append(broadcast)
    return Shipment(digest, tuple(parts))
