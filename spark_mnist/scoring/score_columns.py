"""Score columns: scores of a published version, computed in the executors. Runs on: driver.

Only the features cross to Python, in the form that ``feature_columns`` gives them; all other
columns stay on the JVM. The model travels as a broadcast of its checked files, so the requested
version scores the rows, whatever happens to the store before they are read. Shape letters: B = rows
of a batch, C = classes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark import cloudpickle
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_mnist import options
from spark_mnist.cluster import slots
from spark_mnist.core import plan
from spark_mnist.data import feature_columns
from spark_mnist.scoring import broadcast, evaluation, executor
from spark_mnist.store import manifests

logger = logging.getLogger(__name__)
SCORES, CLASS = "__spark_mnist_scores", "__spark_mnist_class"
"""Names of intermediate columns, unlike any of a user's."""
LEAST = 1e-37
"""Least probability whose logarithm counts: that of the smallest normal float32."""


def probabilities(
    df: DataFrame, saved: manifests.SavedModel, batch_size: int, mode: str = options.FAILFAST
) -> Column:
    """Return the class probabilities of each row, ``array<float>`` of C, computed lazily.

    Args:
        df: The DataFrame that has the features.
        saved: The version that scores.
        batch_size: Rows of one call of the model.
        mode: With ``DROPMALFORMED`` a row that cannot be used gets null.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The features do not fit.
    """
    return _score_column(df, saved, batch_size, mode, "array<float>", list)


def classes(
    df: DataFrame, saved: manifests.SavedModel, batch_size: int, mode: str = options.FAILFAST
) -> Column:
    """Return the class of highest probability, the first of equals, as an int.

    See ``probabilities`` for the arguments and the exceptions.
    """
    return _score_column(df, saved, batch_size, mode, "int", lambda scores: scores.argmax(axis=1))


def _score_column(
    df: DataFrame,
    saved: manifests.SavedModel,
    batch_size: int,
    mode: str,
    return_type: str,
    convert: Callable[[npt.NDArray[np.float32]], Any],
) -> Column:
    """Return a column of what ``convert`` makes of each row's class probabilities ``[B, C]``."""
    source = feature_columns.features(df, saved.input_spec, standardized=bool(saved.network.mean))
    read, encoding = feature_columns.reader(source), source.encoding
    drops_bad_rows = mode == options.DROPMALFORMED
    if drops_bad_rows:
        source = feature_columns.usable(source)
    _limit_batches(df.sparkSession, source)
    context = df.sparkSession.sparkContext
    # A broadcast is pickled by reference: a function of the user's script must travel by value.
    # PySpark ships its copy of cloudpickle without types, hence the ignore.
    model_fn = cloudpickle.dumps(saved.model_fn)  # type: ignore[no-untyped-call]
    weights = broadcast.send(context, saved.files[plan.WEIGHTS])
    identity = repr((saved.network, model_fn, weights.digest, encoding)).encode()
    spec = executor.ModelSpec(
        hashlib.sha256(identity).hexdigest(),
        saved.network,
        model_fn,
        weights,
        encoding,
        slots.task_cpus(context),
    )

    def score(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        return executor.scores(
            batches,
            spec,
            read=read,
            convert=convert,
            batch_size=batch_size,
            drops_bad_rows=drops_bad_rows,
        )

    return feature_columns.by_batch(score, return_type)(source.column)


def _limit_batches(spark: SparkSession, source: feature_columns.Source) -> None:
    """Lower the session's rows of a batch where executors could not hold a batch of such wide rows.

    The setting stays lower: the rows are read after this function returns.
    """
    if max_rows := feature_columns.arrow_rows(spark, source):
        logger.info("%s is %d from now on, as rows are wide", feature_columns.ARROW_ROWS, max_rows)
        spark.conf.set(feature_columns.ARROW_ROWS, max_rows)


def predicted_class(scores: Column) -> Column:
    """Return the class of highest probability, the first of equals, as an int."""
    first = F.call_function("array_position", scores, F.array_max(scores))
    return (first - 1).cast("int")


def predictions(
    df: DataFrame, class_column: Column, input_spec: plan.InputSpec, *, interpret: bool
) -> DataFrame:
    """Add ``prediction``, one-hot ``array<int>``, and if asked ``interpreted``, the class's name.

    The class is a column of its own first, so that Spark computes it once and not once for each
    element of the array.

    Args:
        df: The input.
        class_column: The class of each row, see ``classes``.
        input_spec: What the model reads, with the names of its classes.
        interpret: Whether to add the name.
    """
    label = F.col(CLASS)
    flags = F.array(*((label == number).cast("int") for number in range(input_spec.classes)))
    one_hot = F.when(label.isNotNull(), flags)
    name = class_name(label, input_spec)
    new_columns = [one_hot.alias("prediction"), name.alias("interpreted")]
    return (
        df.select("*", class_column.alias(CLASS))
        .select("*", *new_columns[: 1 + interpret])
        .drop(CLASS)
    )


def class_name(label: Column, input_spec: plan.InputSpec) -> Column:
    """Return the class as people read it: a number, or its name where classes have names."""
    if not input_spec.names:
        return label
    name = F.get(F.array(*map(F.lit, input_spec.names)), label)
    if not input_spec.has_integer_names:
        return name
    fits_int = all(-(2**31) <= int(number) < 2**31 for number in input_spec.names)
    return name.cast("int" if fits_int else "bigint")


def _cross_entropy(scores: Column, label: Column) -> Column:
    """Return the cross-entropy of one row."""
    return -F.log(F.greatest(F.get(scores, label).cast("double"), F.lit(LEAST)))


def evaluations(
    df: DataFrame,
    scores: Column,
    label: Column,
    *,
    by: str | None,
    rate: float,
    repeat: int,
    seed: int,
) -> list[evaluation.Cell]:
    """Measure ``repeat`` random shares of the rows in one pass: score once, then draw.

    Returns:
        The cells of each share and group, by label and predicted class.
    """
    group = F.lit(None) if by is None else feature_columns.column(df, by)[0]
    rows = df.select(scores.alias("scores"), label.alias("label"), group.alias("group")).select(
        "group",
        "label",
        predicted_class(F.col("scores")).alias("predicted"),
        _cross_entropy(F.col("scores"), F.col("label")).alias("loss"),
    )
    cells = (
        rows.withColumn("no", F.explode(F.sequence(F.lit(1), F.lit(repeat))))
        .where(F.rand(seed) < rate)
        .groupBy("no", "group", "label", "predicted")
        .agg(F.count("*").alias("rows"), F.sum("loss").alias("loss"))
    )
    return [evaluation.Cell(**row.asDict()) for row in cells.collect()]
