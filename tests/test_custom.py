"""Models that users bring: described, trained on two ranks, applied, and never trusted."""

import dataclasses
import importlib
import json
import logging
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import spark_mnist
from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.networks import custom, registry
from spark_mnist.store import model_store
from tests.conftest import arrays, custom_model

ROWS = {"batch_size": 16, "verbose": 0}
BARE = plan.Network(name=plan.CUSTOM, inputs=784, classes=10)


def picture_model():
    """Takes images as [28, 28, 1] and gives logits; notes statistics of its batches."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(4, 5, strides=3, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def double_model():
    """Two ways through the network, joined by operators; gives probabilities."""
    inputs = keras.Input((784,))
    x = layers.Dense(16, activation=keras.activations.gelu)(inputs)
    y = layers.Dense(16, activation="tanh")(inputs)
    outputs = layers.Dense(10, activation="softmax")(x + y * 0.5)
    return keras.Model(inputs, outputs)


def sliced_model():
    """Takes rows and columns apart with what Keras writes for brackets and casts."""
    inputs = keras.Input((28, 28))
    x = keras.ops.cast(inputs[:, ::2, ...], "float32")
    x = keras.ops.image.resize(x[..., None], (7, 7))
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def nested_model():
    """Layers and models within layers, which Keras takes apart when it reads them."""
    inputs = keras.Input((28, 28))
    x = layers.TimeDistributed(layers.Dense(5))(inputs)
    x = layers.RNN(layers.LSTMCell(6))(x)
    tail = keras.Input((6,))
    inner = keras.Model(tail, layers.Dense(10)(tail))
    return keras.Sequential([inputs, keras.Model(inputs, x), inner])


def renamed_model():
    """Bears the name of one of Keras's activations on another function."""

    def relu(x):
        return keras.ops.clip(x, 0, 0.05)

    inputs = keras.Input((784,))
    return keras.Model(inputs, layers.Dense(10)(layers.Dense(16, activation=relu)(inputs)))


def accuracy(df, name, **options):
    (row,) = spark_mnist.evaluate(df, name, rate=1, **options).collect()
    return row["metrics"]["accuracy"]


@pytest.mark.parametrize(
    ("make", "logits", "shape"),
    [
        (picture_model, True, (28, 28, 1)),
        (double_model, False, None),
        (sliced_model, True, (28, 28)),
        (nested_model, True, (28, 28)),
    ],
)
def test_a_model_is_made_again_from_its_description(make, logits, shape):
    model = make()
    described = custom.describe(model, BARE)
    assert (described.heads[0].logits, described.custom) == (logits, ())
    saved = json.loads(json.dumps(described.config))
    network = plan.Network(**{**vars(described), "config": saved})
    registry.build(network)
    again = registry.build(network)
    assert network.config == described.config  # what was built took nothing away
    again.set_weights(registry.build(described, model).get_weights())
    rows = np.random.default_rng(1).random((5, 784), "float32")
    outputs = model(rows.reshape(5, *(shape or (784,))))
    expected = keras.ops.softmax(outputs) if logits else outputs
    np.testing.assert_allclose(again(rows), expected, atol=1e-6)


def test_a_function_named_like_one_of_keras_is_noticed():
    assert custom.describe(renamed_model(), BARE).custom == (
        "a function named like one of Keras's",
    )


def test_a_model_without_an_input_layer_takes_any_number_of_rows():
    bare = keras.Sequential([layers.Dense(10, name="features")])
    described = custom.describe(bare, BARE)
    assert registry.build(described)(np.zeros((7, 784), "float32")).shape == (7, 10)
    called = keras.Sequential([layers.Dense(10)])
    called(np.zeros((32, 784), "float32"))
    again = custom.describe(called, BARE)
    custom.check_same(described, again)
    assert registry.build(again)(np.zeros((7, 784), "float32")).shape == (7, 10)
    outer = keras.Sequential([keras.Input((784,)), layers.Dense(10)], name="features")
    assert registry.build(custom.describe(outer, BARE), outer).count_params() == 7850


def test_what_compile_added_is_no_part_of_the_description():
    model = double_model()
    plain = custom.describe(model, BARE)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    assert custom.describe(model, BARE) == plain


def test_the_names_of_layers_make_no_other_model():
    first, second = (custom.describe(double_model(), BARE) for _ in range(2))
    assert first.config != second.config  # Keras counts layers up
    custom.check_same(first, second)
    half = json.loads(json.dumps(first.config).replace("float32", "float16"))
    renamed = json.loads(json.dumps(first.config).replace('"gelu"', '"relu"'))
    for other in (half, renamed):
        with pytest.raises(errors.ModelMismatch, match="or the same with other settings"):
            custom.check_same(first, dataclasses.replace(first, config=other))
    with pytest.raises(errors.ModelMismatch, match=r"Dense, Dense.*now makes .*Conv2D"):
        custom.check_same(first, custom.describe(picture_model(), BARE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.Sequential([keras.Input((784,)), layers.Dense(7)]), "gives 7 numbers a row"),
        (
            lambda: keras.Sequential([keras.Input((32, 32)), layers.Flatten(), layers.Dense(10)]),
            r"takes rows of shape \(32, 32\); a row of the features has 784",
        ),
        (lambda: "mlp", "must make a Keras model, not str"),
        (
            lambda: keras.Sequential([keras.Input((784,)), layers.Dense(10, "sigmoid")]),
            "ends with a sigmoid; end it with a softmax",
        ),
    ],
)
def test_models_that_do_not_fit_the_rows_are_refused(make, message):
    with pytest.raises(errors.ModelMismatch, match=message):
        custom.describe(make(), BARE)


def hostile(change):
    """The configuration of a harmless model after somebody changed its second layer."""
    config = json.loads(json.dumps(custom.describe(double_model(), BARE).config))
    change(config["config"]["layers"][1])
    return plan.Network(name=plan.CUSTOM, inputs=784, classes=10, config=config)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.update(class_name="Lambda"),
        lambda layer: layer.update(class_name="TFSMLayer", config={"filepath": "/tmp/x"}),
        lambda layer: layer.update(class_name="StringLookup", config={"vocabulary": "/etc/passwd"}),
        lambda layer: layer.update(module="os", class_name="system", config="true"),
        lambda layer: layer.update(module="keras.utils", class_name="get_file"),
        lambda layer: layer.update(registered_name="Custom>Dense"),
        lambda layer: layer["config"].update(
            activation={"module": "builtins", "class_name": "function", "config": "eval"}
        ),
        lambda layer: layer["config"].update(
            activation={"class_name": "__lambda__", "config": {"value": "gASV"}}
        ),
    ],
)
def test_a_description_with_foreign_objects_is_never_read(change, monkeypatch):
    network = hostile(change)
    monkeypatch.setattr(
        keras.saving, "deserialize_keras_object", lambda *_, **__: pytest.fail("was read")
    )
    with pytest.raises(errors.ModelMismatch, match="not Keras's own"):
        registry.build(network)


def test_an_activation_by_name_is_looked_up_in_keras_alone():
    network = hostile(lambda layer: layer["config"].update(activation="os.getcwd"))
    with pytest.raises((ValueError, TypeError)):
        registry.build(network)


@pytest.mark.ranks
def test_a_model_trains_continues_predicts_and_evaluates(digits, store):
    options = {**ROWS, "store": store, "num_proc": 2}
    model = picture_model()
    first = [weight.copy() for weight in model.get_weights()]
    spark_mnist.fit(digits, "m", network=model, epochs=16, **options)
    for before, after in zip(first, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)  # the user's object stays as it was
    more = spark_mnist.fit(digits, "m", epochs=4, continuous=True, **options)
    assert [record.epoch for record in more.records] == [17, 18, 19, 20]
    assert accuracy(digits, "m", store=store) > 0.8
    predicted = spark_mnist.predict(digits, "m", interpret=True, store=store)
    assert predicted.where("interpreted = label").count() > 0.8 * digits.count()


def test_training_starts_from_the_models_own_weights(digits, store):
    model = double_model()
    slow = {**ROWS, "epochs": 1, "learning_rate": 1e-12, "store": store}
    first = spark_mnist.fit(digits, "m", network=model, **slow)
    for before, after in zip(model.get_weights(), arrays(store, "m", 1), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)
    options = {**ROWS, "store": store, "epochs": 1, "continuous": True}
    more = spark_mnist.fit(digits, "m", network=double_model(), **options)
    assert more.records[0].losses["loss"] == pytest.approx(first.records[0].losses["loss"], rel=0.2)
    with pytest.raises(errors.ModelMismatch, match="now makes InputLayer, Conv2D"):
        spark_mnist.fit(digits, "m", network=picture_model(), **options)
    with pytest.raises(errors.ModelMismatch, match=r"network=own, .*network=mlp"):
        spark_mnist.fit(digits, "m", network="mlp", **options)


def test_a_function_with_a_layer_of_its_own(digits, store):
    options = {**ROWS, "store": store}
    spark_mnist.fit(digits, "m", network=custom_model, epochs=6, **options)
    for verb in (spark_mnist.predict, spark_mnist.evaluate):
        with pytest.raises(errors.ModelMismatch, match=r"not Keras's own \(Scale\): give the func"):
            verb(digits, "m", store=store)
    with pytest.raises(errors.ModelMismatch, match=r"\(Scale\)"):
        spark_mnist.fit(digits, "m", continuous=True, **options)
    more = spark_mnist.fit(digits, "m", network=custom_model, continuous=True, epochs=1, **options)
    assert more.records[0].epoch == 7
    assert accuracy(digits, "m", network=custom_model, store=store) > 0.8
    predicted = spark_mnist.predict(digits, "m", network=custom_model, store=store)
    assert predicted.count() == digits.count()
    with pytest.raises(errors.ModelMismatch, match=r"give network= the function that makes it"):
        spark_mnist.fit(digits, "n", network=custom_model(), **options)


def test_a_function_that_makes_another_model_is_refused(digits, store):
    options = {**ROWS, "store": store, "epochs": 1}
    spark_mnist.fit(digits, "m", network=double_model, **options)
    assert spark_mnist.predict(digits.limit(3), "m", store=store).count() == 3
    spark_mnist.fit(digits, "m", continuous=True, **options)
    predicted = spark_mnist.predict(digits.limit(3), "m", store=store)
    assert predicted.collect() == predicted.collect()
    with pytest.raises(errors.RankError, match=r"raised ModelMismatch.*now makes .*Conv2D"):
        spark_mnist.fit(digits, "m", network=picture_model, continuous=True, **options)


def test_a_function_that_raises_is_told_with_its_own_words(digits, store):
    def broken():
        raise ValueError("no such units")

    with pytest.raises(errors.RankError, match="rank 0 of 1 raised ValueError: no such units"):
        spark_mnist.fit(digits, "m", network=broken, store=store, **ROWS)
    assert not list(Path(store).glob("*"))


def test_hidden_and_dropout_are_not_for_own_models(digits, store):
    with pytest.raises(errors.OptionError, match="do not apply to a network of your own"):
        spark_mnist.fit(digits, "m", network=double_model, hidden="5", store=store)


@pytest.mark.ranks
def test_a_function_that_holds_a_lock_or_the_session_is_refused_first(digits, store, spark):
    for held in (threading.Lock(), spark.sparkContext):

        def network(held=held):
            raise AssertionError(held)

        with pytest.raises(errors.OptionError, match="network= cannot be sent to the ranks"):
            spark_mnist.fit(digits, "m", network=network, num_proc=2, store=store, **ROWS)


@pytest.mark.ranks
def test_a_module_that_executors_lack_is_named(digits, store, tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text(
        "def network():\n    import keras\n"
        "    return keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = importlib.import_module("mine_alone").network
    message = "No module named 'mine_alone'; send its module to the executors with --py-files"
    with pytest.raises(errors.RankError, match=message):
        spark_mnist.fit(digits, "m", network=network, num_proc=2, store=store, **ROWS)


def test_a_tampered_store_runs_nothing(digits, store, caplog):
    spark_mnist.fit(digits, "m", network=double_model, epochs=1, store=store, **ROWS)
    path = Path(store) / "m" / "v000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["network"]["config"]["config"]["layers"][1]["class_name"] = "Lambda"
    manifest["sha256"] = model_store.digest(manifest)
    path.write_text(json.dumps(manifest))
    with caplog.at_level(logging.CRITICAL), pytest.raises(Exception, match="Keras's own"):
        spark_mnist.predict(digits.limit(3), "m", store=store).collect()
