"""``predict`` and ``evaluate`` with a model that was trained for real."""

import numpy as np
import pytest
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import errors
from spark_mnist.ranks import collectives


def test_the_columns_and_rows_of_the_manual(root, held_out):
    df = held_out.withColumn("id", F.monotonically_increasing_id())
    predicted = spark_mnist.predict(df, "m", interpret=True, batch_size=100, store=root)
    assert predicted.dtypes == [*df.dtypes, ("prediction", "array<int>"), ("interpreted", "int")]
    before, after = df.collect(), predicted.collect()
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [bytes(row["image"]) for row in after] == [bytes(row["image"]) for row in before]
    for row in after:
        assert row["prediction"] == [int(i == row["interpreted"]) for i in range(10)]
    assert np.mean([row["interpreted"] == row["label"] for row in after]) > 0.8


def test_without_interpret_there_is_one_column_more(root, held_out):
    predicted = spark_mnist.predict(held_out.select("image"), "m", store=root)
    assert predicted.columns == ["image", "prediction"]


def test_every_representation_gives_the_same_prediction(spark, root, held_out):
    integers = F.expr("transform(sequence(1, 784), i -> conv(hex(substring(image, i, 1)), 16, 10))")
    ints = held_out.withColumn("image", integers.cast("array<int>")).cache()
    floats = ints.withColumn("image", F.transform("image", lambda p: (p / 255).cast("double")))
    forms = {
        "binary": held_out,
        "integers": ints,
        "doubles": floats,
        "floats": floats.withColumn("image", F.col("image").cast("array<float>")),
        "vector": floats.withColumn("image", array_to_vector("image")),
        "text": floats.withColumn(
            "image", F.array_join(F.transform("image", lambda p: p.cast("string")), ",")
        ),
    }
    found = {
        form: [
            row[0]
            for row in spark_mnist.predict(df, "m", interpret=True, store=root)
            .select("interpreted")
            .collect()
        ]
        for form, df in forms.items()
    }
    assert all(labels == found["binary"] for labels in found.values())


def test_a_users_columns_stay_whatever_their_names(root, held_out):
    odd = held_out.limit(5).withColumn("a.b", F.lit(7)).withColumn("c`d", F.lit(8))
    odd = odd.withColumn("interpreted", F.lit(99)).select(
        "*", F.lit(1).alias("twin"), F.lit(2).alias("twin")
    )
    predicted = spark_mnist.predict(odd, "m", store=root)
    assert predicted.columns == [*odd.columns, "prediction"]
    for row in predicted.collect():
        assert list(row)[2:7] == [7, 8, 99, 1, 2]
    renamed = odd.withColumnRenamed("interpreted", "Interpreted")
    with pytest.raises(errors.ColumnTaken, match="'Interpreted' already"):
        spark_mnist.predict(renamed, "m", interpret=True, store=root)


def test_the_batch_size_changes_nothing(root, held_out):
    tables = [
        spark_mnist.predict(held_out, "m", interpret=True, store=root, batch_size=size).collect()
        for size in (1000, 7)
    ]
    assert tables[0] == tables[1]


def test_a_model_trained_again_does_not_change_what_was_made(digits, store, held_out):
    options = {"store": store, "num_proc": 1, "verbose": 0}
    spark_mnist.fit(digits, "m", epochs=1, **options)
    lazy = spark_mnist.predict(held_out, "m", store=store)
    first = lazy.collect()
    spark_mnist.fit(digits, "m", epochs=10, **options)
    assert lazy.collect() == first
    assert spark_mnist.predict(held_out, "m", store=store, version=1).collect() == first
    assert spark_mnist.predict(held_out, "m", store=store).collect() != first


def test_one_scoring_pass(root, held_out):
    predicted = spark_mnist.predict(held_out, "m", interpret=True, store=root)
    plan = predicted._jdf.queryExecution().executedPlan().toString()
    assert plan.count("ArrowEvalPython") == 1
    assert plan.count("score(") == 1


def test_empty_input(root, held_out):
    predicted = spark_mnist.predict(held_out.where("label > 9"), "m", interpret=True, store=root)
    assert predicted.count() == 0


def test_a_bad_row_says_what_is_wrong(root, held_out):
    bad = held_out.withColumn("image", F.substring("image", 1, 783))
    with pytest.raises(Exception, match="a row to predict has no image of 784 pixels"):
        spark_mnist.predict(bad, "m", store=root).collect()


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda df: df, {"name": "n"}, errors.ModelNotFound, "no model 'n'.*which has m"),
        (lambda df: df, {"version": 9}, errors.ModelNotFound, "no version 9"),
        (lambda df: df, {"name": "../m"}, errors.ModelNameError, "is not a valid model name"),
        (
            lambda df: df,
            {"interpret": "true"},
            errors.OptionError,
            "interpret must be true or false",
        ),
        (lambda df: df.drop("image"), {}, errors.MissingColumn, "no column 'image'"),
        (
            lambda df: df.withColumn("prediction", F.lit(1)),
            {},
            errors.ColumnTaken,
            "'prediction' already",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused_at_once(
    root, held_out, change, options, error, message
):
    name = options.pop("name", "m")
    with pytest.raises(error, match=message):
        spark_mnist.predict(change(held_out), name, store=root, **options)


def test_the_manuals_table_of_evaluations(root, held_out):
    found = spark_mnist.evaluate(held_out, "m", repeat=3, rate=0.8, batch_size=128, store=root)
    assert found.dtypes == [
        ("no", "int"),
        ("losses", "map<string,double>"),
        ("metrics", "map<string,double>"),
    ]
    rows = found.collect()
    assert [row["no"] for row in rows] == [1, 2, 3]
    assert all(
        set(row["losses"]) == {"loss"} and set(row["metrics"]) == {"accuracy"} for row in rows
    )
    assert len({row["losses"]["loss"] for row in rows}) == 3  # each has a random share of its own
    assert all(row["metrics"]["accuracy"] > 0.8 for row in rows)


def test_rate_1_measures_every_row_alike(root, held_out):
    rows = spark_mnist.evaluate(held_out, "m", repeat=2, rate=1, store=root).collect()
    predicted = spark_mnist.predict(held_out, "m", interpret=True, store=root)
    right = predicted.where("interpreted = label").count() / held_out.count()
    assert [row["metrics"]["accuracy"] for row in rows] == pytest.approx([right, right])
    assert rows[0]["losses"] == rows[1]["losses"]


def test_the_loss_is_the_one_that_training_reports(digits, store):
    options = {"store": store, "num_proc": 1, "verbose": 0, "train_validation_ratio": 0.5}
    result = spark_mnist.fit(digits, "m", epochs=1, learning_rate=1e-12, **options)
    (row,) = spark_mnist.evaluate(digits, "m", rate=1, store=store).collect()
    record = result.records[0]
    halves = [record.losses["loss"], record.losses["val_loss"]]
    assert row["losses"]["loss"] == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_a_share_without_rows_has_no_numbers(root, held_out):
    (row,) = spark_mnist.evaluate(held_out, "m", rate=0, store=root).collect()
    assert (row["losses"], row["metrics"]) == ({"loss": None}, {"accuracy": None})


def test_evaluations_are_the_same_each_time_and_other_with_another_seed(root, held_out):
    losses = [
        spark_mnist.evaluate(held_out, "m", rate=0.5, seed=seed, store=root).first()["losses"]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_evaluate_needs_labels(root, held_out):
    with pytest.raises(errors.MissingColumn, match="no column 'label'"):
        spark_mnist.evaluate(held_out.drop("label"), "m", store=root)
    with pytest.raises(errors.BadRows, match="label is neither"):
        spark_mnist.evaluate(held_out.withColumn("label", F.lit(11)), "m", store=root)


def test_the_command_in_the_manuals_words(spark, digits, held_out, store):
    spark.conf.set("spark.mnist.store", store)
    try:
        fit = spark_mnist.command(
            "mymnist fit test_model batch_size=128 epochs=5 verbose=0", digits
        )
        assert fit.count() == 5
        predict = spark_mnist.command(
            "mymnist predict test_model batch_size=128 interpret=true", held_out
        )
        assert predict.columns == [*held_out.columns, "prediction", "interpreted"]
        table = spark_mnist.command(
            "mymnist eval test_model repeat=2 batch_size=128 rate=0.8", held_out
        )
        assert [row["no"] for row in table.collect()] == [1, 2]
    finally:
        spark.conf.unset("spark.mnist.store")


@pytest.mark.ranks
def test_shards_go_to_petastorms_cache_where_one_is_set(spark, digits, tmp_path):
    cache = f"file://{tmp_path}/cache"
    spark.conf.set("petastorm.spark.converter.parentCacheDirUrl", cache)
    try:
        store = "memory://models-of-a-test"  # which executors cannot read
        spark_mnist.fit(digits.limit(50), "m", epochs=1, num_proc=2, store=store, verbose=0)
        assert spark_mnist.predict(digits.limit(3), "m", store=store).count() == 3
        assert spark.conf.get("petastorm.spark.converter.parentCacheDirUrl") == cache
    finally:
        spark.conf.unset("petastorm.spark.converter.parentCacheDirUrl")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def malformed(held_out):
    """Ten rows, of which three cannot be used, each for another reason."""
    numbered = held_out.limit(10).coalesce(1).withColumn("id", F.monotonically_increasing_id())
    image = (
        F.when(F.col("id") == 2, None)
        .when(F.col("id") == 5, F.substring("image", 1, 783))
        .otherwise(F.col("image"))
    )
    label = F.when(F.col("id") == 7, 10).otherwise(F.col("label"))
    return numbered.withColumns({"image": image, "label": label}).cache()


def test_a_row_that_cannot_be_used_fails_a_prediction_or_gets_null(root, malformed):
    with pytest.raises(Exception, match="a row to predict has no image of 784 pixels"):
        spark_mnist.predict(malformed, "m", store=root).collect()
    dropping = {"mode": "DROPMALFORMED", "interpret": True, "store": root, "batch_size": 3}
    rows = spark_mnist.predict(malformed, "m", **dropping).collect()
    assert [row["id"] for row in rows] == list(range(10))
    assert [row["id"] for row in rows if row["prediction"] is None] == [2, 5]
    assert [row["id"] for row in rows if row["interpreted"] is None] == [2, 5]
    good = malformed.where("id NOT IN (2, 5)")
    alone = spark_mnist.predict(good, "m", interpret=True, store=root).collect()
    assert [row for row in rows if row["prediction"] is not None] == alone


def test_rows_that_cannot_be_used_are_left_out_of_an_evaluation(root, malformed, caplog):
    with pytest.raises(errors.BadRows, match="3 of 10 rows cannot be used"):
        spark_mnist.evaluate(malformed, "m", rate=1, store=root)
    found = spark_mnist.evaluate(
        malformed, "m", rate=1, details=True, mode="DROPMALFORMED", store=root
    )
    assert found.first()["num_examples"] == 7
    assert "3 of 10 rows are left out: 1 x image has 783 pixels, not 784; 1 x image" in caplog.text
    good = spark_mnist.evaluate(malformed.where("id NOT IN (2, 5, 7)"), "m", rate=1, store=root)
    assert found.select("losses").collect() == good.select("losses").collect()


def test_a_whole_partition_without_a_row_to_use(root, held_out):
    rows = held_out.withColumn("image", F.lit(None).cast("binary"))
    found = spark_mnist.predict(rows, "m", mode="DROPMALFORMED", store=root)
    assert found.where("prediction IS NULL").count() == held_out.count()


def test_rows_that_are_left_out_of_a_fit_are_counted(malformed, digits, store):
    rows = digits.union(malformed.select(digits.columns))
    result = spark_mnist.fit(rows, "m", epochs=2, mode="DROPMALFORMED", store=store, verbose=0)
    assert (result.rows.total, result.rows.train, result.rows.validation) == (266, 210, 53)
    assert result.rows.dropped == {
        "image has 783 pixels, not 784": 1,
        "image is null": 1,
        "label is neither 0..9 nor one-hot of length 10": 1,
    }
    saved = spark_mnist.describe("m", store=store).rows
    assert saved["dropped"] == result.rows.dropped
    assert saved["read"] == [{"rank": 0, "train": 210, "validation": 53, "epochs": 2}]


def test_rows_that_a_rank_did_not_use_are_an_error(digits, store, monkeypatch):
    real = collectives.allgather_int
    monkeypatch.setattr(collectives, "allgather_int", lambda number: real(number - (number > 100)))
    with pytest.raises(errors.RowsLost, match=r"in epoch 1 .*\(204, 51\).* say .*\(205, 51\)"):
        spark_mnist.fit(digits, "m", epochs=1, store=store, verbose=0)
    assert spark_mnist.models(store) == []


def two_inputs():
    """Return a model with a category and a number as inputs."""
    import keras
    from keras import layers

    kind, size = keras.Input((1,), name="kind", dtype="int32"), keras.Input((1,), name="size")
    x = layers.Concatenate()([layers.Flatten()(layers.Embedding(3, 2)(kind)), size])
    return keras.Model([kind, size], layers.Dense(1)(x))


def absolute_error(target, value):
    return abs(target - value)


def test_a_null_in_one_of_several_inputs_and_a_loss_that_is_not_given_again(spark, store):
    rows = [(i % 3, float(i), float(i)) for i in range(40)]
    schema = "kind int, size double, label double"
    df = spark.createDataFrame(rows, schema)
    spark_mnist.fit(
        df, "m", features={"kind": "kind", "size": "size"}, task="regression", network=two_inputs,
        loss=absolute_error, epochs=1, verbose=0, store=store,
    )  # fmt: skip
    bad = spark.createDataFrame([(None, 1.0, 1.0), (1, None, 1.0), (1, 1.0, 1.0)], schema)
    predicted = spark_mnist.predict(bad, "m", mode="DROPMALFORMED", store=store).collect()
    assert [row["prediction"] is None for row in predicted] == [True, True, False]
    with pytest.raises(Exception, match="BadRows"):
        spark_mnist.predict(bad, "m", store=store).collect()
    without, given = (
        spark_mnist.evaluate(df, "m", rate=1, store=store, **options).first()
        for options in ({}, {"loss": absolute_error})
    )
    assert without["losses"] == {"loss": None}
    assert without["metrics"] == given["metrics"]
    assert given["losses"]["loss"] == pytest.approx(given["metrics"]["mae"], rel=1e-5)
