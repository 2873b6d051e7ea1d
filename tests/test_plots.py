"""Pictures by what is drawn in them; how they look, people judge."""

import builtins
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_mnist import datasets, errors, plots
from spark_mnist.core import plan
from spark_mnist.fitting import results

RECORDS = tuple(
    plan.EpochRecord(
        epoch=epoch,
        losses={"loss": 1 / epoch, "val_loss": 2 / epoch},
        metrics={"accuracy": 1 - 1 / epoch, "val_accuracy": 1 - 2 / epoch},
    )
    for epoch in (2, 4)
)


@pytest.fixture(scope="module")
def predictions(spark):
    """Real digits; whoever read them took every 3 for an 8."""
    digits = datasets.digits(spark, "test").where("label IN (1, 3, 8)")
    guess = F.when(F.col("label") == 3, 8).otherwise(F.col("label"))
    one_hot = F.array(*((guess == digit).cast("int") for digit in range(10)))
    return digits.withColumn("prediction", one_hot).cache()


def test_curves_have_four_lines_on_twin_axes():
    left, right = plots.history(RECORDS).axes
    lines = {line.get_label(): line.get_ydata().tolist() for a in (left, right) for line in a.lines}
    assert lines == {
        "train loss": [0.5, 0.25],
        "validation loss": [1.0, 0.5],
        "train accuracy": [0.5, 0.75],
        "validation accuracy": [0.0, 0.5],
    }
    assert {line.get_label() for line in left.lines} == {"train loss", "validation loss"}
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(lines)


def test_curves_without_validation_have_two_lines():
    bare = [plan.EpochRecord(epoch=1, losses={"loss": 1.0}, metrics={"accuracy": 0.5})]
    left, right = plots.history(bare).axes
    assert [line.get_label() for a in (left, right) for line in a.lines] == [
        "train loss",
        "train accuracy",
    ]


def test_confusion_counts_rows_by_label_and_guess(predictions):
    (axes,) = plots.confusion(predictions).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3", "8"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    counts = {
        row["label"]: str(row["count"]) for row in predictions.groupBy("label").count().collect()
    }
    assert cells[(0, 0)] == counts[1]
    assert cells[(2, 1)] == counts[3]  # x is the guess 8, y the label 3
    assert cells[(1, 1)] == ""


def test_confusion_shows_names_where_classes_have_them(predictions):
    names = {1: "one", 3: "three", 8: "eight"}
    words = F.create_map(*(F.lit(x) for pair in names.items() for x in pair))
    digit = predictions.withColumnRenamed("label", "digit")
    named = digit.withColumn("label", words[F.col("digit")])
    named = named.withColumn("interpreted", F.col("label"))
    (axes,) = plots.confusion(named).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["eight", "one", "three"]


def test_mistakes_show_the_digits_with_truth_and_guess(predictions):
    figure = plots.mistakes(predictions, count=7)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 7
    assert {axes.get_title() for axes in drawn} == {"3, read as 8"}
    threes = {bytes(row["image"]) for row in predictions.where("label = 3").collect()}
    for axes in drawn:
        (image,) = axes.images
        picture = np.asarray(image.get_array())
        assert picture.tobytes() in threes
        assert (picture.dtype, image.get_clim()) == ("uint8", (0, 255))


def test_no_mistakes_is_a_picture_too(predictions):
    figure = plots.mistakes(predictions.where("label = 1"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no mistakes"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda df: plots.confusion(df.drop("prediction")), "no column 'prediction'"),
        (lambda df: plots.confusion(df, label="lable"), "did you mean 'label'"),
        (lambda df: plots.mistakes(df, image="img"), "no column 'img'"),
    ],
)
def test_columns_that_are_missing(predictions, draw, message):
    with pytest.raises(errors.MissingColumn, match=message):
        draw(predictions)


def test_labels_that_are_names_need_interpret(predictions):
    named = predictions.withColumn("label", F.concat(F.lit("digit "), "label"))
    for draw in (plots.confusion, plots.mistakes):
        with pytest.raises(errors.BadRows, match="predict with interpret=True"):
            draw(named)


def test_a_hostile_manifest_writes_no_script():
    record = plan.EpochRecord(epoch=1, losses={"<script>": 1.0}, metrics={})
    assert (
        "<script>"
        not in results.FitResult("<script>", 1, (record,), None, None, None)._repr_html_()
    )


def test_a_result_shows_itself_as_table_and_curve(monkeypatch):
    result = results.FitResult("m", 3, RECORDS, None, None, None)
    shown = result._repr_html_()
    assert "<th>epoch</th><th>loss</th><th>val_loss</th><th>accuracy</th>" in shown
    assert "<td>4</td><td>0.2500</td><td>0.5000</td><td>0.7500</td><td>0.5000</td>" in shown
    assert 'src="data:image/png;base64,iVBOR' in shown
    assert plots.png(result.plot()).startswith(b"\x89PNG")
    figure: Any = result.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert (
        results.FitResult("m", 3, RECORDS * 50, None, None, None)._repr_html_().count("<tr>") == 21
    )
    monkeypatch.setattr(plots, "available", lambda: False)
    assert "<img" not in result._repr_html_()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    plots._figure_class.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.VersionError, match=r"install spark-mnist\[plots\]"):
        plots.history(RECORDS)


def test_matplotlib_and_pyplot_come_late_or_never():
    subprocess.run([sys.executable, "-m", "tests.programs.late_matplotlib"], check=True)


def test_rows_that_have_no_prediction_are_in_no_picture(predictions):
    bad = predictions.limit(1).withColumn("prediction", F.lit(None).cast("array<int>"))
    mixed = bad.union(predictions)
    counts = [text.get_text() for text in plots.confusion(mixed).axes[0].texts]
    assert counts == [text.get_text() for text in plots.confusion(predictions).axes[0].texts]
    assert len(plots.mistakes(mixed).axes) == len(plots.mistakes(predictions).axes)


def test_classes_that_are_numbers_are_in_their_order(spark):
    rows = [(number, str(number)) for number in (10, 2, 1)]
    predictions = spark.createDataFrame(rows, "label int, interpreted string")
    one_hot = predictions.withColumn("prediction", F.array(F.lit(1)))
    figure = plots.confusion(one_hot)
    texts = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert texts == ["1", "2", "10"]
