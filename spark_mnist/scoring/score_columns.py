"""Score columns: scores of a published version, computed in the executors. Runs on: driver.

Only the features cross to Python, in the form that ``feature_columns`` gives them; all other
columns stay on the JVM. The model travels as a broadcast of its checked files, so the requested
version scores the rows, whatever happens to the store before they are read. Shape letters: B = rows
of a batch, C = classes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_mnist import errors, options
from spark_mnist.cluster import slots
from spark_mnist.core import plan
from spark_mnist.data import arrow_batches, column_names, feature_columns, profile
from spark_mnist.scoring import broadcast, executor, measures
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
    return _score_column(df, saved, batch_size, mode, "array<float>", arrow_batches.lists)


def outputs(
    df: DataFrame, saved: manifests.SavedModel, batch_size: int, mode: str = options.FAILFAST
) -> Column:
    """Return all outputs of each row, ``array<double>`` of U, computed lazily.

    Probabilities of classes and labels come as they are, numbers in the units of the label. See
    ``probabilities`` for the arguments and the exceptions.
    """
    convert = _unit_converter(saved.network.heads)
    return _score_column(
        df,
        saved,
        batch_size,
        mode,
        "array<double>",
        lambda scores: arrow_batches.lists(convert(scores)),
    )


def outputs_and_losses(
    df: DataFrame,
    saved: manifests.SavedModel,
    batch_size: int,
    target: Column,
    losses: Mapping[str, Any],
) -> Column:
    """Return all outputs of each row, then the loss of each output, ``array<double>``.

    Args:
        df: The DataFrame that has the features, rows that can be used alone.
        saved: The version that scores.
        batch_size: Rows of one call of the model.
        target: Targets of each row, an array of doubles.
        losses: The user's own losses, by name of the output.
    """
    source, spec = _source_and_spec(df, saved, losses)
    read, convert = feature_columns.reader(source), _unit_converter(saved.network.heads)

    def score(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        return executor.outputs_and_losses(
            batches, spec, read=read, convert=convert, batch_size=batch_size
        )

    return arrow_batches.by_batch(score, "array<double>")(source.column, target)


def _unit_converter(
    heads: Sequence[plan.Output],
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """Return a function that makes outputs ``[B, U]`` those in the units of the labels."""
    scale = np.concatenate([output.deviation or np.ones(output.units) for output in heads])
    offset = np.concatenate([output.mean or np.zeros(output.units) for output in heads])

    def convert(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        numbers: npt.NDArray[np.float64] = scores.astype(np.float64) * scale + offset
        return numbers

    return convert


def classes(
    df: DataFrame, saved: manifests.SavedModel, batch_size: int, mode: str = options.FAILFAST
) -> Column:
    """Return the class of highest probability, the first of equals, as an int.

    See ``probabilities`` for the arguments and the exceptions.
    """
    return _score_column(
        df, saved, batch_size, mode, "int", lambda scores: pa.array(scores.argmax(axis=1), "int32")
    )


def _score_column(
    df: DataFrame,
    saved: manifests.SavedModel,
    batch_size: int,
    mode: str,
    return_type: str,
    convert: Callable[[npt.NDArray[np.float32]], pa.Array],
) -> Column:
    """Return a column of what ``convert`` makes of each row's class probabilities ``[B, C]``."""
    source, spec = _source_and_spec(df, saved)
    read = feature_columns.reader(source)
    drops_bad_rows = mode == options.DROPMALFORMED
    if drops_bad_rows:
        source = feature_columns.usable(source)

    def score(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        return executor.scores(
            batches,
            spec,
            read=read,
            convert=convert,
            batch_size=batch_size,
            drops_bad_rows=drops_bad_rows,
        )

    return arrow_batches.by_batch(score, return_type)(source.column)


def _source_and_spec(
    df: DataFrame, saved: manifests.SavedModel, losses: Mapping[str, Any] | None = None
) -> tuple[feature_columns.Source, executor.ModelSpec]:
    """Return the features of a DataFrame, and what executors need to score them."""
    source = feature_columns.features(df, saved.input_spec, standardized=bool(saved.network.mean))
    encoding = source.encoding
    feature_columns.limit_batches(
        df.sparkSession, feature_columns.arrow_rows(df.sparkSession, source)
    )
    context = df.sparkSession.sparkContext
    # A broadcast is pickled by reference: a function of the user's script must travel by value.
    model_fn = cloudpickle.dumps(saved.model_fn)
    weights = broadcast.send(context, saved.files[plan.WEIGHTS])
    pickled_losses = cloudpickle.dumps(losses or {})
    identity = repr((saved.network, model_fn, weights.digest, encoding, pickled_losses)).encode()
    spec = executor.ModelSpec(
        hashlib.sha256(identity).hexdigest(),
        saved.network,
        model_fn,
        weights,
        encoding,
        slots.task_cpus(context),
        pickled_losses,
    )
    return source, spec


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
    name = class_name(label, input_spec)
    new_columns = [
        _one_hot(label, input_spec.classes).alias("prediction"),
        name.alias("interpreted"),
    ]
    return (
        df.select("*", class_column.alias(CLASS))
        .select("*", *new_columns[: 1 + interpret])
        .drop(CLASS)
    )


def _one_hot(label: Column, classes: int) -> Column:
    """Return a class as flags, ``array<int>``; null where the class is null."""
    flags = F.array(*((label == number).cast("int") for number in range(classes)))
    return F.when(label.isNotNull(), flags)


def output_columns(
    outputs: Sequence[plan.Output], *, interpret: bool, probabilities: bool
) -> list[str]:
    """Return the names of the columns that ``output_predictions`` adds, in order.

    Raises:
        errors.OptionError: Probabilities are asked for, and no output has any.
    """
    probable = [output for output in outputs if output.task != plan.REGRESSION]
    if probabilities and not probable:
        raise errors.OptionError(
            f"probabilities=true is for classes and labels, and task={plan.REGRESSION} has none"
        )
    names = []
    for output in outputs:
        suffix = f"_{output.name}" if output.name else ""
        names.append(f"prediction{suffix}")
        if interpret and output in probable:
            names.append(f"interpreted{suffix}")
        if probabilities and output in probable:
            names.append(f"probability{suffix}")
    return names


def output_predictions(
    df: DataFrame,
    scores: Column,
    outputs: Sequence[plan.Output],
    *,
    interpret: bool,
    probabilities: bool,
) -> DataFrame:
    """Add the predictions of each output; see ``api.predict`` for their types.

    Args:
        df: The input.
        scores: Outputs of each row, see ``outputs``.
        outputs: Outputs of the network.
        interpret: Whether to add names of classes and labels.
        probabilities: Whether to add probabilities of classes and labels.
    """
    names = output_columns(outputs, interpret=interpret, probabilities=probabilities)
    columns, start = [], 0
    for output in outputs:
        output_scores = F.slice(F.col(SCORES), start + 1, output.units)
        columns.append(prediction(output_scores, output))
        if interpret and output.task != plan.REGRESSION:
            columns.append(_interpreted(output_scores, output))
        if probabilities and output.task != plan.REGRESSION:
            columns.append(probability(output_scores, output).cast("array<float>"))
        start += output.units
    return (
        df.select("*", scores.alias(SCORES))
        .select("*", *(column.alias(name) for column, name in zip(columns, names, strict=True)))
        .drop(SCORES)
    )


def prediction(scores: Column, output: plan.Output) -> Column:
    """Return what an output predicts: flags of classes or labels, a class 0 or 1, or numbers."""
    if output.task == plan.CLASSIFICATION:
        return _one_hot(measures.predicted_class(scores), output.size)
    if output.task == plan.BINARY:
        return (F.get(scores, 0) > plan.THRESHOLD).cast("int")
    if output.task == plan.MULTILABEL:
        return F.transform(scores, lambda number: (number > plan.THRESHOLD).cast("int"))
    return F.get(scores, 0) if output.size == 1 else scores


def probability(scores: Column, output: plan.Output) -> Column:
    """Return the probability of each class or label, an array."""
    if output.task != plan.BINARY:
        return scores
    one = F.get(scores, 0)
    return F.when(one.isNotNull(), F.array(1 - one, one))


def _interpreted(scores: Column, output: plan.Output) -> Column:
    """Return the predicted class or labels as people read them."""
    if output.task != plan.MULTILABEL:
        label = (
            measures.predicted_class(scores)
            if output.task == plan.CLASSIFICATION
            else prediction(scores, output)
        )
        return class_name(label, output)
    names = F.array(*map(F.lit, output.names or range(output.size)))
    flags = F.arrays_zip(names.alias("name"), scores.alias("score"))
    present = F.filter(flags, lambda each: each["score"] > plan.THRESHOLD)
    return F.when(scores.isNotNull(), F.transform(present, lambda each: each["name"]))


def class_name(label: Column, input_spec: plan.InputSpec | plan.Output) -> Column:
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
) -> list[measures.Cell]:
    """Measure ``repeat`` random samples of the rows in one pass: score once, then draw.

    Returns:
        The cells of each sample and group, by label and predicted class.
    """
    group = group_column(df, by)
    rows = df.select(scores.alias("scores"), label.alias("label"), group.alias("group")).select(
        "group",
        "label",
        measures.predicted_class(F.col("scores")).alias("predicted"),
        _cross_entropy(F.col("scores"), F.col("label")).alias("loss"),
    )
    cells = (
        draw(rows, rate=rate, repeat=repeat, seed=seed)
        .groupBy("no", "group", "label", "predicted")
        .agg(F.count("*").alias("rows"), F.sum("loss").alias("loss"))
    )
    return [measures.Cell(**row.asDict()) for row in cells.collect()]


def measurable(
    row_profile: profile.RowProfile,
    saved: manifests.SavedModel,
    batch_size: int,
    *,
    losses: Mapping[str, Any],
    by: str | None,
) -> DataFrame:
    """Return ``group``, ``scores`` and ``target`` of the rows, as ``measures`` takes them.

    Args:
        row_profile: Profile of the rows.
        saved: The version that scores.
        batch_size: Rows of one call of the model.
        losses: The user's own losses, by name of the output.
        by: Column whose values are measured apart, if any.
    """
    rows, target = row_profile.usable, row_profile.label
    if not row_profile.target_size:
        target = F.array(target.cast("double"))
    scores = outputs_and_losses(rows, saved, batch_size, target, losses)
    return rows.select(
        group_column(rows, by).alias("group"),
        scores.alias(measures.SCORES),
        target.alias(measures.TARGET),
    )


def group_column(df: DataFrame, by: str | None) -> Column:
    """Return the column whose values are measured apart; null where there is none."""
    return F.lit(None) if by is None else column_names.column(df, by)[0]


def draw(rows: DataFrame, *, rate: float, repeat: int, seed: int) -> DataFrame:
    """Return random samples of the rows; the column ``no`` has the number of the sample, from 1."""
    return rows.withColumn("no", F.explode(F.sequence(F.lit(1), F.lit(repeat)))).where(
        F.rand(seed) < rate
    )
