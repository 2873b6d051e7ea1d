"""Batches that a rank trains on, read from its shard. Runs on: rank.

A shard that fits the rank's memory for rows is read once and stays in memory as it was stored, one
byte a pixel where pixels came as bytes; every epoch draws a new order over the whole shard. A
larger shard is read again in every epoch, its row groups in a new order, and shuffled a part at a
time. Steps take batches in their graph: rows in memory are gathered there, without a thread of
tf.data, which would want the core of the ranks' exchange. Shape letters: B = rows of a batch,
K = numbers of a target, M = rows of a part, N = rows of the shard, W = numbers of a row.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from spark_mnist.core import plan, sharding
from spark_mnist.networks import registry
from spark_mnist.ranks import shard_reader
from spark_mnist.ranks.shard_reader import Part

VALIDATION_BATCH = 1024
"""Rows of a validation batch."""
CHUNK_ROWS = 8192
"""Rows that are handled together, or read ahead, where nothing else says how many."""
ROW_OVERHEAD_BYTES = 64
"""Memory for each row beside its features and targets: class, weight, place in the order, and their
copies while a new order is drawn."""
ALIGNMENT_BYTES = 64
"""Alignment that TensorFlow requires of the address of an array that it uses without a copy."""


@dataclass(frozen=True)
class Batches:
    """Batches of one epoch, in order.

    A batch is (features, target, step weight [B] float32), and where rows have weights of their
    own, these [B] float32. Features are [B, W] float32, or a dictionary of several inputs; a target
    is a class [B] int32, or numbers [B, K] float64. A padding row has step weight 0; in the last
    step the other rows make up for it (see ``sharding``).
    """

    source: Any
    """Tensors, or an iterator, from which ``take`` makes batches."""
    take: Callable[[Any, tf.Tensor], tuple[Any, ...]]
    """Function of ``source`` and of a step, from 0, which returns the step's batch; for graphs."""
    steps: int
    """Number of steps of the epoch."""
    first: int = 0
    """Step of the first batch that is left."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        steps = range(self.first, self.steps)
        return (self.take(self.source, tf.constant(step)) for step in steps)


class Shard(Protocol):
    """Rows of one rank, as batches. Only the batches returned last are valid."""

    shards: plan.Shards
    """Shards of all ranks."""
    error: Exception | None
    """Error raised while TensorFlow asked for rows; TensorFlow reports only its own errors."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Return the memory that the rows take."""

    def parts(self) -> Iterator[Part]:
        """Yield all rows in order, a part at a time."""

    def training(
        self,
        row_sharding: sharding.RowSharding,
        *,
        rank: int,
        seed: int,
        epoch: int,
        first: int = 0,
    ) -> Batches:
        """Return one epoch: every row once in a new order, then padding to the equal step count.

        Args:
            row_sharding: Division of the training rows among the ranks.
            rank: Rank that the shard belongs to.
            seed: Seed of the order.
            epoch: Epoch, counted from 0 over the model's life.
            first: Steps of the epoch that were taken before.
        """

    def validation(self) -> Batches:
        """Return every row once, in order."""


class InMemory:
    """A shard in memory. Only the batches returned last are valid: all share one order of rows.

    Args:
        shards: Shards of all ranks.
        rows: Rows of this rank, used without a copy.
        dtype: Type of the batches' features.
        prefetch: Whether to gather rows ahead, as a GPU computes meanwhile.
    """

    def __init__(
        self,
        shards: plan.Shards,
        rows: Part,
        dtype: str = registry.FLOAT32,
        *,
        prefetch: bool = False,
    ) -> None:
        self.shards, self._dtype, self._prefetch = shards, dtype, prefetch
        self.error: Exception | None = None
        with tf.device("CPU"):  # a GPU's memory is the model's
            self.features, self.labels, *self._row_weights = map(_tensor, rows)
            self._order = tf.Variable([], dtype=tf.int64, shape=[None])
            self._weights = tf.Variable([], dtype=tf.float32, shape=[None])
            self._encoding = _with_tensors(shards.encoding, dtype)

    def __len__(self) -> int:
        rows: int = self.labels.shape[0]
        return rows

    @property
    def nbytes(self) -> int:
        """Return the memory that the rows take."""
        return _row_bytes(self.shards) * len(self)

    def parts(self) -> Iterator[Part]:
        """Yield all rows in order, at most ``CHUNK_ROWS`` at a time."""
        for start in range(0, len(self), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            tensors = (self.features, self.labels, *self._row_weights)
            yield tuple(tensor[rows].numpy() for tensor in tensors)

    def training(
        self,
        row_sharding: sharding.RowSharding,
        *,
        rank: int,
        seed: int,
        epoch: int,
        first: int = 0,
    ) -> Batches:
        """Return one epoch, in a new order over all rows of the shard; see ``Shard``."""
        row_order = order(len(self), row_sharding, rank=rank, seed=seed, epoch=epoch)
        row_weights = weights(len(self), row_sharding)
        return self._batches(row_order, row_weights, row_sharding.batch_size, first)

    def validation(self) -> Batches:
        """Return every row once, in order."""
        row_order = np.arange(len(self))
        return self._batches(row_order, np.ones(len(self), np.float32), VALIDATION_BATCH)

    def _batches(
        self,
        row_order: npt.NDArray[np.int64],
        row_weights: npt.NDArray[np.float32],
        size: int,
        first: int = 0,
    ) -> Batches:
        self._order.assign(row_order)
        self._weights.assign(row_weights)
        steps = -(-len(row_order) // size)
        batch_size = tf.constant(size)
        if not self._prefetch:
            return Batches(batch_size, self._gather, steps, first)
        numbers = tf.data.Dataset.range(first, steps, output_type=tf.int32)
        batches = numbers.map(lambda step: self._gather(batch_size, step)).prefetch(4)
        return Batches(iter(batches), _next, steps, first)

    def _gather(self, size: tf.Tensor, step: tf.Tensor) -> tuple[Any, ...]:
        """Gather the batch of a step, of ``size`` rows at most."""
        with tf.device("CPU"):  # where the rows are
            positions = slice(step * size, (step + 1) * size)
            index = self._order[positions]
            rows = tf.gather(self.features, index)
            row_weights = [tf.gather(weights, index) for weights in self._row_weights]
            labels = tf.gather(self.labels, index)
            step_weights = self._weights[positions]
        features = registry.inputs(rows, self._encoding, self._dtype)
        return features, labels, step_weights, *row_weights


class Streamed:
    """A shard that is read again in each epoch; like ``InMemory`` except for the order.

    Args:
        files: Files of this rank.
        memory: Bytes that may be used. A quarter of them, but at least a file, is shuffled
            together: the next part is read and joined while the previous part is used.
        dtype: Type of the batches' features.
    """

    def __init__(
        self, files: shard_reader.RowGroups, memory: int, dtype: str = registry.FLOAT32
    ) -> None:
        self.shards, self._dtype = files.shards, dtype
        self.error: Exception | None = None
        self.nbytes = memory
        self._files = files
        self._part_rows = memory // 4 // _row_bytes(files.shards)

    def __len__(self) -> int:
        return self._files.rows

    def parts(self) -> Iterator[Part]:
        """Yield all rows in order, a file at a time."""
        return self._files.parts(self._files.urls)

    def training(
        self,
        row_sharding: sharding.RowSharding,
        *,
        rank: int,
        seed: int,
        epoch: int,
        first: int = 0,
    ) -> Batches:
        """Return one epoch: files in a new order, then rows of a part; see ``Shard``."""
        random = np.random.default_rng((seed, epoch, rank))
        urls = self._files.urls
        epoch_urls = [urls[number] for number in random.permutation(len(urls))]
        row_weights = weights(len(self), row_sharding)
        size = row_sharding.batch_size
        return self._batches(epoch_urls, random.permutation, row_weights, size, first)

    def validation(self) -> Batches:
        """Return every row once, in order."""
        row_weights = np.ones(len(self), np.float32)
        return self._batches(self._files.urls, np.arange, row_weights, VALIDATION_BATCH)

    def _batches(
        self,
        urls: Sequence[str],
        draw_order: Callable[[int], npt.NDArray[np.int64]],
        row_weights: npt.NDArray[np.float32],
        size: int,
        first: int = 0,
    ) -> Batches:
        def read_batches() -> Iterator[tuple[Any, ...]]:
            self.error = None
            try:
                parts = _join_parts(self._files.parts(urls), self._part_rows)
                batches = _pad_batches(_split_parts(parts, draw_order, size), row_weights, size)
                yield from itertools.islice(batches, first, None)
            except Exception as error:
                self.error = error
                raise

        encoding, target_size = self.shards.encoding, self.shards.target_size
        features = tf.TensorSpec((None, encoding.width), encoding.dtype)
        numbers = tf.TensorSpec((None, target_size), tf.float64)
        weight = tf.TensorSpec((None,), tf.float32)
        labels = numbers if target_size else tf.TensorSpec((None,), tf.int32)
        signature = (features, labels, weight, *[weight] * self.shards.weighted)
        dataset = tf.data.Dataset.from_generator(read_batches, output_signature=signature)
        prefetched_dataset = dataset.prefetch(max(1, CHUNK_ROWS // size))

        def convert(x: Any, *others: Any) -> tuple[Any, ...]:
            return registry.inputs(x, encoding, self._dtype), *others

        converted_dataset = prefetched_dataset.map(convert).prefetch(4)
        return Batches(iter(converted_dataset), _next, -(-len(row_weights) // size), first)


def _next(iterator: Any, step: tf.Tensor) -> tuple[Any, ...]:
    """Take the next batch on this thread; ``next`` would wake up another thread to take it."""
    (resource,) = tf.nest.flatten(iterator, expand_composites=True)
    specs = tf.nest.flatten(iterator.element_spec)
    batch = tf.raw_ops.IteratorGetNextSync(
        iterator=resource,
        output_types=[spec.dtype for spec in specs],
        output_shapes=[spec.shape for spec in specs],
    )
    packed: tuple[Any, ...] = tf.nest.pack_sequence_as(iterator.element_spec, batch)
    return packed


def read(
    shards: plan.Shards,
    *,
    rank: int,
    ranks: int,
    memory: int,
    on_row_group: Callable[[], None] = lambda: None,
    dtype: str = registry.FLOAT32,
    prefetch: bool = False,
) -> Shard:
    """Find the rows of one rank, and read them where they fit into memory.

    Args:
        shards: Shards of all ranks.
        rank: Rank whose rows are read.
        ranks: Number of ranks.
        memory: Bytes that the rank's rows may take.
        on_row_group: Called after each row group that is read, as a sign of life.
        dtype: Type of the batches' features.
        prefetch: Whether rows in memory are gathered ahead, as a GPU computes meanwhile.

    Raises:
        errors.ShardsLost: A file is not there, or not as it was written.
        errors.RowsLost: Petastorm gave other rows than the files' footers say.
    """
    files = shard_reader.RowGroups(shards, shards.urls[rank::ranks], rank, on_row_group)
    if files.rows * _row_bytes(shards) > memory:
        return Streamed(files, memory, dtype)
    layout: list[tuple[tuple[int, ...], str]] = [((shards.encoding.width,), shards.encoding.dtype)]
    layout.append(((shards.target_size,), "float64") if shards.target_size else ((), "int32"))
    layout += [((), "float32")] * shards.weighted
    arrays = tuple(_aligned_array((files.rows, *shape), dtype) for shape, dtype in layout)
    start = 0
    for part in files.parts(files.urls):
        rows = slice(start, start + len(part[0]))
        for array, values in zip(arrays, part, strict=True):
            array[rows] = values
        start = rows.stop
    return InMemory(shards, arrays, dtype, prefetch=prefetch)


def order(
    rows: int, row_sharding: sharding.RowSharding, *, rank: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Return the order in which a rank takes the rows of its shard; see ``Shard.training``.

    Args:
        rows: Number of rows of the shard.
        row_sharding: Division of the training rows among the ranks.
        rank: Rank that the shard belongs to.
        seed: Seed of the order.
        epoch: Epoch, counted from 0 over the model's life.
    """
    permutation = np.random.default_rng((seed, epoch, rank)).permutation(rows)
    return np.resize(permutation, row_sharding.padded_rows)


def weights(rows: int, row_sharding: sharding.RowSharding) -> npt.NDArray[np.float32]:
    """Return the weights of the rows that a rank takes in an epoch; padding rows have weight 0."""
    row_weights = np.ones(row_sharding.padded_rows, np.float32)
    row_weights[-row_sharding.last_batch :] = row_sharding.last_weight
    row_weights[rows:] = 0
    return row_weights


def _row_bytes(shards: plan.Shards) -> int:
    """Return the memory that a row takes."""
    return shards.encoding.row_bytes + shards.label_bytes + ROW_OVERHEAD_BYTES


def _with_tensors(encoding: plan.Encoding, dtype: str) -> plan.Encoding:
    """Return an encoding whose scales are tensors.

    Of a plain number TensorFlow's graph would take the reciprocal, and round the features otherwise
    than a shard that is streamed.
    """
    parts = tuple((name, _with_tensors(part, registry.FLOAT32)) for name, part in encoding.parts)
    return dataclasses.replace(encoding, scale=tf.constant(encoding.scale, dtype), parts=parts)


def _aligned_array(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Return an uninitialized array that TensorFlow can use without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)


def _tensor(array: npt.NDArray[Any]) -> tf.Tensor:
    """Return a tensor of an array, without a copy where the array's address allows."""
    if array.ctypes.data % ALIGNMENT_BYTES or not array.size:
        return tf.constant(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _join(parts: list[Part]) -> Part:
    """Join several parts and empty their list, since the parts of a shard are large."""
    if len(parts) == 1:
        return parts.pop()
    columns = [*zip(*parts, strict=True)]
    parts.clear()
    return tuple(np.concatenate(columns.pop(0)) for _ in range(len(columns)))


def _join_parts(parts: Iterator[Part], rows: int) -> Iterator[Part]:
    """Join parts until each part has at least ``rows`` rows, except for the last part."""
    buffer: list[Part] = []
    for part in parts:
        buffer.append(part)
        del part  # it is large, and would be held while the next is read
        if sum(len(labels) for _, labels, *_ in buffer) >= rows:
            yield _join(buffer)
    if buffer:
        yield _join(buffer)


def _split_parts(
    parts: Iterator[Part], draw_order: Callable[[int], npt.NDArray[np.int64]], size: int
) -> Iterator[Part]:
    """Split parts into batches; the remainder of a part mixes with the next part."""
    remainder: list[Part] = []
    for part in parts:
        arrays = _join([*remainder, part])
        del part
        remainder, row_order = [], draw_order(len(arrays[0]))
        for start in range(0, len(row_order), size):
            rows = row_order[start : start + size]
            batch = tuple(array[rows] for array in arrays)
            if len(rows) == size:
                yield batch
            else:
                remainder = [batch]
        del arrays
    yield from remainder


def _pad_batches(
    batches: Iterator[Part], row_weights: npt.NDArray[np.float32], size: int
) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """Add step weights to batches, and to the last batch the padding rows of weight 0."""
    last_batch: Any = None
    for start in range(0, len(row_weights), size):
        batch_weights = row_weights[start : start + size]
        last_batch = batch = next(batches, last_batch)
        if start + size >= len(row_weights):
            for _ in batches:  # to the end of the files, where their rows are compared
                pass
        rows = len(batch_weights)
        if len(batch[0]) != rows:
            batch = tuple(np.resize(array, (rows, *array.shape[1:])) for array in batch)
        features, labels, *others = batch
        yield features, labels, batch_weights, *others
