"""Broadcasts of models, in parts, from the driver to executors. Runs on: driver, Spark task.

Spark holds a broadcast whole in the heap of a JVM while it makes the broadcast, and a model may be
larger than that heap. Each part is small, and parts that find no place in memory lie on disk.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyspark import Broadcast, SparkContext

PART_BYTES = 16 << 20
"""Bytes of a part; the last part may be shorter."""

_broadcasts: weakref.WeakValueDictionary[tuple[str | None, str, int], Broadcast[bytes]] = (
    weakref.WeakValueDictionary()
)
"""Broadcasts that a DataFrame still uses, by application, digest and index of the part."""


@dataclass(frozen=True)
class Shipment:
    """A content in broadcast parts; equal to every other of the same content."""

    digest: str
    """SHA-256 of the content."""
    parts: tuple[Broadcast[bytes], ...] = field(compare=False)
    """Parts of the content, in order."""

    def unpack(self) -> bytes:
        """Return the content.

        Only Spark tasks call this method.
        """
        return b"".join(part.value for part in self.parts)


def split(content: bytes) -> Iterator[bytes]:
    """Yield the parts of a content, in order; an empty content has none."""
    for start in range(0, len(content), PART_BYTES):
        yield content[start : start + PART_BYTES]


def send(context: SparkContext, content: bytes) -> Shipment:
    """Broadcast a content, except parts that are broadcast already."""
    digest = hashlib.sha256(content).hexdigest()
    parts = []
    for index, part in enumerate(split(content)):
        key = (context.applicationId, digest, index)
        broadcast = _broadcasts.get(key)
        if broadcast is None:
            broadcast = _broadcasts[key] = context.broadcast(part)
        parts.append(broadcast)
    return Shipment(digest, tuple(parts))
