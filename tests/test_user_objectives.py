"""Losses, metrics, optimizers and models of users, in the ways that users write them."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import errors
from spark_mnist.ml import MnistClassifier
from tests.conftest import arrays, manifest

ROWS = 60
NUMBERS = {"features": ["a", "b"], "label": "p", "task": "regression", "standardize_label": False}
OPTIONS = {"batch_size": ROWS, "epochs": 3, "train_validation_ratio": 1.0, "verbose": 0}
BY_SGD = {**OPTIONS, "optimizer": "sgd", "learning_rate": 0.05}


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(size=(ROWS, 2)).astype("float32")


@pytest.fixture(scope="module")
def rows(spark, x):
    columns = "a float, b float, p double, y int, kind int, flag boolean, w double"
    data = [
        (float(a), float(b), float(2 * a - b), int(a > 0), i % 3, bool(b > 0), 0.0)
        for i, (a, b) in enumerate(x)
    ]
    return spark.createDataFrame(data, columns).repartition(2).cache()


def fit(df, store, **options):
    return spark_mnist.fit(df, "m", store=store, **{**BY_SGD, **options})


def line(**dense):
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, **dense)])


def two_outputs():
    inputs = keras.Input((2,))
    outputs = {"u": keras.layers.Dense(1)(inputs), "v": keras.layers.Dense(1)(inputs)}
    return keras.Model(inputs, outputs)


def by_keras(model, x, optimizer=None, **compiled):
    """Train plain Keras on all rows at once."""
    optimizer = optimizer or keras.optimizers.SGD(0.05)
    model.compile(optimizer=optimizer, **{"loss": "mse", **compiled})
    number = (2 * x[:, 0] - x[:, 1]).astype("float64")[:, None]
    target = {"u": number, "v": number} if isinstance(model.output, dict) else number
    return model.fit(x, target, batch_size=ROWS, epochs=3, verbose=0).history


def test_names_of_labels_stay_as_they_are(spark, x, store):
    names = [["0day", "tag1", "2x2"], [" news ", "1"], ["tag1"], []]
    data = [(float(a), float(b), names[i % 4]) for i, (a, b) in enumerate(x)]
    df = spark.createDataFrame(data, "a float, b float, tags array<string>")
    fit(df, store, features=["a", "b"], label="tags", task="multilabel")
    (output,) = manifest(store, "m")["network"]["outputs"]
    assert output["names"] == ["0day", "1", "2x2", "news", "tag1"]


@pytest.mark.parametrize("by", ["model", "function"])
def test_loss_weights_of_compile_are_used(rows, x, store, by):
    weights = {"u": 10.0, "v": 0.1}

    def compiled():
        keras.utils.set_random_seed(4)
        model = two_outputs()
        model.compile(loss={"u": "mae", "v": "mse"}, loss_weights=weights)
        return model

    change = {"label": {"u": "p", "v": "p"}, "network": compiled() if by == "model" else compiled}
    result = fit(rows, store, **{**NUMBERS, **change})
    saved = {
        output["name"]: output["weight"] for output in manifest(store, "m")["network"]["outputs"]
    }
    assert saved == weights
    if by == "model":
        model = compiled()
        history = by_keras(model, x, loss={"u": "mae", "v": "mse"}, loss_weights=weights)
        assert result.records[-1].losses["loss"] == pytest.approx(history["loss"][-1], rel=1e-5)
    for wrong, error in (({"u": 2.0}, errors.ModelMismatch), ({"x": 1.0}, errors.OptionError)):
        with pytest.raises(error, match="loss_weights"):
            fit(rows, store, continuous=True, loss_weights=wrong)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"label": {"val": "p", "o": "p"}}, "val_loss"),
        ({"label": {"a": "p", "val_a": "p"}}, "val_a_loss"),
        ({"metrics": lambda: keras.metrics.MeanAbsoluteError(name="loss")}, "loss"),
        ({"metrics": lambda: [keras.metrics.MeanMetricWrapper(abs_error, "m")] * 2}, "m"),
    ],
)
def test_two_figures_of_one_name_are_refused(rows, store, change, name):
    model = two_outputs() if "label" in change else line()
    if "label" in change:
        first, second = change["label"]
        inputs = keras.Input((2,))
        outputs = {first: keras.layers.Dense(1)(inputs), second: keras.layers.Dense(1)(inputs)}
        model = keras.Model(inputs, outputs)
    with pytest.raises(errors.OptionError, match=f"would be called '{name}'"):
        fit(rows, store, network=model, **{**NUMBERS, **change})


def abs_error(target, value):
    return ops.abs(target - value)


def my_loss(target, value):
    return ops.mean(ops.abs(target - value), axis=-1)


def test_a_metric_whose_name_ends_with_loss_is_a_metric(rows, store):
    result = fit(rows, store, network=line(), metrics=my_loss, **NUMBERS)
    assert {*result.records[0].losses} == {"loss"}
    assert "my_loss" in result.records[0].metrics


def test_large_ids_reach_a_single_input_whole(spark, store):
    ids = [123456789, 123456790, 123456791]
    df = spark.createDataFrame(
        [(ids[i % 3], float(i % 3)) for i in range(90)], "uid long, p double"
    )

    def network():
        inputs = keras.Input((1,), dtype="int64")
        encoded = keras.layers.IntegerLookup(vocabulary=ids, output_mode="one_hot")(inputs)
        return keras.Model(inputs, keras.layers.Dense(1)(encoded))

    options = {"features": "uid", "label": "p", "task": "regression", "learning_rate": 0.5}
    fit(df, store, network=network, epochs=20, batch_size=90, **options)
    predicted = spark_mnist.predict(df, "m", store=store).groupBy("uid").agg(F.max("prediction"))
    assert [round(row[1]) for row in predicted.orderBy("uid").collect()] == [0, 1, 2]
    with pytest.raises(errors.BadRows, match="a whole number above 16,777,216 as a float: cast"):
        fit(df.withColumn("uid", F.col("uid").cast("double")), store, network=network, **options)


def averaging():
    return keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)


def excluding():
    optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias", "kernel"])
    return optimizer


@pytest.mark.parametrize("optimizer", [averaging, excluding])
def test_optimizers_keep_what_their_configuration_lacks(rows, x, store, optimizer):
    model = line()
    fit(rows, store, network=model, **NUMBERS, optimizer=optimizer, learning_rate=None)
    by_keras(model, x, optimizer())
    for mine, other in zip(arrays(store, "m", 1), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_an_optimizer_that_was_used_before_is_refused(rows, store):
    used = keras.optimizers.SGD(0.05)
    used.build(line().trainable_variables)
    with pytest.raises((errors.OptionError, errors.RankError), match="a new optimizer each time"):
        fit(rows, store, network=line(), **NUMBERS, optimizer=lambda: used, learning_rate=None)


@pytest.mark.parametrize("regularizer", ["kernel_regularizer", "activity_regularizer"])
def test_the_loss_has_what_layers_add(rows, x, store, regularizer):
    model = line(**{regularizer: keras.regularizers.L2(0.1)})
    result = fit(rows, store, network=model, **NUMBERS)
    history = by_keras(model, x)
    losses = [record.losses["loss"] for record in result.records]
    np.testing.assert_allclose(losses, history["loss"], rtol=1e-5)
    for mine, other in zip(arrays(store, "m", 1), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


REFUSED = {
    "a mean over the rows": ({"loss": lambda t, o: ops.mean(ops.square(t - o), axis=0)}, "a loss for each row"),
    "one number": ({"loss": keras.losses.Dice()}, "a loss for each row"),
    "a loss of classes": (
        {"loss": keras.losses.SparseCategoricalCrossentropy()},
        "loss=sparse_categorical_crossentropy cannot be used with task=regression",
    ),
    "a metric of classes": ({"metrics": "sparse_categorical_accuracy"}, "use mae, rmse or r2"),
    "a metric of flags": ({"metrics": "auc"}, "use mae, rmse or r2"),
    "a metric that fails": (
        {"metrics": lambda: keras.metrics.MeanMetricWrapper(lambda t, o: o[:, 5], "far")},
        "metrics= has 'far', which cannot be used with task=regression",
    ),
    "a name with a blank": ({"label": {"a b": "p"}}, "names an output 'a b'; a name has letters"),
    "a feature twice": ({"features": ["a", "a"]}, "names 'a' 2 times"),
    "poisson without positive outputs": ({"network": "dnn", "loss": "poisson"}, "ends with softplus"),
    "weights that are all 0": ({"sample_weight": "w"}, "sample_weight=w is 0 in all rows"),
    "a network that raises": ({"network": lambda: 1 / 0}, "raised ZeroDivisionError: division"),
    "classes of weight 0": (
        {"label": "y", "task": None, "class_weight": {0: 0, 1: 0}, "standardize_label": None},
        "class_weight is 0 for all classes",
    ),
    "a class twice": (
        {"label": "y", "task": None, "class_weight": {0: 1, "0": 5}, "standardize_label": None},
        "names the class 0 twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_before_a_rank_starts(rows, store, case):
    change, message = case
    options = {**NUMBERS, "network": line, **change}
    if change.get("label") == "y":
        options["network"] = "dnn"
    with pytest.raises(errors.SparkMnistError, match=message) as caught:
        fit(rows, store, **options)
    assert not isinstance(caught.value, errors.TrainingError)


def test_a_function_is_looked_at_before_a_rank_starts(rows, store):
    def embedded():
        layers = keras.layers
        stack = [layers.Embedding(2, 2), layers.Flatten(), layers.Dense(3)]
        return keras.Sequential([keras.Input((1,)), *stack])

    token = {"features": "kind", "label": "kind"}
    with pytest.raises(errors.BadRows, match="none of the 2 categories"):
        fit(rows, store, network=embedded, **token)
    wide = rows.withColumn("word", F.lit("x"))
    text = lambda: keras.Sequential([  # noqa: E731
        keras.Input((1,), dtype="string"), keras.layers.StringLookup(vocabulary=["x"], output_mode="one_hot"),
        keras.layers.Dense(3),
    ])  # fmt: skip
    with pytest.raises(errors.ModelMismatch, match="takes text: index the column"):
        fit(wide, store, network=text, features="kind", label="kind")


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.CategoricalGeneralizedCrossEntropy(),
        keras.losses.CategoricalGeneralizedCrossEntropy(q=0.8),
        keras.losses.SparseCategoricalCrossentropy(),
    ],
)
def test_losses_of_class_numbers(rows, store, loss):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="softmax")])
    features = {"features": ["a", "b"], "label": "kind"}
    metrics = [keras.metrics.MeanIoU(3, sparse_y_pred=False)]
    result = fit(rows, store, network=model, loss=loss, metrics=lambda: metrics, **features)
    assert "mean_io_u" in " ".join(result.records[-1].metrics)
    spark_mnist.evaluate(rows, "m", store=store).collect()


def test_a_partial_makes_a_loss(rows, x, store):
    model = line()
    result = fit(
        rows, store, network=model, loss=functools.partial(keras.losses.Huber, delta=2.0), **NUMBERS
    )
    history = by_keras(model, x, loss=keras.losses.Huber(delta=2.0))
    assert result.records[-1].losses["loss"] == pytest.approx(history["loss"][-1], rel=1e-5)


def test_the_same_call_continues(rows, store):
    numbers = {"label": {"u": "p", "v": "p"}, "task": "regression", "network": two_outputs}
    fit(rows, store, features="A,B", standardize_label=False, **numbers)
    fit(rows, store, features="a,b", continuous=True, **numbers)
    fit(rows, store, features="a,b", continuous=True, **{**numbers, "task": {"u": "regression"}})
    named = {"x": "a*", "y": "b"}

    def joined():
        inputs = {name: keras.Input((1,), name=name) for name in named}
        return keras.Model(
            inputs, keras.layers.Dense(1)(keras.layers.Concatenate()([*inputs.values()]))
        )

    options = {**BY_SGD, **NUMBERS, "features": named, "network": joined, "store": store}
    spark_mnist.fit(rows, "named", **options)
    assert spark_mnist.fit(rows, "named", **options, continuous=True).version == 2


def test_many_numbers_are_learned(spark, store):
    df = spark.range(20).select(
        F.col("id").cast("float").alias("a"), F.array_repeat(F.col("id") * 1.0, 1200).alias("p")
    )
    fit(df, store, network="dnn", **{**NUMBERS, "features": "a"})
    assert len(spark_mnist.predict(df, "m", store=store).first()["prediction"]) == 1200


def test_labels_beyond_floats_are_bad_rows(rows, store):
    far = rows.withColumn("p", F.when(F.col("kind") == 1, 1e40).otherwise(F.col("p")))
    with pytest.raises(errors.BadRows, match=r"20 x p is a number beyond 3\.4e\+38"):
        fit(far, store, network=line, **NUMBERS)


def test_a_rate_of_zero_is_a_rate(rows, store):
    def callbacks():
        return [keras.callbacks.LearningRateScheduler(lambda epoch: 0.0 if epoch < 1 else 0.05)]

    model = line()
    before = [array.copy() for array in model.get_weights()]
    fit(rows, store, network=model, callbacks=callbacks, epochs=1, **NUMBERS)
    for mine, other in zip(arrays(store, "m", 1), before, strict=True):
        np.testing.assert_array_equal(mine, other)
    fit(rows, store, callbacks=callbacks, epochs=1, continuous=True)
    assert not np.array_equal(arrays(store, "m", 2)[0], before[0])


def test_columns_that_predict_does_not_add_may_be_there(rows, store):
    fit(rows, store, network=line, **NUMBERS)
    taken = rows.withColumn("interpreted", F.lit(1))
    assert spark_mnist.predict(taken, "m", interpret=True, store=store).columns[-1] == "prediction"
    with pytest.raises(errors.ColumnTaken, match="'prediction'"):
        spark_mnist.predict(rows.withColumn("prediction", F.lit(1)), "m", store=store)


def test_booleans_are_features(rows, store):
    fit(rows, store, network="dnn", **{**NUMBERS, "features": "flag"})
    pair = rows.withColumn("flags", F.array("flag", ~F.col("flag")))
    spark_mnist.fit(
        pair, "pair", network="dnn", store=store, **BY_SGD, **{**NUMBERS, "features": "flags"}
    )


def test_a_field_of_a_struct_is_selected_first(rows, store):
    nested = rows.select("*", F.struct("a", "b").alias("st"))
    with pytest.raises(
        errors.MissingColumn, match=r"select the field first: df.select\('\*', 'st.a'\)"
    ):
        fit(nested, store, network=line, **{**NUMBERS, "features": ["st.a", "b"]})
    with pytest.raises(errors.MissingColumn) as caught:
        fit(nested, store, network=line, **{**NUMBERS, "features": ["a.b", "b"]})
    assert "select the field" not in str(caught.value)  # a is no struct


def test_weights_that_a_callback_gives_back_are_not_averaged(rows, store):
    def callbacks():
        return [keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)]

    options = {**NUMBERS, "optimizer": averaging, "learning_rate": None, "callbacks": callbacks}
    model = line()
    fit(rows, store, network=model, **options)
    by_callback = [array.copy() for array in arrays(store, "m", 1)]
    spark_mnist.fit(
        rows, "plain", network=model, store=store,
        **{**BY_SGD, **NUMBERS, "optimizer": "sgd"},
    )  # fmt: skip
    for mine, other in zip(by_callback, arrays(store, "plain", 1), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_can_be_given_again(rows, store, nested):
    model = keras.Sequential([keras.Input((2,)), line()]) if nested else line()
    for name in ("one", "two", "three"):
        spark_mnist.fit(rows, name, network=model, store=store, **BY_SGD, **NUMBERS)
    for mine, other in zip(arrays(store, "one", 1), arrays(store, "three", 1), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_names_of_outputs_may_have_dashes_and_dots(rows, store):
    names = {"out-1": "p", "v.2": "p", "_w": "p"}

    def network():
        inputs = keras.Input((2,))
        return keras.Model(inputs, {name: keras.layers.Dense(1)(inputs) for name in names})

    result = fit(rows, store, network=network, **{**NUMBERS, "label": names})
    assert {"out-1_loss", "v.2_loss", "_w_loss"} <= {*result.records[0].losses}
    predicted = spark_mnist.predict(rows, "m", store=store)
    assert predicted.columns[-3:] == ["prediction_out-1", "prediction_v.2", "prediction__w"]
    assert None not in predicted.first()[-3:]
    spark_mnist.evaluate(rows, "m", store=store).collect()


def test_weights_of_boolean_classes(rows, store):
    classes = {"features": ["a", "b"], "label": "flag", "network": "dnn"}
    fit(rows, store, class_weight={False: 1.0, True: 2.0}, **classes)
    fit(rows.withColumn("flag", F.col("y") * 1.0), store, class_weight={0.0: 1, 1.0: 2}, **classes)


def test_exported_labels_keep_their_precision(rows, store, tmp_path):
    far = rows.withColumn("p", F.col("p") + 1e9)
    fit(far, store, network="dnn", **{**NUMBERS, "standardize_label": True})
    path = tmp_path / "m.keras"
    spark_mnist.export("m", path, store=store)
    predicted = spark_mnist.predict(far, "m", store=store).toPandas()
    values = keras.models.load_model(path)(predicted[["a", "b"]].to_numpy("float32"))
    np.testing.assert_allclose(np.ravel(values), predicted["prediction"], atol=1e-3, rtol=0)
    with pytest.raises(errors.OptionError, match="features or labels of model 'm' are so far"):
        spark_mnist.export("m", tmp_path / "m.tflite", format="tflite", store=store)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"thresholds": [-1.0, 0.5]}, "thresholds must be >= 0"),
        ({"thresholds": [0.0, 0.0]}, "thresholds must be >= 0"),
        ({"probabilityCol": "o", "predictionCol": "o"}, "need different names"),
    ],
)
def test_params_are_checked_before_training(rows, store, params, message):
    estimator = MnistClassifier(featuresCol="a", labelCol="y", store=store, modelName="m", **params)
    with pytest.raises(errors.OptionError, match=message):
        estimator.fit(rows)
    assert spark_mnist.models(store) == []
