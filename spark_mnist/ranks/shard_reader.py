"""Reader of a rank's Parquet files through Petastorm, a row group at a time. Runs on: rank.

Shape letters: M = rows of a part, W = numbers of a row, K = numbers of a target.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from spark_mnist import errors
from spark_mnist.compat import petastorm
from spark_mnist.core import plan, retries

Part = tuple[npt.NDArray[Any], ...]
"""Features [M, W], as stored, classes [M] int32 or targets [M, K] float64, and where rows have
weights, these [M] float32."""


class RowGroups:
    """Files of one rank, each of them one row group.

    Args:
        shards: Shards of all ranks.
        urls: Files of this rank.
        rank: Number of this rank, for messages.
        tick: Called after each row group, as a sign of life.
    """

    def __init__(
        self, shards: plan.Shards, urls: Sequence[str], rank: int, tick: Callable[[], None]
    ) -> None:
        self.shards, self.urls, self._rank, self._tick = shards, urls, rank, tick
        with self._shards_lost():
            self.rows: int = sum(_footer(url).num_rows for url in urls)

    def parts(self, urls: Sequence[str]) -> Iterator[Part]:
        """Read files in the order of ``urls``, which are all files of this rank.

        Raises:
            errors.ShardsLost: A file is not there, or not as it was written.
            errors.RowsLost: Petastorm gave other rows than the files' footers say.
        """
        row_count = 0

        def make_part(group: Any) -> Part:
            nonlocal row_count
            row_count += len(group.label)
            self._check_row_count(row_count, row_count <= self.rows)
            self._tick()
            features = self.shards.encoding.unpack(group.features)
            dtype = np.float64 if self.shards.target_size else np.int32
            labels = np.asarray(group.label, dtype)
            if not self.shards.weighted:
                return features, labels
            return features, labels, np.asarray(group.weight, np.float32)

        with self._shards_lost():
            yield from _read(urls, make_part)
        self._check_row_count(row_count, row_count == self.rows)

    def _check_row_count(self, row_count: int, is_valid: bool) -> None:
        if not is_valid:
            raise errors.RowsLost(
                f"rank {self._rank} read {row_count} rows of its shard; its files' footers say "
                f"{self.rows}"
            )

    @contextlib.contextmanager
    def _shards_lost(self) -> Iterator[None]:
        """Raise ``errors.ShardsLost``, which names the rank, where the block cannot read."""
        try:
            yield
        except (OSError, pa.ArrowException, _no_data_error()) as error:
            raise errors.ShardsLost(f"rank {self._rank} cannot read its shard: {error}") from error


def _no_data_error() -> type[Exception]:
    """Return the error that Petastorm raises where there is nothing to read."""
    error: type[Exception] = petastorm.module("petastorm.errors").NoDataAvailableError
    return error


def _footer(url: str) -> pq.FileMetaData:
    def read() -> pq.FileMetaData:
        with fsspec.open(url) as file:
            return pq.read_metadata(file)

    return retries.call(f"read {url}", read)


def _read(urls: Sequence[str], make_part: Callable[[Any], Part]) -> Iterator[Part]:
    """Make a part of each row group that Petastorm reads, and keep no reference to it."""
    remaining_urls, delays = list(urls), iter(retries.DELAYS_S)
    while remaining_urls:
        try:
            for part in _read_once(remaining_urls, make_part):
                # A file is one row group, and row groups come in order.
                remaining_urls, delays = remaining_urls[1:], iter(retries.DELAYS_S)
                yield part
                del part  # it is large, and would be held while the next is read
            return
        except GeneratorExit:
            raise
        except Exception as error:  # of any type, as stores' clients have their own
            retries.wait(f"read {remaining_urls[0] if remaining_urls else urls[-1]}", error, delays)


def _read_once(urls: Sequence[str], make_part: Callable[[Any], Part]) -> Iterator[Part]:
    # The dummy pool reads in this thread: Petastorm's thread pool can end a pass early.
    options = {"reader_pool_type": "dummy", "shuffle_row_groups": False, "num_epochs": 1}
    with _silence():
        reader = petastorm.module().make_batch_reader(list(urls), **options)

    def next_part() -> Part | None:
        with _silence():
            group = next(reader, None)
        return None if group is None else make_part(group)

    try:
        yield from iter(next_part, None)
    finally:  # what the reader's own ``__exit__`` does, but for a line that it prints
        reader.stop()
        reader.join()


_SILENCE_LOCK = threading.Lock()
"""Lock held while ``_silence`` has replaced the process's stdout and warning filters."""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the deprecation warnings and prints that Petastorm makes on every read."""
    with (
        _SILENCE_LOCK,
        warnings.catch_warnings(),
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
    ):
        warnings.simplefilter("ignore")
        yield
