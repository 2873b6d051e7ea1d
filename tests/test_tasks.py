"""Tasks, losses, weights and optimizers on two ranks, against plain Keras on the same rows.

A step takes all training rows, so that the order of the rows does not matter.
"""

import io

import keras
import numpy as np
import pytest
from PIL import Image
from pyspark.sql import functions as F
from pyspark.sql.types import BinaryType

import spark_mnist
from spark_mnist import datasets
from tests.conftest import arrays

pytestmark = pytest.mark.ranks

ROWS, TRAIN = 101, 81
COLUMNS = ["a", "b", "c"]
OPTIONS = {
    "features": COLUMNS,
    "validation_indicator": "held_out",
    "num_proc": 2,
    "batch_size": 41,
    "epochs": 3,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "verbose": 0,
}


@pytest.fixture(scope="module")
def table():
    """Columns of the rows that all tests learn from."""
    random = np.random.default_rng(3)
    x = random.normal(size=(ROWS, 3)).astype("float32")
    number = x @ [1.0, -2.0, 0.5] + random.normal(size=ROWS) / 10
    return {
        "x": x,
        "number": number,
        "pair": np.stack([number, x[:, 0] * 3], axis=1),
        "flag": (number > 0.3).astype(int),
        "kind": np.digitize(number, [-1, 1]),
        "flags": (x > 0).astype(int),
        "weight": random.integers(0, 4, ROWS) / 2,
        "city": np.arange(ROWS) % 5,
    }


@pytest.fixture(scope="module")
def rows(spark, table):
    records = [
        (
            *map(float, table["x"][i]),
            float(table["number"][i]),
            table["pair"][i].tolist(),
            int(table["flag"][i]),
            int(table["kind"][i]),
            table["flags"][i].tolist(),
            float(table["weight"][i]),
            int(table["city"][i]),
            i >= TRAIN,
        )
        for i in range(ROWS)
    ]
    schema = (
        "a float, b float, c float, number double, pair array<double>, flag int, kind int, "
        "flags array<int>, weight double, city long, held_out boolean"
    )
    return spark.createDataFrame(records, schema).repartition(3).cache()


def network(units, activation=None):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(units, activation=activation),
        ]
    )


def rmspe(y_true, y_pred):
    return keras.ops.square((y_true - y_pred) / (1 + keras.ops.abs(y_true)))


class Clipped(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.minimum(keras.ops.abs(y_true - y_pred), 1.0)


def lion():
    return keras.optimizers.Lion(0.005)


def half_huber():
    return keras.losses.Huber(0.5)


CASES = {
    "a number": ("number", 1, None, {"task": "regression"}, {"loss": "mse", "metrics": ["mae"]}),
    "two numbers": (
        *("pair", 2, None, {"task": "regression", "loss": "mae"}),
        {"loss": "mae", "metrics": ["mse"]},
    ),
    "two numbers and weights, streamed": (
        *("pair", 2, None, {"task": "regression", "sample_weight": "weight", "cache": "none"}),
        {"loss": "mse", "metrics": ["mae"]},
    ),
    "two classes": (
        *("flag", 1, "sigmoid", {"task": "binary"}),
        {"loss": "binary_crossentropy", "metrics": ["accuracy", "auc", "precision", "recall"]},
    ),
    "two classes, logits": (
        *("flag", 1, None, {"task": "binary"}),
        {"loss": keras.losses.BinaryCrossentropy(from_logits=True), "metrics": []},
    ),
    "labels": (
        *("flags", 3, "sigmoid", {"task": "multilabel"}),
        {"loss": "binary_crossentropy", "metrics": ["binary_accuracy"]},
    ),
    "classes": ("kind", 3, "softmax", {}, {"loss": "sparse_categorical_crossentropy"}),
    "classes by a one-hot loss": (
        *("kind", 3, "softmax", {"loss": "categorical_focal_crossentropy", "metrics": "f1_score"}),
        {"loss": "categorical_focal_crossentropy", "metrics": ["f1_score"]},
    ),
    "a weight of each row": (
        *("number", 1, None, {"task": "regression", "sample_weight": "weight"}),
        {"loss": "mse", "metrics": ["mae"]},
    ),
    "weights of classes": (
        *("flag", 1, "sigmoid", {"task": "binary", "class_weight": {0: 0.5, 1: 3.0}}),
        {"loss": "binary_crossentropy", "metrics": ["auc"]},
    ),
    "weights of classes and rows": (
        *("kind", 3, "softmax", {"class_weight": {0: 2, 2: 0.25}, "sample_weight": "weight"}),
        {"loss": "sparse_categorical_crossentropy"},
    ),
    "a function as loss and as metric": (
        *("number", 1, None, {"task": "regression", "loss": rmspe, "metrics": [rmspe]}),
        {"loss": rmspe, "metrics": [rmspe]},
    ),
    "a class as loss": (
        *("number", 1, None, {"task": "regression", "loss": Clipped}),
        {"loss": Clipped(), "metrics": []},
    ),
    "a function that makes a loss": (
        *("number", 1, None, {"task": "regression", "loss": half_huber}),
        {"loss": keras.losses.Huber(0.5), "metrics": []},
    ),
    "an optimizer of the user's": (
        *("number", 1, None, {"task": "regression", "optimizer": "Lion", "learning_rate": None}),
        {"loss": "mse", "metrics": []},
    ),
    "clipped gradients": (
        *("number", 1, None, {"task": "regression", "clipnorm": 0.1}),
        {"loss": "mse", "metrics": []},
    ),
    "gradients of three steps": (
        *("number", 1, None, {"task": "regression", "accumulate_steps": 3}),
        {"loss": "mse", "metrics": []},
    ),
}


def plain(table, model, label, options, compiled):
    """Train plain Keras on all training rows at once; return its history."""
    y = table[label]
    y = y.reshape(ROWS, -1).astype("float32") if label != "kind" else y
    if options.get("loss") == "categorical_focal_crossentropy":
        y = keras.utils.to_categorical(y, 3)
    optimizer = keras.optimizers.SGD(
        0.1,  # that of two ranks
        clipnorm=options.get("clipnorm"),
        gradient_accumulation_steps=options.get("accumulate_steps"),
    )
    if options.get("optimizer") == "Lion":
        optimizer = keras.optimizers.Lion(0.01)
    model.compile(optimizer=optimizer, **{"metrics": ["accuracy"], **compiled})
    weight = table["weight"] if "sample_weight" in options else np.ones(ROWS)
    of_class = options.get("class_weight", {})
    factors = np.array([of_class.get(number, 1.0) for number in table[label]]) if of_class else 1
    history = model.fit(
        *(table["x"][:TRAIN], y[:TRAIN]),
        sample_weight=(weight * factors)[:TRAIN],  # Keras refuses weights of both kinds at once
        validation_data=(table["x"][TRAIN:], y[TRAIN:], weight[TRAIN:]),
        batch_size=TRAIN,
        epochs=3,
        shuffle=False,
        verbose=0,
    )
    return history.history


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_ranks_train_as_keras_does(rows, table, store, case):
    label, units, activation, options, compiled = case
    model = network(units, activation)
    change = {name: value for name, value in options.items() if value != "Lion"}
    if "Lion" in options.values():
        change["optimizer"] = lion
    result = spark_mnist.fit(
        rows, "m", label=label, network=model, store=store, **{**OPTIONS, **change}
    )
    history = plain(table, model, label, options, compiled)
    for mine, other in zip(arrays(store, "m", 1), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    for epoch, record in enumerate(result.records):
        figures = {**record.losses, **record.metrics}
        names = {"binary_accuracy": "accuracy"}
        for name, values in history.items():
            expected = np.ravel(values[epoch])
            prefix = "val_" if name.startswith("val_") else ""
            bare = name.removeprefix("val_")
            bare = prefix + (names.get(bare, bare) if units == 3 else bare)
            mine = (
                [figures[bare]]
                if bare in figures
                else [figures[f"{bare}_{number}"] for number in range(len(expected))]
            )
            np.testing.assert_allclose(mine, expected, atol=1e-5, err_msg=f"{name}, {epoch}")


@pytest.mark.parametrize("cache", ["1g", "none"])
def test_several_inputs_and_outputs_train_as_keras_does(rows, table, store, cache):
    def make():
        keras.utils.set_random_seed(1)
        numbers = keras.Input((3,), name="numbers")
        city = keras.Input((1,), dtype="int32", name="city")
        place = keras.layers.Flatten()(keras.layers.Embedding(5, 2)(city))
        joined = keras.layers.Concatenate()([numbers, place])
        hidden = keras.layers.Dense(8, activation="tanh")(joined)
        price = keras.layers.Dense(1, name="price")(hidden)
        kind = keras.layers.Dense(3, activation="softmax", name="kind")(hidden)
        return keras.Model([numbers, city], [price, kind])

    model = make()
    result = spark_mnist.fit(
        rows,
        "m",
        network=model,
        store=store,
        **{
            **OPTIONS,
            "features": {"numbers": COLUMNS, "city": "city"},
            "label": {"price": "number", "kind": "kind"},
            "task": {"price": "regression"},
            "loss_weights": {"kind": 0.5},
            "sample_weight": "weight",
            "cache": cache,
        },
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=["mse", "sparse_categorical_crossentropy"],
        loss_weights=[1.0, 0.5],
    )
    x = {"numbers": table["x"], "city": table["city"].reshape(-1, 1)}
    y = {"price": table["number"].astype("float32"), "kind": table["kind"]}
    history = model.fit(
        {name: values[:TRAIN] for name, values in x.items()},
        [values[:TRAIN] for values in y.values()],
        sample_weight=[table["weight"][:TRAIN]] * 2,
        batch_size=TRAIN,
        epochs=3,
        shuffle=False,
        verbose=0,
    ).history
    for mine, other in zip(arrays(store, "m", 1), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    for epoch, record in enumerate(result.records):
        for name in ("loss", "price_loss", "kind_loss"):
            assert record.losses[name] == pytest.approx(history[name][epoch], abs=1e-5)
    predicted = spark_mnist.predict(rows, "m", probabilities=True, store=store).toPandas()
    price, kind = model.predict(
        {
            "numbers": predicted[COLUMNS].to_numpy("float32"),
            "city": predicted[["city"]].to_numpy(),
        },
        verbose=0,
    )
    np.testing.assert_allclose(predicted["prediction_price"], price[:, 0], atol=1e-5)
    np.testing.assert_allclose(np.stack(predicted["probability_kind"]), kind, atol=1e-5)
    assert (np.stack(predicted["prediction_kind"]).argmax(1) == kind.argmax(1)).all()
    measured = spark_mnist.evaluate(rows.where("held_out"), "m", rate=1.0, store=store).first()
    last = result.records[-1]
    weighted = spark_mnist.describe("m", store=store)
    assert measured["metrics"]["price_mae"] == pytest.approx(last.metrics["val_price_mae"])
    assert measured["metrics"]["kind_accuracy"] == last.metrics["val_kind_accuracy"]
    assert [output.name for output in weighted.network.outputs] == ["price", "kind"]


def test_balanced_classes_weigh_the_same(rows, table, store):
    model = network(3, "softmax")
    change = {"class_weight": "balanced", "network": model, "label": "kind"}
    result = spark_mnist.fit(rows, "m", store=store, **{**OPTIONS, **change})
    counts = np.bincount(table["kind"][:TRAIN])
    weights = {number: TRAIN / 3 / count for number, count in enumerate(counts)}
    compiled = {"loss": "sparse_categorical_crossentropy"}
    history = plain(table, model, "kind", {"class_weight": weights}, compiled)
    assert result.records[-1].losses["loss"] == pytest.approx(history["loss"][-1], abs=1e-5)


def two_heads():
    numbers = keras.Input((3,), name="numbers")
    city = keras.Input((1,), dtype="int32", name="city")
    place = keras.layers.Flatten()(keras.layers.Embedding(5, 2)(city))
    joined = keras.layers.Concatenate()([numbers, place])
    hidden = keras.layers.Dense(8, activation="tanh")(joined)
    outputs = {"price": keras.layers.Dense(1)(hidden), "kind": keras.layers.Dense(3)(hidden)}
    return keras.Model({"numbers": numbers, "city": city}, outputs)


SEVERAL = {
    "features": {"numbers": COLUMNS, "city": "city"},
    "label": {"price": "number", "kind": "kind"},
    "task": {"price": "regression"},
    "loss": {"price": rmspe},
    "standardize_label": True,
    "sample_weight": "weight",
    "network": two_heads,
    "optimizer": lion,
}


def looked_up():
    """Learn from a number of a list that the network knows."""
    keras.utils.set_random_seed(1)
    place = keras.layers.IntegerLookup(vocabulary=[0, 1, 2, 3], output_mode="one_hot")
    city = keras.Input((1,), dtype="int64", name="city")
    return keras.Model(city, keras.layers.Dense(3, activation="softmax")(place(city)))


def augmenting():
    """Turn pictures before they are learned, and drop some of what is seen."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.RandomRotation(0.1, seed=3),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.2, seed=4),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


@F.udf(BinaryType())
def png(city):
    """Make an image file with a bright column for each city."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, city] = 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def with_pictures(rows):
    """Add a column of pixels that were image files."""
    files = rows.withColumn("picture", png("city"))
    return datasets.decode(files, "picture", size=(8, 8), mode="L")


CONTINUED = {
    "several inputs and outputs": SEVERAL,
    "numbers, standardized": {
        "label": "pair",
        "task": "regression",
        "standardize_label": True,
        "sample_weight": "weight",
    },
    "labels": {"label": "flags", "task": "multilabel", "accumulate_steps": 3},
    "an optimizer of the user's": {"label": "flag", "task": "binary", "optimizer": lion},
    "a loss of the user's": {"label": "number", "task": "regression", "loss": rmspe},
    "two classes, clipped": {"label": "flag", "task": "binary", "clipnorm": 0.1},
    "balanced classes": {"label": "kind", "class_weight": "balanced"},
    "numbers that the network looks up": {
        "features": "city",
        "label": "kind",
        "network": looked_up,
    },
    "image files, augmented by the network": {
        "features": "picture",
        "label": "kind",
        "network": augmenting,
    },
}


@pytest.mark.parametrize("options", CONTINUED.values(), ids=CONTINUED)
def test_two_epochs_and_three_are_five(rows, store, options):
    shared = {"batch_size": 8, "store": store, "verbose": 0, "launcher": "in-process"}
    again = {
        name: value
        for name, value in options.items()
        if callable(value) or name in ("sample_weight", "class_weight", "loss")
    }
    options = {"features": COLUMNS, **options}
    if options["features"] == "picture":
        rows = with_pictures(rows)
    spark_mnist.fit(rows, "whole", epochs=5, **options, **shared)
    spark_mnist.fit(rows, "parts", epochs=2, **options, **shared)
    spark_mnist.fit(rows, "parts", epochs=3, continuous=True, **again, **shared)
    for file in ("weights.npz", "optimizer.npz"):
        parts, whole = arrays(store, "parts", 2, file), arrays(store, "whole", 1, file)
        for mine, other in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_standardized_labels_predict_in_their_own_units(rows, store):
    far = rows.withColumn("far", 1e6 + 1000 * F.col("number"))
    options = {**OPTIONS, "epochs": 60, "optimizer": "adam", "learning_rate": 0.01}
    spark_mnist.fit(far, "m", label="far", task="regression", store=store, **options)
    row = spark_mnist.evaluate(far, "m", rate=1.0, store=store).first()
    assert row["metrics"]["r2"] > 0.9
    assert row["metrics"]["rmse"] == pytest.approx(row["metrics"]["mse"] ** 0.5)
    predicted = spark_mnist.predict(far, "m", store=store).toPandas()
    errors = predicted["prediction"] - predicted["far"]
    assert (errors**2).mean() == pytest.approx(row["metrics"]["mse"])


def test_what_a_model_was_compiled_with_is_used(rows, table, store):
    model = network(1)
    model.compile(loss=keras.losses.Huber(0.5), metrics=["mape"])
    change = {"network": model, "label": "number", "task": "regression"}
    result = spark_mnist.fit(rows, "m", store=store, **{**OPTIONS, **change})
    expected = plain(table, model, "number", {}, {"loss": keras.losses.Huber(0.5), "metrics": []})
    assert result.records[-1].losses["loss"] == pytest.approx(expected["loss"][-1], abs=1e-5)
    assert "mape" in result.records[-1].metrics
    row = spark_mnist.evaluate(rows.where("held_out"), "m", rate=1.0, store=store).first()
    assert row["losses"]["loss"] == pytest.approx(result.records[-1].losses["val_loss"], rel=1e-5)
