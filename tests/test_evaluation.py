"""Details and groups of an evaluation, by hand-counted cells and by scikit-learn on real rows."""

import pytest
from pyspark.sql import functions as F
from pyspark.sql import types as T
from sklearn import metrics

import spark_mnist
from spark_mnist import datasets, errors
from spark_mnist.core import plan
from spark_mnist.scoring import evaluation, measures
from tests.conftest import FLOWERS

READS = plan.InputSpec(classes=3, names=("a", "b", "c"))


def cell(label, predicted, rows, loss=0.0, no=1, group=None):
    return measures.Cell(no, group, label, predicted, rows, loss)


def test_figures_of_classes_by_hand():
    share = evaluation.Sample(READS, [cell(0, 0, 3, 1.0), cell(0, 1, 1, 2.0), cell(1, 1, 4, 0.5)])
    rows, correct, precision_at_1, confusion, classes = share.details()
    assert (rows, correct, precision_at_1) == (8, 7, 7 / 8)
    assert confusion == [[3, 1, 0], [0, 4, 0], [0, 0, 0]]
    assert classes[0] == ("a", 4, 1.0, 0.75, 6 / 7)
    assert classes[1] == ("b", 4, 0.8, 1.0, 8 / 9)
    assert classes[2] == ("c", 0, None, None, None)  # no row, nothing to divide by
    assert share.means() == ({"loss": 3.5 / 8}, {"accuracy": 7 / 8})


def test_details_are_scikit_learns(root, held_out):
    (row,) = spark_mnist.evaluate(held_out, "m", rate=1, details=True, store=root).collect()
    predicted = spark_mnist.predict(held_out, "m", interpret=True, store=root)
    truth, guess = zip(*predicted.select("label", "interpreted").collect(), strict=True)
    assert row["num_examples"] == len(truth)
    assert row["num_correct"] == sum(a == b for a, b in zip(truth, guess, strict=True))
    assert row["precision_at_1"] == row["metrics"]["accuracy"]
    assert row["confusion"] == metrics.confusion_matrix(truth, guess).tolist()
    expected = metrics.precision_recall_fscore_support(truth, guess)
    for found, figures in zip(row["classes"], zip(*expected, strict=True), strict=True):
        assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(figures[:3])
        assert found["num_examples"] == figures[3]
    assert [found["class"] for found in row["classes"]] == [str(digit) for digit in range(10)]


def test_groups_are_measured_apart(root, held_out):
    df = held_out.withColumn(
        "site", F.when(F.col("label") < 5, "low").when(F.col("label") < 8, "mid")
    )
    found = spark_mnist.evaluate(df, "m", rate=1, repeat=2, by="site", details=True, store=root)
    assert found.columns[:4] == ["no", "site", "losses", "metrics"]
    rows = found.collect()
    assert [(row["no"], row["site"]) for row in rows] == [
        (no, site) for no in (1, 2) for site in (None, "low", "mid")
    ]
    counts = {row["site"]: row["count"] for row in df.groupBy("site").count().collect()}
    assert {row["site"]: row["num_examples"] for row in rows} == counts
    (whole,) = spark_mnist.evaluate(df, "m", rate=1, store=root).collect()
    joined = sum(row["metrics"]["accuracy"] * row["num_examples"] for row in rows[:3])
    assert joined / sum(counts.values()) == pytest.approx(whole["metrics"]["accuracy"])


def test_rows_whose_group_is_no_number_are_one_group(spark):
    group = T.StructField("x", T.DoubleType())
    cells = [cell(0, 0, 1, group=float(x)) for x in ("nan", "nan", "2", "-1")]
    cells.append(cell(0, 0, 5))
    table = evaluation.table(spark, cells, READS, repeat=1, group=group, details=True)
    found = [(str(row["x"]), row["num_examples"]) for row in table.collect()]
    assert found == [("None", 5), ("-1.0", 1), ("2.0", 1), ("nan", 2)]


def test_figures_by_class_as_a_table(root, held_out):
    found = spark_mnist.evaluate(held_out, "m", rate=1, details=True, store=root)
    table = found.selectExpr("no", "inline(classes)")
    assert table.columns == ["no", "class", "num_examples", "precision", "recall", "f1"]
    assert table.count() == 10


def test_a_column_of_details_parts_rows_where_none_are_asked_for(root, held_out):
    df = held_out.withColumn("classes", F.lit(1))
    assert spark_mnist.evaluate(df, "m", by="classes", store=root).columns[1] == "classes"
    with pytest.raises(errors.ColumnTaken, match="the result has a column 'classes'"):
        spark_mnist.evaluate(df, "m", by="classes", details=True, store=root)


@pytest.mark.parametrize(
    ("by", "error", "message"),
    [
        ("sit", errors.MissingColumn, "no column 'sit' .*did you mean 'site'"),
        ("image", errors.UnreadableColumn, "by=image: column 'image' is binary"),
        ("losses", errors.ColumnTaken, "the result has a column 'losses'"),
        ("", errors.OptionError, "by must be text"),
    ],
)
def test_columns_that_part_no_rows(root, held_out, by, error, message):
    df = held_out.withColumn("site", F.lit(1)).withColumn("losses", F.lit(1))
    with pytest.raises(error, match=message):
        spark_mnist.evaluate(df, "m", by=by, store=root)


def squares(targets, outputs):
    return (targets - outputs) ** 2


def test_a_loss_of_the_users_is_null_where_it_is_not_given_again(spark, store):
    iris = datasets.iris(spark)
    options = {**FLOWERS, "label": "petal_width", "task": "regression", "epochs": 1}
    spark_mnist.fit(iris, "m", **options, loss=squares, store=store)
    (row,) = spark_mnist.evaluate(iris, "m", rate=1, store=store).collect()
    assert row["losses"] == {"loss": None}
    assert row["metrics"]["mae"] > 0
    (row,) = spark_mnist.evaluate(iris, "m", rate=1, loss=squares, store=store).collect()
    assert row["losses"]["loss"] > 0
    options = {**FLOWERS, "label": "is_wide", "task": "binary", "epochs": 1}
    wide = iris.withColumn("is_wide", F.col("petal_width") > 1)
    spark_mnist.fit(wide, "wide", **options, loss=squares, store=store)
    (row,) = spark_mnist.evaluate(wide, "wide", rate=1, details=True, store=store).collect()
    assert (row["losses"], row["num_examples"]) == ({"loss": None}, 150)


def test_a_loss_that_is_given_is_the_one_that_is_measured(root, held_out):
    for name, error in (("nonsense", errors.OptionError), ("mse", errors.ModelMismatch)):
        with pytest.raises(error, match="loss"):
            spark_mnist.evaluate(held_out, "m", loss=name, store=root)

    def threes(targets, outputs):
        return 0 * outputs + 3

    options = {"rate": 1, "store": root}
    (row,) = spark_mnist.evaluate(held_out, "m", loss=threes, **options).collect()
    (other,) = spark_mnist.evaluate(
        held_out, "m", loss="sparse_categorical_crossentropy", **options
    ).collect()
    assert (row["losses"], row["metrics"]) == ({"loss": 3.0}, other["metrics"])


def test_a_loss_that_compares_with_zero_is_not_given_scaled_numbers(spark, store):
    def percentage():
        import keras

        return keras.losses.MeanAbsolutePercentageError()

    options = {**FLOWERS, "label": "petal_width", "task": "regression", "epochs": 1}
    with pytest.raises(errors.RankError, match="set standardize_label=false"):
        spark_mnist.fit(datasets.iris(spark), "m", **options, loss=percentage, store=store)
