"""A rank's shard to batches. Runs on ranks.

A shard that fits the rank's memory for rows is read once and stays there as it was stored, one byte
a pixel where pixels came as bytes; every epoch draws a new order over all of it. A larger one is
read anew in every epoch, its row groups in a new order, and shuffled a part at a time. Either way
numbers become float32 in the graph. Shape letters: B = rows of a batch, M = rows of a part,
N = rows of the shard, W = numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from spark_mnist.core import plan, sharding
from spark_mnist.networks import registry
from spark_mnist.ranks import shard_reader
from spark_mnist.ranks.shard_reader import Part

VALIDATION_BATCH = 1024
CHUNK = 8192
"""Rows that are handled together, or read ahead, where nothing else says how many."""
ROW_OVERHEAD_BYTES = 64
"""Memory for each row beside its features: label, weight, place in the order, and their copies
while a new order is drawn."""
ALIGNMENT_BYTES = 64
"""What TensorFlow asks of the address of an array that it uses without a copy."""


class InMemory:
    """A shard in memory. Of what it gives, the last is to be used: all share one order of rows.

    Args:
        shards: Of all ranks.
        rows: Of this rank, used without a copy.
        dtype: Of the batches' features.
    """

    def __init__(self, shards: plan.Shards, rows: Part, dtype: str = registry.FLOAT32) -> None:
        self.shards, self._dtype = shards, dtype
        self._graphs: dict[tuple[int, int], tf.data.Dataset] = {}
        """Those made so far, by rows of a batch and number of batches: one serves all epochs."""
        with tf.device("CPU"):  # a GPU's memory is the model's
            self.features, self.labels = map(_tensor, rows)
            self._order = tf.Variable([], dtype=tf.int64, shape=[None])
            self._weights = tf.Variable([], dtype=tf.float32, shape=[None])

    def __len__(self) -> int:
        rows: int = self.labels.shape[0]
        return rows

    @property
    def nbytes(self) -> int:
        """Memory that the rows take."""
        return _row_bytes(self.shards) * len(self)

    def parts(self) -> Iterator[Part]:
        """All rows in order, some at a time."""
        for start in range(0, len(self), CHUNK):
            rows = slice(start, start + CHUNK)
            yield self.features[rows].numpy(), self.labels[rows].numpy()

    def training(
        self, sharding: sharding.RowSharding, *, rank: int, seed: int, epoch: int
    ) -> tf.data.Dataset:
        """One epoch: every row once in a new order, then padding up to the equal number of steps.

        Args:
            sharding: Of the training rows among the ranks.
            rank: Whose shard it is.
            seed: Of the order.
            epoch: Counted from 0 over the model's life.

        Returns:
            Batches of (features [B, W] float32, label [B] int32, weight [B] float32). A padding row
            weighs nothing; in the last step the others make up for it (see ``sharding``).
        """
        drawn = order(len(self), sharding, rank=rank, seed=seed, epoch=epoch)
        return self._batched(drawn, weights(len(self), sharding), sharding.batch_size)

    def validation(self) -> tf.data.Dataset:
        """Every row once, in order, in the same form as ``training``."""
        every = np.arange(len(self))
        return self._batched(every, np.ones(len(self), np.float32), VALIDATION_BATCH)

    def _batched(
        self, order: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], size: int
    ) -> tf.data.Dataset:
        self._order.assign(order)
        self._weights.assign(weights)
        key = size, -(-len(order) // size)
        if key not in self._graphs:
            self._graphs[key] = self._graph(*key)
        return self._graphs[key]

    def _graph(self, size: int, count: int) -> tf.data.Dataset:
        def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            part = slice(step * size, (step + 1) * size)
            index = self._order[part]
            rows = tf.gather(self.features, index)
            features = registry.numbers(rows, self.shards.encoding.scale, self._dtype)
            return features, tf.gather(self.labels, index), self._weights[part]

        return tf.data.Dataset.range(count).map(batch).prefetch(4)


class Streamed:
    """A shard that is read anew in each epoch; as ``InMemory`` but for the order.

    Args:
        files: Of this rank.
        memory: Bytes to do with. A quarter of it, but at least a file, is shuffled together: the
            next part is read and joined while the one before is used.
        dtype: Of the batches' features.
    """

    def __init__(
        self, files: shard_reader.RowGroups, memory: int, dtype: str = registry.FLOAT32
    ) -> None:
        self.shards, self._dtype = files.shards, dtype
        self.error: Exception | None = None
        """What was raised while TensorFlow asked for rows, since it tells only its own errors."""
        self._files = files
        self._part = memory // 4 // _row_bytes(files.shards)

    def __len__(self) -> int:
        return self._files.rows

    def parts(self) -> Iterator[Part]:
        """All rows in order, a file at a time."""
        return self._files.parts(self._files.urls)

    def training(
        self, sharding: sharding.RowSharding, *, rank: int, seed: int, epoch: int
    ) -> tf.data.Dataset:
        """One epoch, as ``InMemory.training``: files in a new order, then the rows of a part."""
        random = np.random.default_rng((seed, epoch, rank))
        urls = self._files.urls
        mixed = [urls[number] for number in random.permutation(len(urls))]
        weight = weights(len(self), sharding)
        return self._batched(mixed, random.permutation, weight, sharding.batch_size)

    def validation(self) -> tf.data.Dataset:
        """Every row once, in order, in the same form as ``training``."""
        weight = np.ones(len(self), np.float32)
        return self._batched(self._files.urls, np.arange, weight, VALIDATION_BATCH)

    def _batched(
        self,
        urls: Sequence[str],
        draw: Callable[[int], npt.NDArray[np.int64]],
        weights: npt.NDArray[np.float32],
        size: int,
    ) -> tf.data.Dataset:
        def batches() -> Iterator[tuple[Any, Any, Any]]:
            self.error = None
            try:
                parts = _joined(self._files.parts(urls), self._part)
                yield from _padded(_cut(parts, draw, size), weights, size)
            except Exception as error:
                self.error = error
                raise

        encoding = self.shards.encoding
        kinds = (encoding.dtype, np.int32, np.float32)
        shapes = ((None, encoding.width), (None,), (None,))
        signature = tuple(map(tf.TensorSpec, shapes, kinds))
        read = tf.data.Dataset.from_generator(batches, output_signature=signature)
        ahead = read.prefetch(max(1, CHUNK // size))

        def converted(x: Any, y: Any, w: Any) -> tuple[Any, Any, Any]:
            return registry.numbers(x, encoding.scale, self._dtype), y, w

        return ahead.map(converted).prefetch(4)


Shard = InMemory | Streamed


def read(
    shards: plan.Shards,
    *,
    rank: int,
    ranks: int,
    memory: int,
    moved: Callable[[], None] = lambda: None,
    dtype: str = registry.FLOAT32,
) -> Shard:
    """Find the rows of one rank, and read them where they fit.

    Args:
        shards: Of all ranks.
        rank: Whose rows.
        ranks: How many there are.
        memory: Bytes that the rank's rows may take.
        moved: Called after each row group that is read, as a sign of life.
        dtype: Of the batches' features.

    Raises:
        errors.ShardsLost: A file is not there, or not as it was written.
        errors.RowsLost: Petastorm gave other rows than the files' footers say.
    """
    files = shard_reader.RowGroups(shards, shards.urls[rank::ranks], rank, moved)
    if files.rows * _row_bytes(shards) > memory:
        return Streamed(files, memory, dtype)
    features = _aligned((files.rows, shards.encoding.width), shards.encoding.dtype)
    labels = _aligned((files.rows,), "int32")
    done = 0
    for some, of_some in files.parts(files.urls):
        rows = slice(done, done + len(of_some))
        features[rows], labels[rows] = some, of_some
        done = rows.stop
    return InMemory(shards, (features, labels), dtype)


def order(
    rows: int, sharding: sharding.RowSharding, *, rank: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Which rows of its shard a rank takes in an epoch; see ``InMemory.training``.

    Args:
        rows: Of the shard.
        sharding: Of the training rows among the ranks.
        rank: Whose shard it is.
        seed: Of the order.
        epoch: Counted from 0 over the model's life.
    """
    drawn = np.random.default_rng((seed, epoch, rank)).permutation(rows)
    return np.resize(drawn, sharding.padded_rows)


def weights(rows: int, sharding: sharding.RowSharding) -> npt.NDArray[np.float32]:
    """The weights of the rows that a rank takes in an epoch; those of padding are 0."""
    found = np.ones(sharding.padded_rows, np.float32)
    found[-sharding.last_batch :] = sharding.last_weight
    found[rows:] = 0
    return found


def _row_bytes(shards: plan.Shards) -> int:
    """Return the memory that a row takes."""
    return shards.encoding.row_bytes + ROW_OVERHEAD_BYTES


def _aligned(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Make an array that TensorFlow can use without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)


def _tensor(array: npt.NDArray[Any]) -> tf.Tensor:
    """Make a tensor of an array, without a copy where its address allows."""
    if array.ctypes.data % ALIGNMENT_BYTES or not array.size:
        return tf.constant(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _join(parts: list[Part]) -> Part:
    """One part of several, which are given away: those of a shard are large."""
    if len(parts) == 1:
        return parts.pop()
    features, labels = zip(*parts, strict=True)
    parts.clear()
    return np.concatenate(features), np.concatenate(labels)


def _joined(parts: Iterator[Part], rows: int) -> Iterator[Part]:
    """Join parts until each has so many rows, but for the last."""
    waiting: list[Part] = []
    for part in parts:
        waiting.append(part)
        del part  # it is large, and would be held while the next is read
        if sum(len(labels) for _, labels in waiting) >= rows:
            yield _join(waiting)
    if waiting:
        yield _join(waiting)


def _cut(
    parts: Iterator[Part], draw: Callable[[int], npt.NDArray[np.int64]], size: int
) -> Iterator[Part]:
    """Cut parts into batches; what is left over of one mixes with the next."""
    left: list[Part] = []
    for part in parts:
        features, labels = _join([*left, part])
        del part
        left, drawn = [], draw(len(labels))
        for start in range(0, len(drawn), size):
            rows = drawn[start : start + size]
            batch = features[rows], labels[rows]
            if len(rows) == size:
                yield batch
            else:
                left = [batch]
        del features, labels
    yield from left


def _padded(
    batches: Iterator[Part], weights: npt.NDArray[np.float32], size: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """Add weights to batches, and to the last the padding rows that have none."""
    last: Any = None
    for start in range(0, len(weights), size):
        weight = weights[start : start + size]
        last = features, labels = next(batches, last)
        if start + size >= len(weights):
            for _ in batches:  # to the end of the files, where their rows are compared
                pass
        if len(labels) != len(weight):
            features = np.resize(features, (len(weight), features.shape[1]))
            labels = np.resize(labels, len(weight))
        yield features, labels, weight
