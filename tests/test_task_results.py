"""Predictions, evaluations and pictures of each task, against scikit-learn's figures."""

import numpy as np
import pytest
from pyspark.sql import functions as F
from sklearn import metrics

import spark_mnist
from spark_mnist import errors, plots
from spark_mnist.cli import outputs

OPTIONS = {"features": ["a", "b"], "batch_size": 16, "epochs": 4, "verbose": 0}


@pytest.fixture(scope="module")
def rows(spark):
    columns = (
        "id",
        "sin(id) AS a",
        "cos(3 * id) AS b",
        "IF(sin(id) + cos(3 * id) / 2 > 0.2, 'up', 'down') AS way",
        "100 + 5 * sin(id) AS price",
        "array(100 + 5 * sin(id), cos(3 * id)) AS prices",
        "array_compact(array(IF(sin(id) > 0, 'x', NULL), IF(cos(3 * id) > 0, 'y', NULL))) AS tags",
        "id % 2 = 0 AS even",
    )
    return spark.range(200).selectExpr(*columns).cache()


@pytest.fixture(scope="module")
def root(rows, tmp_path_factory):
    store = str(tmp_path_factory.mktemp("models"))
    for name, label, task in (
        ("way", "way", "binary"),
        ("price", "price", "regression"),
        ("prices", "prices", "regression"),
        ("tags", "tags", "multilabel"),
    ):
        spark_mnist.fit(rows, name, label=label, task=task, store=store, **OPTIONS)
    return store


def test_two_classes(rows, root):
    options = {"interpret": True, "probabilities": True}
    found = spark_mnist.predict(rows, "way", store=root, **options)
    assert found.dtypes[-3:] == [
        ("prediction", "int"), ("interpreted", "string"), ("probability", "array<float>"),
    ]  # fmt: skip
    table = found.toPandas()
    p = np.stack(table["probability"])
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
    assert (table["prediction"] == (p[:, 1] > 0.5)).all()
    assert (table["interpreted"] == np.where(table["prediction"] == 1, "up", "down")).all()
    truth = table["way"] == "up"
    row = spark_mnist.evaluate(rows, "way", rate=1.0, details=True, store=root).first()
    assert row["metrics"] == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(truth, table["prediction"]),
            "precision": metrics.precision_score(truth, table["prediction"]),
            "recall": metrics.recall_score(truth, table["prediction"]),
            "auc": metrics.roc_auc_score(truth, p[:, 1]),
        }
    )
    assert row["losses"]["loss"] == pytest.approx(metrics.log_loss(truth, p[:, 1]), abs=1e-6)
    assert row["confusion"] == metrics.confusion_matrix(truth, table["prediction"]).tolist()
    assert [each["class"] for each in row["classes"]] == ["down", "up"]
    (axes,) = plots.confusion(found, label="way").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["down", "up"]


def test_numbers(rows, root):
    found = spark_mnist.predict(rows, "price", store=root, interpret=True)
    assert found.dtypes[-1] == ("prediction", "double")
    table = found.toPandas()
    row = spark_mnist.evaluate(rows, "price", rate=1.0, store=root).first()
    pair = table["price"], table["prediction"]
    assert row["metrics"] == pytest.approx(
        {
            "mse": metrics.mean_squared_error(*pair),
            "rmse": metrics.mean_squared_error(*pair) ** 0.5,
            "mae": metrics.mean_absolute_error(*pair),
            "r2": metrics.r2_score(*pair),
        }
    )
    groups = spark_mnist.evaluate(rows, "price", rate=1.0, by="even", store=root).collect()
    for group in groups:
        part = table[table["even"] == group["even"]]
        expected = metrics.r2_score(part["price"], part["prediction"])
        assert group["metrics"]["r2"] == pytest.approx(expected)
    with pytest.raises(errors.OptionError, match="probabilities=true is for classes and labels"):
        spark_mnist.predict(rows, "price", probabilities=True, store=root)
    with pytest.raises(errors.OptionError, match="details=true is for a model with one output"):
        spark_mnist.evaluate(rows, "price", details=True, store=root)
    with pytest.raises(errors.UnreadableColumn, match="this plot needs predicted classes"):
        plots.confusion(found, label="even")
    axes = spark_mnist.describe("price", store=root).plot().axes
    assert [each.get_ylabel() for each in axes] == ["loss", "r2"]


def test_several_numbers(rows, root):
    found = spark_mnist.predict(rows, "prices", store=root)
    assert found.dtypes[-1] == ("prediction", "array<double>")
    table = found.toPandas()
    pair = np.stack(table["prices"]), np.stack(table["prediction"])
    row = spark_mnist.evaluate(rows, "prices", rate=1.0, store=root).first()
    assert row["metrics"]["mse"] == pytest.approx(metrics.mean_squared_error(*pair))
    assert row["metrics"]["r2"] == pytest.approx(metrics.r2_score(*pair))
    (written,) = outputs.as_text(found.select("prediction").limit(1)).collect()
    assert len(written["prediction"].split(",")) == 2


def test_labels(rows, root):
    found = spark_mnist.predict(rows, "tags", store=root, interpret=True, probabilities=True)
    assert found.dtypes[-3:] == [
        ("prediction", "array<int>"), ("interpreted", "array<string>"),
        ("probability", "array<float>"),
    ]  # fmt: skip
    table = found.toPandas()
    truth = np.array([["x" in tags, "y" in tags] for tags in table["tags"]])
    guess = np.stack(table["prediction"])
    assert (guess == (np.stack(table["probability"]) > 0.5)).all()
    names = [[name for name, flag in zip("xy", flags, strict=True) if flag] for flags in guess]
    assert [[*row] for row in table["interpreted"]] == names
    row = spark_mnist.evaluate(rows, "tags", rate=1.0, store=root).first()
    assert row["metrics"] == pytest.approx(
        {
            "accuracy": (truth == guess).mean(),
            "f1_micro": metrics.f1_score(truth, guess, average="micro"),
            "f1_macro": metrics.f1_score(truth, guess, average="macro"),
        }
    )


def test_rows_that_cannot_be_used_get_null(rows, root):
    holes = rows.withColumn("a", F.when(F.col("id") > 0, F.col("a")))
    for name in ("way", "price", "prices", "tags"):
        options = {"interpret": True, "probabilities": name in ("way", "tags")}
        found = spark_mnist.predict(holes, name, store=root, mode="DROPMALFORMED", **options)
        new = [column for column in found.columns if column not in holes.columns]
        hole, full = found.where("id < 2").orderBy("id").collect()
        assert [hole[column] for column in new] == [None] * len(new)
        assert None not in [full[column] for column in new]


def test_an_evaluation_without_rows_has_null(rows, root):
    for name in ("way", "price", "tags"):
        row = spark_mnist.evaluate(rows.limit(3), name, rate=0.0, store=root).first()
        assert {*row["losses"].values(), *row["metrics"].values()} == {None}
        full = spark_mnist.evaluate(rows, name, rate=1.0, store=root).first()
        assert row["metrics"].keys() == full["metrics"].keys()


def test_commands_take_tasks(rows, root):
    text = "fit two features=a,b label=way task=binary metrics=true_positives class_weight=up:2 "
    spark_mnist.command(f"{text} epochs=1 store={root} verbose=0", rows)
    found = spark_mnist.command(f"predict two probabilities=true store={root}", rows)
    assert found.columns[-2:] == ["prediction", "probability"]
    assert "true_positives" in spark_mnist.describe("two", store=root).metrics
    rows = spark_mnist.command(f"describe two store={root}").collect()
    assert any("binary" in str(row) for row in rows)
