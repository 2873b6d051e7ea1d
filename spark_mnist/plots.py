"""Pictures of training and of predictions, drawn with matplotlib on the driver.

Each function returns a matplotlib ``Figure``, which a notebook shows and ``savefig`` keeps. No
state of pyplot is touched. Only what a picture shows is collected: counts, or a few rows.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.cluster import session
from spark_mnist.core import plan
from spark_mnist.data import feature_columns, labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure

LOSS, ACCURACY = "tab:red", "tab:blue"


def available() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def history(records: Sequence[plan.EpochRecord]) -> Figure:
    """Loss and accuracy by epoch, on twin axes; training solid, validation dashed.

    Raises:
        errors.VersionError: matplotlib is not installed.
    """
    figure: Figure = _figure()(figsize=(6.4, 4.0), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    epochs = [record.epoch for record in records]
    lines = []
    for axes, color, name in ((left, LOSS, "loss"), (right, ACCURACY, "accuracy")):
        axes.set_ylabel(name, color=color)
        axes.tick_params(axis="y", labelcolor=color)
        for prefix, style, words in (("", "-", "train"), ("val_", "--", "validation")):
            key = f"{prefix}{name}"
            means = [{**record.losses, **record.metrics} for record in records]
            if all(key in values for values in means):
                mark = "o" if len(epochs) == 1 else None
                values = [values[key] for values in means]
                label = f"{words} {name}"
                lines += axes.plot(epochs, values, style, color=color, marker=mark, label=label)
    left.set_xlabel("epoch")
    left.locator_params(axis="x", integer=True)
    left.legend(handles=lines, loc="center right")
    return figure


def confusion(predictions: DataFrame, label: str = "label") -> Figure:
    """How often each class was read as each: rows by label and predicted class.

    Args:
        predictions: What ``predict`` gave for rows that have a label. With ``interpret=True``
            classes that have names are shown by them.
        label: The column of classes.

    Raises:
        errors.MissingColumn: There are no predictions, or no label.
        errors.BadRows: Labels are none of the classes.
        errors.VersionError: matplotlib is not installed.
    """
    make = _figure()
    session.check_input(predictions)
    truth, guess = _classes(predictions, label)
    pairs = predictions.select(truth.alias("truth"), guess.alias("guess"))
    found = pairs.groupBy("truth", "guess").count().dropna().collect()
    names = sorted({name for row in found for name in (row["truth"], row["guess"])})
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), int)
    for pair in found:
        counts[place[pair["truth"]], place[pair["guess"]]] = pair["count"]
    side = 2.0 + 0.42 * len(names)
    figure: Figure = make(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), number in np.ndenumerate(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        text = str(number) if number else ""
        axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    return figure


def mistakes(
    predictions: DataFrame, label: str = "label", image: str = "image", count: int = 25
) -> Figure:
    """Digits that were read wrongly, each with its truth and the guess.

    Args:
        predictions: What ``predict`` gave for pictures that have a label.
        label: The column of classes.
        image: The column of pictures.
        count: How many to show at most.

    Raises:
        errors.MissingColumn: There are no predictions, no label or no pictures.
        errors.BadRows: Labels are none of the classes.
        errors.VersionError: matplotlib is not installed.
    """
    make = _figure()
    session.check_input(predictions)
    truth, guess = _classes(predictions, label)
    source = feature_columns.features(predictions, plan.InputSpec(features=(image,)))
    wrong = predictions.select(
        source.column.alias("image"), truth.alias("truth"), guess.alias("guess")
    ).where("truth != guess")
    rows: Any = wrong.limit(count).toPandas()
    pictures = feature_columns.reader(source)(rows["image"])
    columns = max(1, min(5, len(rows)))
    lines = max(1, -(-len(rows) // columns))
    figure: Figure = make(figsize=(1.3 * columns, 1.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, picture, was, read in zip(grid, pictures, rows["truth"], rows["guess"], strict=False):
        axes.imshow(picture.reshape(28, 28), cmap="gray_r", vmin=0, vmax=source.encoding.scale)
        axes.set_title(f"{was}, read as {read}", fontsize=9)
    if not len(rows):
        grid[0].text(0.5, 0.5, "no mistakes", ha="center", va="center")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _classes(predictions: DataFrame, label: str) -> tuple[Column, Column]:
    """The true and the predicted class of each row: names if there are any, else numbers."""
    if "interpreted" in predictions.columns:
        found, kind = feature_columns.column(predictions, "interpreted")
        truth, kind_of_truth = feature_columns.column(predictions, label)
        if isinstance(kind, T.StringType):
            return F.trim(truth.cast("string")), found
        if isinstance(kind_of_truth, T.NumericType) or (
            isinstance(kind_of_truth, T.StringType) and not _one_hot(predictions, truth)
        ):
            return labels.whole_as_text(predictions, label), found.cast("string")
    prediction, _ = feature_columns.column(predictions, "prediction")
    made = predictions.where(prediction.isNotNull())  # none for rows that DROPMALFORMED leaves out
    first = made.select(F.size(prediction).alias("classes")).first()
    input_spec = plan.InputSpec(label=label, classes=first["classes"] if first else 1)
    truth = labels.column(predictions, input_spec)
    if made.where(truth.isNull() & feature_columns.column(predictions, label)[0].isNotNull()).take(
        1
    ):
        raise errors.BadRows(
            f"column {label!r} has values that are no numbers of classes; if they are their names, "
            "predict with interpret=True"
        )
    return truth, F.array_position(prediction, 1).cast("int") - 1


def _one_hot(predictions: DataFrame, truth: Column) -> bool:
    """Whether a column of text has one-hot labels."""
    return not predictions.where(truth.contains(",")).isEmpty()


@functools.cache
def _figure() -> Any:
    """The class of our pictures; matplotlib is loaded when the first one is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise errors.VersionError(
            "pictures are drawn with matplotlib; install spark-mnist[plots]"
        ) from error

    class Picture(Figure):
        """A figure that notebooks show without pyplot."""

        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture
