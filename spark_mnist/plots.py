"""Pictures of training and of predictions, drawn with matplotlib. Runs on: driver.

Each function returns a matplotlib ``Figure``, which a notebook shows and ``savefig`` saves. No
state of pyplot is touched. Only what a picture shows is collected: counts, or a few rows.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.cluster import session
from spark_mnist.core import plan
from spark_mnist.data import column_names, feature_columns, labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure

LOSS_COLOR, ACCURACY_COLOR = "tab:red", "tab:blue"


def available() -> bool:
    """Return whether matplotlib is installed, so that pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def history(records: Sequence[plan.EpochRecord]) -> Figure:
    """Draw loss and accuracy by epoch, on twin axes; training solid, validation dashed.

    Numbers have R2 in place of accuracy, and of several outputs the loss alone is drawn.

    Raises:
        errors.VersionError: matplotlib is not installed.
    """
    figure: Figure = _figure_class()(figsize=(6.4, 4.0), layout="constrained")
    left_axes = figure.subplots()
    names = {*records[0].metrics} if records else set()
    score = next((name for name in ("accuracy", "r2") if name in names), None)
    right_axes = left_axes.twinx() if score else None
    epochs = [record.epoch for record in records]
    lines = []
    for axes, color, name in (
        (left_axes, LOSS_COLOR, "loss"),
        (right_axes, ACCURACY_COLOR, score or ""),
    ):
        if axes is None:
            continue
        axes.set_ylabel(name, color=color)
        axes.tick_params(axis="y", labelcolor=color)
        for prefix, style, subset in (("", "-", "train"), ("val_", "--", "validation")):
            key = f"{prefix}{name}"
            means = [{**record.losses, **record.metrics} for record in records]
            if all(key in values for values in means):
                mark = "o" if len(epochs) == 1 else None
                values = [values[key] for values in means]
                label = f"{subset} {name}"
                lines += axes.plot(epochs, values, style, color=color, marker=mark, label=label)
    left_axes.set_xlabel("epoch")
    left_axes.locator_params(axis="x", integer=True)
    left_axes.legend(handles=lines, loc="center right")
    return figure


def confusion(predictions: DataFrame, label: str = "label") -> Figure:
    """Draw how many rows of each label were predicted as each class.

    Args:
        predictions: Result of ``predict`` for rows that have a label. With ``interpret=True``
            classes that have names are shown by their names.
        label: The column of classes.

    Raises:
        errors.MissingColumn: There are no predictions, or no label.
        errors.BadRows: Labels are none of the classes.
        errors.VersionError: matplotlib is not installed.
    """
    figure_class = _figure_class()
    session.check_input(predictions)
    truth, guess = _classes(predictions, label)
    pairs = predictions.select(truth.alias("truth"), guess.alias("guess"))
    cells = pairs.groupBy("truth", "guess").count().dropna().collect()
    names = sorted({name for row in cells for name in (row["truth"], row["guess"])}, key=_order)
    index = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), int)
    for cell in cells:
        counts[index[cell["truth"]], index[cell["guess"]]] = cell["count"]
    side = 2.0 + 0.42 * len(names)
    figure: Figure = figure_class(figsize=(side, side), layout="constrained")
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
    """Draw digits that were predicted wrongly, each with its label and its prediction.

    Args:
        predictions: Result of ``predict`` for pictures that have a label.
        label: The column of classes.
        image: The column of pictures.
        count: Most pictures to show.

    Raises:
        errors.MissingColumn: There are no predictions, no label or no pictures.
        errors.BadRows: Labels are none of the classes.
        errors.VersionError: matplotlib is not installed.
    """
    figure_class = _figure_class()
    session.check_input(predictions)
    truth, guess = _classes(predictions, label)
    source = feature_columns.features(predictions, plan.InputSpec(features=(image,)))
    wrong = predictions.select(
        source.column.alias("image"), truth.alias("truth"), guess.alias("guess")
    ).where("truth != guess")
    rows: Any = wrong.limit(count).toPandas()
    pictures = feature_columns.reader(source)(pa.array(rows["image"]))
    grid_columns = max(1, min(5, len(rows)))
    grid_rows = max(1, -(-len(rows) // grid_columns))
    figure: Figure = figure_class(
        figsize=(1.3 * grid_columns, 1.5 * grid_rows), layout="constrained"
    )
    grid = figure.subplots(grid_rows, grid_columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, picture, digit, prediction in zip(
        grid, pictures, rows["truth"], rows["guess"], strict=False
    ):
        axes.imshow(picture.reshape(28, 28), cmap="gray_r", vmin=0, vmax=source.encoding.scale)
        axes.set_title(f"{digit}, read as {prediction}", fontsize=9)
    if not len(rows):
        grid[0].text(0.5, 0.5, "no mistakes", ha="center", va="center")
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _order(name: Any) -> tuple[bool, int, str]:
    """Return the key by which classes are sorted: whole numbers as numbers, then texts."""
    text = str(name)
    is_number = plan.INTEGER_PATTERN.fullmatch(text) is not None
    return not is_number, int(text) if is_number else 0, text


def _classes(predictions: DataFrame, label: str) -> tuple[Column, Column]:
    """Return the true and the predicted class of each row: names if there are any, else numbers."""
    if "interpreted" in predictions.columns:
        interpreted, data_type = column_names.column(predictions, "interpreted")
        truth, truth_type = column_names.column(predictions, label)
        if isinstance(data_type, T.StringType):
            return F.trim(truth.cast("string")), interpreted
        if isinstance(truth_type, T.NumericType) or (
            isinstance(truth_type, T.StringType) and not _has_one_hot_labels(predictions, truth)
        ):
            return labels.whole_as_text(predictions, label), interpreted.cast("string")
    prediction, prediction_type = column_names.column(predictions, "prediction")
    is_flag = isinstance(prediction_type, T.IntegralType)  # of one of two classes
    if not is_flag and not isinstance(prediction_type, T.ArrayType):
        raise errors.UnreadableColumn(
            f"column 'prediction' is {prediction_type.simpleString()}, and this plot needs "
            "predicted classes"
        )
    rows = predictions.where(prediction.isNotNull())  # none for rows that DROPMALFORMED leaves out
    size = F.lit(2) if is_flag else F.size(prediction)
    first_row = rows.select(size.alias("classes")).first()
    input_spec = plan.InputSpec(label=label, classes=first_row["classes"] if first_row else 1)
    truth = labels.column(predictions, input_spec)
    if rows.where(truth.isNull() & column_names.column(predictions, label)[0].isNotNull()).take(1):
        raise errors.BadRows(
            f"column {label!r} has values that are not class numbers; if they are their names, "
            "predict with interpret=True"
        )
    return truth, prediction if is_flag else F.array_position(prediction, 1).cast("int") - 1


def _has_one_hot_labels(predictions: DataFrame, truth: Column) -> bool:
    """Return whether a column of text has one-hot labels."""
    return not predictions.where(truth.contains(",")).isEmpty()


@functools.cache
def _figure_class() -> Any:
    """Return the class of our pictures; matplotlib is loaded when the first one is drawn."""
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
