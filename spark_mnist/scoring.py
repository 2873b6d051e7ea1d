"""Applies a published version to rows, inside the executors, an Arrow batch at a time.

Only the features cross to Python, in the form that ``schema`` gave them; all other columns stay on
the JVM. The model travels as a broadcast of its checked files, so what was asked for is what
scores, whatever happens to the store before the rows are read. Shape letters: B = rows of a batch,
C = classes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark import cloudpickle
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_mnist import cluster, evaluation, manifests, options, plan, schema, shipment

logger = logging.getLogger(__name__)

Model = Callable[[npt.NDArray[np.generic]], npt.NDArray[np.float32]]
SCORES, CLASS = "__spark_mnist_scores", "__spark_mnist_class"
"""Names of columns on the way, unlike any of a user's."""
LEAST = 1e-37
"""Least probability whose logarithm counts, that of the smallest normal float32."""


def probabilities(
    df: DataFrame, saved: manifests.Saved, batch_size: int, mode: str = options.FAILFAST
) -> Column:
    """The class probabilities of each row, ``array<float>`` of C, lazily.

    Args:
        df: Has the features.
        saved: The version that scores.
        batch_size: Rows of one call of the model.
        mode: With ``DROPMALFORMED`` a row that cannot be used gets null.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The features do not fit.
    """
    return _scored(df, saved, batch_size, mode, "array<float>", list)


def classes(
    df: DataFrame, saved: manifests.Saved, batch_size: int, mode: str = options.FAILFAST
) -> Column:
    """The class of highest probability, the first of equals, as an int; see ``probabilities``."""
    return _scored(df, saved, batch_size, mode, "int", lambda scores: scores.argmax(axis=1))


def _scored(
    df: DataFrame,
    saved: manifests.Saved,
    batch_size: int,
    mode: str,
    returns: str,
    make: Callable[[npt.NDArray[np.float32]], Any],
) -> Column:
    """What ``make`` makes of the class probabilities ``[B, C]``, for each row."""
    source = schema.features(df, saved.reads, standardized=bool(saved.network.mean))
    read, encoding = schema.reader(source), source.encoding
    dropping = mode == options.DROPMALFORMED
    if dropping:
        source = schema.usable(source)
    _bound_batches(df.sparkSession, source)
    context = df.sparkSession.sparkContext
    # A broadcast is pickled by reference: a function of the user's script must travel by value.
    # PySpark ships its copy of cloudpickle without types, hence the ignore.
    make_network = cloudpickle.dumps(saved.make)  # type: ignore[no-untyped-call]
    weights = shipment.send(context, saved.files[plan.WEIGHTS])
    identity = repr((saved.network, make_network, weights.digest, encoding)).encode()
    scorer = _Scorer(
        hashlib.sha256(identity).hexdigest(),
        saved.network,
        make_network,
        weights,
        encoding,
        cluster.task_cpus(context),
    )

    def score(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        model = _model(scorer)
        for rows in batches:
            good = rows[rows.notna()] if dropping else rows
            features = read(good)
            scores = [
                model(features[start : start + batch_size])
                for start in range(0, len(features), batch_size)
            ]
            found = make(np.concatenate(scores)) if scores else []
            if len(good) < len(rows):
                each = iter(found)
                found = [next(each) if there else None for there in rows.notna()]
            yield pd.Series(found, dtype=object if len(good) < len(rows) else None)

    return schema.by_batch(score, returns)(source.column)


def _bound_batches(spark: SparkSession, source: schema.Source) -> None:
    """Lower a setting of the session where rows are so wide that executors could not hold a batch.

    It stays lower: the rows are read after this returns.
    """
    if rows := schema.arrow_rows(spark, source):
        logger.info("%s is %d from now on, as rows are wide", schema.ARROW_ROWS, rows)
        spark.conf.set(schema.ARROW_ROWS, rows)


def predicted(scores: Column) -> Column:
    """The class of highest probability, the first of equals, as an int."""
    first = F.call_function("array_position", scores, F.array_max(scores))
    return (first - 1).cast("int")


def predictions(df: DataFrame, found: Column, reads: plan.Input, *, interpret: bool) -> DataFrame:
    """Add ``prediction``, one-hot ``array<int>``, and if asked ``interpreted``, the class's name.

    The class is a column of its own first, so that Spark computes it once and not once for each
    element of the array.

    Args:
        df: The input.
        found: The class of each row, see ``classes``.
        reads: Of the model.
        interpret: Whether to add the name.
    """
    label = F.col(CLASS)
    numbers = F.array(*((label == number).cast("int") for number in range(reads.classes)))
    one_hot = F.when(label.isNotNull(), numbers)
    name = class_name(label, reads)
    added = [one_hot.alias("prediction"), name.alias("interpreted")]
    return df.select("*", found.alias(CLASS)).select("*", *added[: 1 + interpret]).drop(CLASS)


def class_name(label: Column, reads: plan.Input) -> Column:
    """Return the class as people read it: a number, or its name where classes have names."""
    if not reads.names:
        return label
    name = F.get(F.array(*map(F.lit, reads.names)), label)
    if not reads.numbered:
        return name
    small = all(-(2**31) <= int(number) < 2**31 for number in reads.names)
    return name.cast("int" if small else "bigint")


def cross_entropy(scores: Column, label: Column) -> Column:
    """The loss of one row."""
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
        The counts of each share and group by label and predicted class.
    """
    group = F.lit(None) if by is None else schema.column(df, by)[0]
    scored = df.select(scores.alias("scores"), label.alias("label"), group.alias("group")).select(
        "group",
        "label",
        predicted(F.col("scores")).alias("predicted"),
        cross_entropy(F.col("scores"), F.col("label")).alias("loss"),
    )
    drawn = (
        scored.withColumn("no", F.explode(F.sequence(F.lit(1), F.lit(repeat))))
        .where(F.rand(seed) < rate)
        .groupBy("no", "group", "label", "predicted")
        .agg(F.count("*").alias("rows"), F.sum("loss").alias("loss"))
    )
    return [evaluation.Cell(**row.asDict()) for row in drawn.collect()]


@dataclass(frozen=True)
class _Scorer:
    """What executors need to make a model; equal to every other of the same content."""

    digest: str
    network: plan.Network = field(compare=False)
    make_network: bytes = field(compare=False)
    """The user's function, pickled by the driver of this job."""
    weights: shipment.Shipment = field(compare=False)
    encoding: plan.Encoding = field(compare=False)
    threads: int = field(compare=False)


@contextlib.contextmanager
def _native_stderr_held_back() -> Iterator[None]:
    """Hold back what native code prints, and print it where an error follows.

    TensorFlow 2.21 greets with lines that no setting turns off, on the terminal of a local session.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(stderr, held_back.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@functools.lru_cache(maxsize=2)
def _model(scorer: _Scorer) -> Model:
    """Build the model, once for each Python worker; Spark uses these again."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # other workers use it, too
    if gpus := cluster.task_gpus():
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", gpus[0])
    with _native_stderr_held_back():
        import tensorflow as tf

    from spark_mnist import checkpoint, networks

    with contextlib.suppress(RuntimeError):  # already running: another model came first
        tf.config.threading.set_intra_op_parallelism_threads(scorer.threads)
        tf.config.threading.set_inter_op_parallelism_threads(scorer.threads)
    files = {plan.WEIGHTS: scorer.weights.unpack()}
    model = checkpoint.built(scorer.network, files, cloudpickle.loads(scorer.make_network))
    encoding = scorer.encoding

    def call(stored: tf.Tensor) -> tf.Tensor:
        dtype = networks.input_dtype(scorer.network)
        return model(networks.numbers(stored, encoding.scale, dtype), training=False)

    signature = [tf.TensorSpec((None, encoding.width), encoding.dtype)]
    compiled = tf.function(call, input_signature=signature)
    return lambda stored: np.asarray(compiled(stored))
