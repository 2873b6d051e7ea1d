"""A rank's shard, through Petastorm, to batches. Runs on ranks.

The shard's row groups are read once and stay in memory as they were stored, one byte a pixel where
they came as bytes; every epoch draws a new order over all of them, and the numbers become float32
in the graph. Shape letters: B = rows of a batch, N = rows of the shard, W = numbers of a row.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
from petastorm import make_batch_reader
from petastorm.errors import NoDataAvailableError

from spark_mnist import errors, plan, schema, world

VALIDATION_BATCH = 1024


@dataclass(frozen=True)
class Shard:
    """One rank's rows in memory."""

    features: tf.Tensor
    """[N, W], as stored."""
    labels: tf.Tensor
    """[N] int32"""
    scale: float
    """What a stored number is divided by."""

    def __len__(self) -> int:
        return int(self.labels.shape[0])


def read(shards: plan.Shards, *, rank: int, ranks: int) -> Shard:
    """Read the row groups of one rank.

    Raises:
        errors.ShardsLost: A file is not there, or not as it was written.
        errors.RowsLost: Petastorm gave other rows than the files' footers say.
    """
    try:
        shard = _read(shards, rank, ranks)
        expected = _footer_rows(shards.urls[rank::ranks])
    except (OSError, pa.ArrowException, NoDataAvailableError) as error:
        raise errors.ShardsLost(f"rank {rank} cannot read its shard: {error}") from error
    if len(shard) != expected:
        raise errors.RowsLost(
            f"rank {rank} read {len(shard)} rows of its shard; its files' footers say {expected}"
        )
    return shard


def _read(shards: plan.Shards, rank: int, ranks: int) -> Shard:
    encoding = schema.Encoding(shards.dtype, shards.scale, shards.width)
    features = [np.empty((0, shards.width), shards.dtype)]
    labels = [np.empty(0, np.int32)]
    mine = shards.urls[rank::ranks]
    if mine:
        # The dummy pool reads in this thread: Petastorm's thread pool can end a pass early.
        with (
            _quiet(),
            make_batch_reader(
                list(mine),
                reader_pool_type="dummy",
                shuffle_row_groups=False,
                num_epochs=1,
            ) as reader,
        ):
            for group in reader:
                features.append(schema.unpack(group.features, encoding))
                labels.append(np.asarray(group.label, np.int32))
    tensors = tf.constant(np.concatenate(features)), tf.constant(np.concatenate(labels))
    return Shard(*tensors, shards.scale)


def training(
    shard: Shard, division: world.World, *, rank: int, seed: int, epoch: int
) -> tf.data.Dataset:
    """One epoch: every row once in a new order, then padding up to the equal number of steps.

    Returns:
        Batches of (features [B, W] float32, label [B] int32, weight [B] float32). A padding row
        weighs nothing; in the last step the others make up for it (see ``world``).
    """
    rows, weights = order(len(shard), division, rank=rank, seed=seed, epoch=epoch)
    return _batched(shard, rows, weights, division.batch_size)


def order(
    rows: int, division: world.World, *, rank: int, seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Which rows of its shard a rank takes in an epoch, and their weights; see ``training``.

    Args:
        rows: Of the shard.
        division: Of the training rows among the ranks.
        rank: Whose shard it is.
        seed: Of the order.
        epoch: Counted from 0 over the model's life.
    """
    drawn = np.random.default_rng((seed, epoch, rank)).permutation(rows)
    weights = np.ones(division.padded_rows, np.float32)
    weights[-division.last_batch :] = division.last_weight
    weights[rows:] = 0
    return np.resize(drawn, division.padded_rows), weights


def validation(shard: Shard) -> tf.data.Dataset:
    """Every row once, in order, in the same form as ``training``."""
    return _batched(shard, np.arange(len(shard)), np.ones(len(shard), np.float32), VALIDATION_BATCH)


def _batched(
    shard: Shard, order: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], size: int
) -> tf.data.Dataset:
    rows, weight = tf.constant(order), tf.constant(weights)

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        part = slice(step * size, (step + 1) * size)
        index = rows[part]
        features = tf.cast(tf.gather(shard.features, index), tf.float32) / shard.scale
        return features, tf.gather(shard.labels, index), weight[part]

    steps = -(-len(order) // size)
    return tf.data.Dataset.range(steps).map(batch).prefetch(4)


def _footer_rows(urls: tuple[str, ...]) -> int:
    rows = 0
    for url in urls:
        with fsspec.open(url) as file:
            rows += pq.read_metadata(file).num_rows
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the deprecation warnings and prints that Petastorm makes on every read."""
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
    ):
        warnings.simplefilter("ignore")
        yield
