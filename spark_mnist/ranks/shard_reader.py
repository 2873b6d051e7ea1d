"""Reads the Parquet files of a rank through Petastorm, a row group at a time. Runs on ranks.

Shape letters: M = rows of a part, W = numbers of a row.
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

Part = tuple[npt.NDArray[Any], npt.NDArray[np.int32]]
"""Features [M, W], as stored, and labels [M]."""


class RowGroups:
    """The files of one rank, each one row group.

    Args:
        shards: Of all ranks.
        urls: Those of this rank.
        rank: Its number, for messages.
        moved: Called after each row group, as a sign of life.
    """

    def __init__(
        self, shards: plan.Shards, urls: Sequence[str], rank: int, moved: Callable[[], None]
    ) -> None:
        self.shards, self.urls, self._rank, self._moved = shards, urls, rank, moved
        with self._named():
            self.rows: int = sum(_footer(url).num_rows for url in urls)

    def parts(self, urls: Sequence[str]) -> Iterator[Part]:
        """Read all files, in the given order.

        Raises:
            errors.ShardsLost: A file is not there, or not as it was written.
            errors.RowsLost: Petastorm gave other rows than the files' footers say.
        """
        found = 0

        def part(group: Any) -> Part:
            nonlocal found
            found += len(group.label)
            self._check(found, found <= self.rows)
            self._moved()
            features = self.shards.encoding.unpack(group.features)
            return features, np.asarray(group.label, np.int32)

        with self._named():
            yield from _read(urls, part)
        self._check(found, found == self.rows)

    def _check(self, found: int, good: bool) -> None:
        if not good:
            raise errors.RowsLost(
                f"rank {self._rank} read {found} rows of its shard; its files' footers say "
                f"{self.rows}"
            )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, _no_data()) as error:
            raise errors.ShardsLost(f"rank {self._rank} cannot read its shard: {error}") from error


def _no_data() -> type[Exception]:
    """Return the error by which Petastorm says that there is nothing to read."""
    error: type[Exception] = petastorm.module("petastorm.errors").NoDataAvailableError
    return error


def _footer(url: str) -> pq.FileMetaData:
    def read() -> pq.FileMetaData:
        with fsspec.open(url) as file:
            return pq.read_metadata(file)

    return retries.call(f"read {url}", read)


def _read(urls: Sequence[str], part: Callable[[Any], Part]) -> Iterator[Part]:
    """Make a part of each row group, as Petastorm gives it; holds on to none of them."""
    left, tries = list(urls), iter(retries.DELAYS_S)
    while left:
        try:
            for some in _read_once(left, part):
                # A file is one row group, and they come in order.
                left, tries = left[1:], iter(retries.DELAYS_S)
                yield some
                del some  # it is large, and would be held while the next is read
            return
        except GeneratorExit:
            raise
        except Exception as error:  # of any type, as stores' clients have their own
            retries.wait(f"read {left[0] if left else urls[-1]}", error, tries)


def _read_once(urls: Sequence[str], part: Callable[[Any], Part]) -> Iterator[Part]:
    # The dummy pool reads in this thread: Petastorm's thread pool can end a pass early.
    options = {"reader_pool_type": "dummy", "shuffle_row_groups": False, "num_epochs": 1}
    with _quiet():
        opened = petastorm.module().make_batch_reader(list(urls), **options)
    with opened as reader:

        def following() -> Part | None:
            with _quiet():
                group = next(reader, None)
            return None if group is None else part(group)

        yield from iter(following, None)


_QUIET = threading.Lock()
"""Held while the process's stdout and warnings are not as they were."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the deprecation warnings and prints that Petastorm makes on every read."""
    with (
        _QUIET,
        warnings.catch_warnings(),
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
    ):
        warnings.simplefilter("ignore")
        yield
