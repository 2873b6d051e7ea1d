"""Any table of numbers: its columns, its classes, standardised, trained, applied."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.linalg import Vectors
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import datasets, errors
from spark_mnist.data import feature_columns, labels, profile
from tests.conftest import COLUMNS, FLOWERS, arrays, manifest


@pytest.fixture(scope="module")
def iris(spark):
    return datasets.iris(spark).cache()


@pytest.fixture
def samples(spark):
    rows = [(6.4, 3.2, 4.5, 1.5), (5.8, 3.1, 5.0, 1.7)]
    return spark.createDataFrame(rows, ", ".join(f"{name} double" for name in COLUMNS))


def as_forms(iris):
    """The same table in all forms that features may have."""
    words = F.concat_ws(",", *COLUMNS)
    return {
        "columns": (iris, tuple(COLUMNS)),
        "text columns": (iris.select(*(F.col(c).cast("string") for c in COLUMNS), "label"), tuple(COLUMNS)),
        "array": (iris.withColumn("x", F.array(*COLUMNS)), ("x",)),
        "vector": (VectorAssembler(inputCols=COLUMNS, outputCol="x").transform(iris), ("x",)),
        "text": (iris.withColumn("x", words), ("x",)),
    }  # fmt: skip


def test_every_form_of_features_gives_the_same_tensor(iris):
    tensors = {}
    for form, (df, names) in as_forms(iris).items():
        input_spec = labels.discover(df, names, "label")
        assert (input_spec.width, input_spec.classes, input_spec.names) == (4, 3, ())
        source = feature_columns.features(df, input_spec)
        rows = df.select(source.column.alias("x")).toPandas()["x"]
        tensors[form] = feature_columns.reader(source)(pa.array(rows))
        assert profile.profile_rows(df, input_spec).rows == 150
    for tensor in tensors.values():
        np.testing.assert_array_equal(tensor, tensors["columns"])


def test_one_number_a_row_and_bytes_of_any_width(iris):
    input_spec = labels.discover(iris, ("petal_width",), "label")
    assert (input_spec.width, input_spec.pixels) == (1, False)
    assert profile.profile_rows(iris, input_spec).rows == 150
    pictures = iris.withColumn("x", F.encode(F.lit("abcdef"), "utf-8"))
    input_spec = labels.discover(pictures, ("x",), "label")
    assert (input_spec.width, input_spec.pixels) == (6, True)
    assert profile.profile_rows(pictures, input_spec).rows == 150


@pytest.mark.parametrize(
    ("label", "classes", "names"),
    [
        ("species", 3, ("setosa", "versicolor", "virginica")),
        ("upper(concat(' ', species))", 3, ("SETOSA", "VERSICOLOR", "VIRGINICA")),
        ("concat('iris, ', species)", 3, ("iris, setosa", "iris, versicolor", "iris, virginica")),
        ("label", 3, ()),
        ("cast(label as double)", 3, ()),
        ("cast(label as string)", 3, ()),
        ("label > 0", 2, ()),
        ("transform(array(0, 1, 2), i -> int(i = label))", 3, ()),
        ("concat_ws(',', transform(array(0, 1, 2), i -> int(i = label)))", 3, ()),
        ("label + 1", 3, ("1", "2", "3")),
        ("cast(label + 1 as string)", 3, ("1", "2", "3")),
        ("concat(label + 1, '.0')", 3, ("1", "2", "3")),
        ("element_at(array(-5.0D, 10.0D, 999.0D), label + 1)", 3, ("-5", "10", "999")),
        ("if(label = 0, -1, 1)", 2, ("-1", "1")),
        (
            "element_at(array('\u0660', '\u0661', '\u0662'), label + 1)",
            3,
            tuple("\u0660\u0661\u0662"),
        ),
    ],
)
def test_every_form_of_label_gives_its_classes(iris, label, classes, names):
    df = iris.withColumn("y", F.expr(label))
    input_spec = labels.discover(df, tuple(COLUMNS), "y")
    assert (input_spec.classes, input_spec.names) == (classes, names)
    found = df.select(labels.column(df, input_spec).alias("found"), "label").collect()
    assert all(row["found"] == min(row["label"], classes - 1) for row in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"petal_width": None}, "1 x petal_width is missing or no finite float32"),
        ({"petal_width": float("nan")}, "1 x petal_width is missing or no finite float32"),
        ({"sepal_width": float("inf")}, "1 x sepal_width is missing or no finite float32"),
        ({"sepal_width": 1e300}, "1 x sepal_width is missing or no finite float32"),
        ({"species": None}, "1 x species is null"),
        ({"species": "rose"}, "1 x species is none of setosa, versicolor, virginica"),
    ],
)
def test_bad_rows_of_a_table_are_counted_with_the_column(spark, iris, change, message):
    input_spec = labels.discover(iris, tuple(COLUMNS), "species")
    bad = spark.createDataFrame([{**iris.first().asDict(), **change}], iris.schema)
    with pytest.raises(errors.BadRows, match=f"1 of 151 rows cannot be used: {message}"):
        profile.profile_rows(iris.union(bad), input_spec)


def test_bad_rows_of_one_column_of_arrays(spark):
    rows = [([1.0, 2.0], 0), ([1.0], 1), ([1.0, None], 1), ([1.0, float("inf")], 0), (None, 1)]
    df = spark.createDataFrame(rows, "x array<double>, label int")
    input_spec = labels.discover(df, ("x",), "label")
    with pytest.raises(errors.BadRows) as caught:
        profile.profile_rows(df, input_spec)
    assert caught.value.counts == {
        "x has 1 numbers, not 2": 1,
        "x has a number that is no number": 1,
        "x has a number that is infinite as a float32": 1,
        "x is null": 1,
    }


@pytest.mark.parametrize(
    ("features", "label", "error", "message"),
    [
        (["petal_wdth"], "label", errors.MissingColumn, "did you mean 'petal_width'"),
        (COLUMNS, "specie", errors.MissingColumn, "did you mean 'species'"),
        (["petal_width", "day"], "label", errors.UnreadableColumn, "each must be a number"),
        (["day"], "label", errors.UnreadableColumn, "is date; it may be a number, an array"),
        (COLUMNS, "day", errors.UnreadableColumn, "is date; it may be an integer, the name"),
        (COLUMNS, "id", errors.BadRows, "looks like a quantity to predict .150 whole numbers in"),
        (COLUMNS, "width", errors.BadRows, "looks like a quantity .*numbers that are not whole"),
        (COLUMNS, "amount", errors.BadRows, "looks like a quantity to predict"),
        (COLUMNS, "nothing", errors.BadRows, "no row has a class in column 'nothing'"),
    ],
)
def test_columns_that_make_no_table(iris, store, features, label, error, message):
    df = iris.withColumns(
        {
            "day": F.current_date(),
            "id": F.monotonically_increasing_id(),
            "nothing": F.lit(None).cast("int"),
            "width": F.col("petal_width"),
            "amount": F.col("petal_length").cast("string"),
        }
    )
    with pytest.raises(error, match=message):
        spark_mnist.fit(df, "m", features=features, label=label, store=store, verbose=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "dnn"}, "dnn reads a table: name its columns, features=a,b,c"),
        ({"network": "mlp", "features": COLUMNS}, "mlp reads pictures .* from one column"),
        ({"features": []}, "features must be column names like a,b,c, .* not \\[\\]"),
        ({"features": "a,,b"}, "features must be column names"),
        ({"features": [1]}, "features must be column names"),
        ({"standardize": "yes"}, "standardize must be true or false"),
    ],
)
def test_options_that_make_no_table(iris, store, options, message):
    with pytest.raises(errors.OptionError, match=message):
        spark_mnist.fit(iris, "m", store=store, **options)


@pytest.mark.ranks
def test_iris_on_two_ranks_names_its_species_and_goes_on(spark, iris, samples, store):
    joined = {"num_proc": 2, "batch_size": 8, "learning_rate": 0.0015, "train_validation_ratio": 1}
    train = datasets.iris(spark, "train")
    result = spark_mnist.fit(train, "iris", store=store, **{**FLOWERS, **joined})
    assert result.records[-1].metrics["accuracy"] > 0.95
    predicted = spark_mnist.predict(samples, "iris", interpret=True, store=store)
    assert predicted.dtypes[-2:] == [("prediction", "array<int>"), ("interpreted", "string")]
    rows = predicted.collect()
    assert [row["interpreted"] for row in rows] == ["versicolor", "virginica"]
    assert [row["prediction"] for row in rows] == [[0, 1, 0], [0, 0, 1]]
    options = {"num_proc": 2, "store": store, "continuous": True, "verbose": 0}
    more = spark_mnist.fit(iris, "iris", epochs=1, **options)
    assert more.records[0].epoch == 61
    found = manifest(store, "iris", 2)
    assert found["input"]["names"] == ["setosa", "versicolor", "virginica"]
    assert found["network"] == manifest(store, "iris", 1)["network"]  # the same standardisation
    changes = [
        ({"features": "petal_width"}, "features=sepal_length,.*with features=petal_width"),
        ({"label": "label"}, "label=species"),
        ({"standardize": False}, "standardize=True"),
        ({"hidden": "5"}, "hidden=10,20,10"),
    ]
    for change, message in changes:
        with pytest.raises(errors.ModelMismatch, match=message):
            spark_mnist.fit(iris, "iris", **options, **change)
    known = F.when(F.col("species") == "setosa", "rose").otherwise(F.col("species"))
    roses = iris.withColumn("species", known)
    with pytest.raises(errors.BadRows, match="50 x species is none of setosa, versicolor, virgin"):
        spark_mnist.fit(roses, "iris", **options)


@pytest.mark.parametrize("change", ["{} * 1e-12", "{} * 1e-30", "{} * 1e22", "{} + 1.7e9"])
def test_features_of_any_scale_and_offset_are_learned_alike(iris, store, change):
    scaled = iris.selectExpr(*(f"{change.format(name)} AS {name}" for name in COLUMNS), "species")
    options = {**FLOWERS, "epochs": 20, "learning_rate": 0.01, "store": store}
    result = spark_mnist.fit(scaled, "m", **options)
    assert result.records[-1].metrics["accuracy"] > 0.9
    (row,) = spark_mnist.evaluate(scaled, "m", rate=1, store=store).collect()
    assert row["metrics"]["accuracy"] > 0.9


@pytest.mark.ranks
def test_a_feature_that_never_varies_is_named(iris, store, caplog):
    table = iris.withColumn("same", F.lit(0.1))
    options = {**FLOWERS, "features": [*COLUMNS, "same"], "epochs": 1, "num_proc": 2}
    spark_mnist.fit(table, "m", store=store, **options)
    assert "same: the same value in all training rows" in caplog.text
    assert manifest(store, "m")["network"]["deviation"][4] == 1


def test_classes_that_are_other_numbers_come_back_as_numbers(iris, store):
    table = iris.withColumn("y", (F.col("label") * 2 - 1).cast("int"))
    options = {**FLOWERS, "label": "y", "epochs": 30, "learning_rate": 0.01, "store": store}
    spark_mnist.fit(table, "m", **options)
    predicted = spark_mnist.predict(table, "m", interpret=True, store=store)
    assert predicted.dtypes[-1] == ("interpreted", "int")
    assert predicted.where("interpreted = y").count() > 130
    doubles = table.withColumn("y", F.col("y").cast("double"))
    (row,) = spark_mnist.evaluate(doubles, "m", rate=1, details=True, store=store).collect()
    assert [figures["class"] for figures in row["classes"]] == ["-1", "1", "3"]
    assert row["metrics"]["accuracy"] > 0.85


def test_names_as_people_write_them(iris, store):
    table = iris.withColumnsRenamed({"sepal_width": " sepal_width", "petal_width": "petal_width "})
    options = {**FLOWERS, "epochs": 1, "store": store}
    spark_mnist.fit(table, "m", **options)
    spark_mnist.fit(iris, "m", **{**options, "features": ["SEPAL_length"], "label": "SPECIES"})
    exact = [*COLUMNS[:1], " sepal_width"]
    spark_mnist.fit(table, "m", **{**options, "features": exact})
    spark_mnist.fit(iris, "m", **{**options, "features": "*_length"})
    assert manifest(store, "m", 4)["input"]["features"] == ["sepal_length", "petal_length"]
    spark_mnist.fit(iris.drop("species"), "m", **{**options, "features": "*", "label": "label"})
    assert manifest(store, "m", 5)["input"]["features"] == COLUMNS
    with pytest.raises(errors.MissingColumn, match=r"no column matches 'depth\*'"):
        spark_mnist.fit(iris, "m", **{**options, "features": "depth*"})
    twice = iris.select("*", F.col("petal_width").alias("Petal_Width"))
    with pytest.raises(errors.UnreadableColumn, match="has 2 columns called 'petal_width'"):
        spark_mnist.fit(twice, "m", **options)


def test_numbers_of_numpy_and_names_of_pandas(iris, store):
    numbers = {"epochs": np.int64(1), "batch_size": np.int32(16), "seed": np.uint8(3)}
    others = {"learning_rate": np.float32(0.01), "continuous": np.bool_(False)}
    names = iris.limit(1).toPandas().columns[:4]
    options = {**FLOWERS, **numbers, **others, "features": names, "store": Path(store)}
    result = spark_mnist.fit(iris, "m", **options)
    assert result.records[0].epoch == 1
    with pytest.raises(errors.OptionError, match=r"epochs must be int >= 1, not 1\.5"):
        spark_mnist.fit(iris, "m", **{**options, "epochs": np.float64(1.5)})


@pytest.fixture(scope="module")
def pixels(spark):
    """The CSV that most people have of MNIST: a label, and a column for each pixel."""
    digits = datasets.digits(spark, "train").limit(200)
    names = ", ".join(f"pixel{number} int" for number in range(784))
    rows = [(row["label"], *row["image"]) for row in digits.collect()]
    return spark.createDataFrame(rows, f"label int, {names}").coalesce(1).cache()


def test_pictures_with_a_column_for_each_pixel(spark, pixels, store):
    binary = datasets.digits(spark, "train").limit(200)
    options = {"network": "mlp", "epochs": 2, "store": store, "verbose": 0}
    whole = spark_mnist.fit(binary, "whole", **options)
    found = spark_mnist.fit(pixels, "found", **options)
    named = spark_mnist.fit(pixels, "named", features="pixel*", **options)
    text = pixels.select(*(F.col(name).cast("double").cast("string") for name in pixels.columns))
    checked = pixels.select("*", (F.col("label") > 20).alias("checks"))
    spark_mnist.fit(checked, "checked", validation_indicator="checks", **options)
    as_text = spark_mnist.fit(text, "text", **options)
    for result in (found, named, as_text):
        assert result.records == whole.records
    answers = spark_mnist.predict(text, "found", interpret=True, store=store)
    assert (
        answers.select("interpreted").collect()
        == spark_mnist.predict(pixels, "found", interpret=True, store=store)
        .select("interpreted")
        .collect()
    )
    with pytest.raises(errors.OptionError, match="from one column or from 784, not from 111"):
        spark_mnist.fit(pixels, "m", features="pixel2*", **options)


def test_a_message_does_not_list_a_thousand_columns(pixels, store):
    table = pixels.withColumn("id", F.lit(1))
    with pytest.raises(errors.MissingColumn, match=r"786 in all; name the columns") as caught:
        spark_mnist.fit(table, "m", store=store)
    assert len(str(caught.value)) < 300


def test_held_out_flowers_over_five_seeds(spark, samples, store):
    train, test = (datasets.iris(spark, split).cache() for split in ("train", "test"))
    assert (train.count(), test.count()) == (120, 30)
    accuracies = []
    for seed in range(5):
        name = f"seed-{seed}"
        options = {**FLOWERS, "label": "label", "train_validation_ratio": 1, "seed": seed}
        spark_mnist.fit(train, name, store=store, **options)
        (row,) = spark_mnist.evaluate(test, name, rate=1, store=store).collect()
        accuracies.append(row["metrics"]["accuracy"])
        rows = spark_mnist.predict(samples, name, interpret=True, store=store).collect()
        assert [row["interpreted"] for row in rows] == [1, 2]
    assert np.mean(accuracies) >= 0.95, accuracies


def test_standardisation_is_learned_on_the_training_rows_alone(spark, iris, store):
    options = {**FLOWERS, "epochs": 1, "train_validation_ratio": 0.5, "store": store}
    spark_mnist.fit(iris, "m", **options)
    network = manifest(store, "m")["network"]
    everything = np.array(iris.select(*COLUMNS).collect())
    assert np.abs(network["mean"] - everything.mean(axis=0)).max() < 0.5
    assert np.abs(network["mean"] - everything.mean(axis=0)).min() > 1e-4
    constant = iris.withColumn("same", F.lit(7))
    features = [*COLUMNS[:2], "same"]
    spark_mnist.fit(constant, "c", **{**options, "features": features})
    assert manifest(store, "c")["network"]["mean"][2] == 7
    assert manifest(store, "c")["network"]["deviation"][2] == 1
    spark_mnist.fit(iris, "raw", standardize=False, **options)
    assert manifest(store, "raw")["network"]["mean"] == []
    assert arrays(store, "raw", 1)[0].shape == (4, 10)


def test_a_row_to_predict_that_is_not_finite(spark, iris, store):
    spark_mnist.fit(iris, "m", **{**FLOWERS, "epochs": 1}, store=store)
    bad = iris.limit(1).withColumn("petal_width", F.lit(None).cast("double"))
    with pytest.raises(Exception, match=r"a row to predict has a number in sepal_length, .*finite"):
        spark_mnist.predict(bad, "m", store=store).collect()


def test_a_column_of_vectors_of_another_width(spark, iris, store):
    df, _ = as_forms(iris)["vector"]
    spark_mnist.fit(df, "m", **{**FLOWERS, "features": "x", "epochs": 1}, store=store)
    wrong = spark.createDataFrame([(Vectors.dense([1.0, 2.0]),)], ["x"])
    with pytest.raises(Exception, match="a row to predict has no x of 4 numbers"):
        spark_mnist.predict(wrong, "m", store=store).collect()


def test_a_feature_that_only_doubles_hold_is_evaluated_as_it_was_trained(spark, store):
    rows = spark.range(0, 40).selectExpr(
        "id * 1e300 AS big", "-double(id) AS small", "IF(id < 20, 'low', 'high') AS kind"
    )
    options = {"features": ["big", "small"], "label": "kind", "store": store, "verbose": 0}
    spark_mnist.fit(rows, "m", epochs=60, batch_size=8, learning_rate=0.02, **options)
    (row,) = spark_mnist.evaluate(rows, "m", rate=1, store=store).collect()
    assert row["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize("kind", ["int", "string", "boolean"])
def test_a_table_without_rows(spark, store, kind):
    rows = spark.createDataFrame([], f"a double, b double, kind {kind}")
    with pytest.raises(errors.TooFewRows, match="no rows"):
        spark_mnist.fit(rows, "m", features=["a", "b"], label="kind", store=store)
