"""Arrow batches: functions on them as functions on columns, and their rows as arrays of numpy.

Spark 4.1 and newer hands Arrow's arrays to Python as they are; before, it makes pandas of them,
which this module makes Arrow's again, so that a function is written once. Shape letters: B = rows
of a batch, W = numbers of a row. Runs on: driver, Spark task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import pandas_udf

from spark_mnist.core import requirements

BatchFunction = Callable[[Iterator[tuple[pa.Array, ...]]], Iterator[pa.Array]]
"""Function of the batches of one partition, of which each has an array a column."""


def by_batch(function: BatchFunction, return_type: str) -> Callable[..., Column]:
    """Turn a function on batches into a function on as many columns as it takes.

    Args:
        function: Gives an array of as many values as a batch has rows, for each batch in order.
        return_type: Spark type of the values.
    """
    if hasattr(F, "arrow_udf"):

        def run_on_arrow(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
            return function(map(_as_tuple, batches))

        run_on_arrow.__name__ = function.__name__  # Spark's plans and pages show it
        # The stubs demand functionType=, with which Spark would warn that annotations replace it.
        udf: Callable[..., Column] = F.arrow_udf(run_on_arrow, return_type)  # type: ignore[call-overload]
        return udf
    return _by_pandas_batch(function, return_type)


def _by_pandas_batch(function: BatchFunction, return_type: str) -> Callable[..., Column]:
    """Do the same by way of pandas."""

    def run_on_pandas(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        arrays = (tuple(map(pa.array, _as_tuple(columns))) for columns in batches)
        for result in function(arrays):
            yield result.to_pandas()

    run_on_pandas.__name__ = function.__name__
    # The stubs demand functionType= here, too.
    with warnings.catch_warnings():
        requirements.ignore_new_pandas()
        udf: Callable[..., Column] = pandas_udf(run_on_pandas, return_type)  # type: ignore[call-overload]
    return udf


def _as_tuple(columns: Any) -> tuple[Any, ...]:
    """Return the columns of a batch; of one column, Spark gives it alone."""
    return columns if isinstance(columns, tuple) else (columns,)


def _is_list(rows: pa.Array) -> bool:
    return bool(pa.types.is_list(rows.type) or pa.types.is_large_list(rows.type))


def row_lengths(rows: pa.Array) -> npt.NDArray[np.int64]:
    """Return the number of bytes, or of numbers, of each row ``[B]``; 0 where a row is null."""
    if pa.types.is_null(rows.type):
        return np.zeros(len(rows), np.int64)
    lengths = pc.list_value_length(rows) if _is_list(rows) else pc.binary_length(rows)
    array: npt.NDArray[Any] = lengths.fill_null(0).to_numpy(zero_copy_only=False)
    return array.astype(np.int64)


def numbers(rows: pa.Array) -> npt.NDArray[Any]:
    """Return the bytes, or the numbers, of all rows that are not null, in order ``[B * W]``.

    A number that is null is NaN.
    """
    if _is_list(rows):
        values: npt.NDArray[Any] = rows.flatten().to_numpy(zero_copy_only=False)
        return values
    rows = rows.drop_null().cast(pa.large_binary())
    if not len(rows):
        return np.empty(0, np.uint8)
    _, offsets, content = rows.buffers()
    ends = np.frombuffer(offsets, np.int64)[rows.offset : rows.offset + len(rows) + 1]
    return np.frombuffer(content or b"", np.uint8)[ends[0] : ends[-1]]


def packed(rows: pa.Array, dtype: str) -> pa.Array:
    """Return the bytes of each row's numbers as ``dtype``; null where the row is null.

    Args:
        rows: Binary rows, which stay as they are, or lists of numbers.
        dtype: Type of the numbers in the result, as numpy names it.
    """
    if not _is_list(rows):
        return rows.cast(pa.binary())
    content = numbers(rows).astype(dtype)
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(row_lengths(rows) * content.itemsize, out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    values = pa.Array.from_buffers(pa.binary(), len(rows), buffers)
    return pc.if_else(rows.is_valid(), values, None) if rows.null_count else values


def lists(values: npt.NDArray[Any]) -> pa.Array:
    """Return the rows of an array ``[B, W]`` as lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def spread(values: pa.Array, is_valid: pa.BooleanArray) -> pa.Array:
    """Return the values at the rows that are valid, in order, and null at the others."""
    flags = is_valid.to_numpy(zero_copy_only=False)
    return values.take(pa.array(np.cumsum(flags) - 1, mask=~flags))
