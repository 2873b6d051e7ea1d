"""Tasks, weights, inputs and functions that do not fit: refused before a rank starts."""

import keras
import numpy as np
import pytest

import spark_mnist
from spark_mnist import errors


@pytest.fixture(scope="module")
def table(spark):
    columns = (
        "id * 1.0D AS size",
        "(id % 7) * 10 AS code",
        "id % 2 AS label",
        "concat('c', id % 5) AS town",
        "array(id % 2, (id + 1) % 2) AS flags",
        "if(id = 3, NULL, 1.0D) AS missing",
        "1.0D - id AS negative",
        "id / 2 AS half",
        "if(id = 5, double('inf'), 1.0D) AS infinite",
    )
    return spark.range(60).selectExpr(*columns).cache()


def network(units=2):
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(units)])


def embedded(size):
    """A network that looks each number up in a table of ``size``."""
    layers = [keras.layers.Embedding(size, 2), keras.layers.Flatten(), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((1,)), *layers])


def whole_numbers():
    """A network of two inputs, of which one is of integers."""
    code = keras.Input((1,), dtype="int64", name="code")
    size = keras.Input((1,), name="size")
    joined = keras.layers.Concatenate()([keras.layers.Rescaling(1.0)(code), size])
    return keras.Model({"code": code, "size": size}, keras.layers.Dense(2)(joined))


def two_inputs():
    inputs = {"code": keras.Input((1,), name="code"), "size": keras.Input((1,), name="size")}
    joined = keras.layers.Concatenate()([*inputs.values()])
    return keras.Model(inputs, keras.layers.Dense(2)(joined))


REFUSED = {
    "a loss of another task": (
        {"task": "regression", "label": "size", "loss": "binary_crossentropy"},
        errors.OptionError,
        "loss=binary_crossentropy cannot be used with task=regression, .* one for task=binary or multi",
    ),
    "a loss that there is not": (
        {"task": "binary", "loss": "binary_crossentropi"},
        errors.OptionError,
        "did you mean 'binary_crossentropy'",
    ),
    "a function that makes no loss": (
        {"loss": lambda: 3},
        errors.OptionError,
        "loss= must make a loss",
    ),
    "a metric that there is not": (
        {"metrics": "auc,precisoin"},
        errors.OptionError,
        "metrics=precisoin is not a metric of Keras.*did you mean 'precision'",
    ),
    "a standardized label for a loss that compares with 0": (
        {"task": "regression", "label": "size", "loss": "msle", "standardize_label": True},
        errors.OptionError,
        "standardize_label=true moves",
    ),
    "a label of text for numbers": (
        {"task": "regression", "label": "town"},
        errors.BadRows,
        "60 of 60 rows cannot be used: 60 x town is no finite number",
    ),
    "a label of many classes for two": (
        {"task": "binary", "label": "code"},
        errors.BadRows,
        "column 'code' has 7 classes, and task=binary takes two",
    ),
    "a label of one number for labels": (
        {"task": "multilabel"},
        errors.UnreadableColumn,
        "column 'label' is bigint; with task=multilabel the label is an array",
    ),
    "a category that the network does not have": (
        {"features": "code", "network": embedded(50)},
        errors.BadRows,
        "16 of 60 rows .* 16 x code has a number that is none of the 50 categories of the network's",
    ),
    "a category below 0": (
        {"features": "negative", "network": embedded(50)},
        errors.BadRows,
        "58 of 60 rows .* 58 x negative has a number that is none of the 50 categories",
    ),
    "a fraction for an input of integers": (
        {"features": {"code": ["half"], "size": ["size"]}, "network": whole_numbers},
        errors.BadRows,
        "30 of 60 rows .* 30 x half has a number that is not whole, as the network's input is",
    ),
    "a feature that is null": (
        {"features": "missing", "network": network()},
        errors.BadRows,
        "1 of 60 rows cannot be used: 1 x missing is missing or no finite float32",
    ),
    "a weight that is null": (
        {"sample_weight": "missing"},
        errors.BadRows,
        "1 of 60 rows cannot be used: 1 x missing is null",
    ),
    "a weight that is negative": (
        {"sample_weight": "negative"},
        errors.BadRows,
        "58 x negative is negative",
    ),
    "a weight that is infinite": (
        {"sample_weight": "infinite"},
        errors.BadRows,
        "1 x infinite is no finite number",
    ),
    "a weight of text": (
        {"sample_weight": "town"},
        errors.UnreadableColumn,
        "sample_weight=town: column 'town' is string",
    ),
    "a weight of a class that there is not": (
        {"class_weight": {"x": 2.0}},
        errors.OptionError,
        "class_weight names the class 'x', and the classes are 0, 1",
    ),
    "weights of classes for numbers": (
        {"task": "regression", "label": "size", "class_weight": "balanced"},
        errors.OptionError,
        "class_weight is for one output that learns classes",
    ),
    "an input that the model does not have": (
        {"features": {"code": "code", "length": "size"}, "network": two_inputs},
        errors.ModelMismatch,
        "the network has the inputs code, size, and features= names code, length",
    ),
    "an input of another size": (
        {"features": {"code": ["code", "size"], "size": "size"}, "network": two_inputs},
        errors.ModelMismatch,
        "input 'code' of the network takes rows of shape .1,., and its columns have 2 numbers",
    ),
    "several inputs for a network of the library": (
        {"features": {"code": "code", "size": "size"}},
        errors.OptionError,
        "mlp has one input, and features= names several|dnn has one input",
    ),
    "an output that the model does not have": (
        {"label": {"a": "label", "b": "label"}, "network": network},
        errors.ModelMismatch,
        "the network has the outputs .*, and label= names a, b",
    ),
    "a task of an output that there is not": (
        {"task": {"price": "regression"}},
        errors.OptionError,
        "task= names an output 'price'",
    ),
    "two units for one of two classes": (
        {"task": "binary", "network": network},
        errors.ModelMismatch,
        "the network gives 2 numbers a row, and task=binary takes one",
    ),
    "another number of units than numbers": (
        {"task": "regression", "label": "size", "network": network},
        errors.ModelMismatch,
        "the network gives 2 numbers a row, and there are 1 numbers to predict",
    ),
    "a feature of text": (
        {"features": "town"},
        errors.BadRows,
        r"town is text, and features are numbers: index it, with\n    indexer = StringIndexer",
    ),
    "an optimizer that is none": (
        {"optimizer": lambda: "adam"},
        errors.OptionError,
        "optimizer= must make an optimizer of Keras",
    ),
    "an optimizer with a schedule of Keras": (
        {
            "optimizer": lambda: keras.optimizers.SGD(
                keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.9)
            )
        },
        errors.OptionError,
        "the optimizer has a schedule of Keras: give it a number",
    ),
    "a backup of Keras": (
        {"callbacks": lambda: [keras.callbacks.BackupAndRestore("/tmp/backup")]},
        errors.OptionError,
        "callbacks= makes a BackupAndRestore, which a fit does not take",
    ),
    "callbacks that are none": (
        {"callbacks": lambda: ["EarlyStopping"]},
        errors.OptionError,
        "callbacks= must make callbacks of Keras, not 'EarlyStopping'",
    ),
}


@pytest.mark.parametrize(("options", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(table, store, options, error, words):
    made = options.get("network")
    if made in (network, two_inputs):
        options = {**options, "network": made()}
    with pytest.raises(error, match=f"(?s){words}"):
        spark_mnist.fit(table, "m", store=store, verbose=0, **{"features": "size", **options})


def test_layers_that_were_adapted_before_work(table, store):
    code = keras.Input((1,), dtype="int64", name="code")
    size = keras.Input((1,), name="size")
    lookup, bins = keras.layers.IntegerLookup(), keras.layers.Discretization(num_bins=4)
    scale = keras.layers.Normalization(axis=None)
    lookup.adapt(np.arange(7) * 10)
    bins.adapt(np.arange(60.0))
    scale.adapt(np.arange(60.0))
    parts = [
        keras.layers.Flatten()(keras.layers.Embedding(9, 2)(lookup(code))),
        keras.layers.Flatten()(keras.layers.Embedding(5, 2)(bins(size))),
        scale(size),
    ]
    model = keras.Model([code, size], keras.layers.Dense(2)(keras.layers.Concatenate()(parts)))
    features = {"code": "code", "size": "size"}
    options = {"features": features, "verbose": 0, "store": store, "batch_size": 8}
    spark_mnist.fit(table, "m", network=model, epochs=2, **options)
    spark_mnist.fit(table, "m", continuous=True, epochs=1, verbose=0, store=store)
    rows = spark_mnist.predict(table, "m", probabilities=True, store=store).toPandas()
    path = spark_mnist.export("m", f"{store}/m.keras", store=store)
    exported = keras.models.load_model(path)
    expected = exported.predict(
        {"code": rows[["code"]].to_numpy(), "size": rows[["size"]].to_numpy()}, verbose=0
    )
    np.testing.assert_allclose(np.stack(rows["probability"]), expected, atol=1e-6)


def test_rows_of_no_category_get_null_and_the_others_are_predicted(table, store):
    options = {"features": "code", "store": store, "verbose": 0}
    spark_mnist.fit(table, "m", network=embedded(70), epochs=1, **options)
    strange = table.selectExpr("IF(size < 4, size + 68.5, code) AS code", "size")
    lenient = spark_mnist.predict(strange, "m", store=store, mode="DROPMALFORMED").collect()
    assert {row["size"] for row in lenient if row["prediction"] is None} == {0, 1, 2, 3}
    with pytest.raises(Exception, match="none of the 70 categories of the network's Embedding"):
        spark_mnist.predict(strange, "m", store=store).collect()
