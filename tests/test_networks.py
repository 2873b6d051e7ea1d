"""The networks by their shapes, and those with random layers trained on two ranks."""

import math

import keras
import numpy as np
import pytest

import spark_mnist
from spark_mnist import errors, options
from spark_mnist.core import plan
from spark_mnist.fitting import training_start
from spark_mnist.networks import registry
from spark_mnist.ranks import collectives
from spark_mnist.store import model_store
from tests.conftest import arrays


def build(**chosen):
    start = training_start.load(model_store.Store("memory://"), "m", options.FitOptions(**chosen))
    return registry.build(start.for_rows(plan.InputSpec()).network)


@pytest.mark.parametrize(
    ("chosen", "parameters"),
    [
        ({"network": "softmax"}, 784 * 10 + 10),
        ({}, 784 * 128 + 128 + 128 * 32 + 32 + 32 * 10 + 10),
        ({"network": "small"}, 784 * 20 + 20 + 20 * 20 + 20 + 20 * 10 + 10),
        ({"network": "cnn"}, 3_274_634),  # as the tutorial's
        ({"network": "mlp", "hidden": "5,4,3"}, 784 * 5 + 5 + 24 + 15 + 40),
        ({"network": "cnn", "hidden": "10", "dropout": 0.0}, 832 + 51264 + 3136 * 10 + 10 + 110),
    ],
)
def test_shapes_are_the_tutorials_or_those_that_were_asked_for(chosen, parameters):
    model = build(**chosen)
    assert model.count_params() == parameters
    probabilities = model(np.random.default_rng(0).random((3, 784), "float32")).numpy()
    assert probabilities.shape == (3, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_dropout_is_where_it_was_asked_for():
    assert [layer.rate for layer in build(network="cnn").layers if "dropout" in layer.name] == [0.5]
    assert [layer.rate for layer in build(dropout=0.1).layers if "dropout" in layer.name] == [0.1]


@pytest.mark.parametrize("chosen", [{"hidden": "5"}, {"dropout": 0.5}])
def test_softmax_has_no_hidden_layers(chosen):
    with pytest.raises(errors.OptionError, match="softmax has no hidden layers"):
        build(network="softmax", **chosen)


def test_dropout_follows_its_key():
    model = keras.Sequential([keras.Input((50,)), keras.layers.Dropout(0.5)])
    ones = np.ones((1, 50), "float32")

    def mask(*key):
        collectives.seed_random_layers(model, key)
        return model(ones, training=True).numpy()

    np.testing.assert_array_equal(mask(0, 1, 0), mask(0, 1, 0))
    for other in ((0, 1, 1), (0, 2, 0), (1, 1, 0)):
        assert (mask(0, 1, 0) != mask(*other)).any()


@pytest.mark.ranks
def test_a_cnn_with_dropout_continues_as_if_it_had_never_stopped(digits, tmp_path):
    root = str(tmp_path)
    few = digits.limit(64)
    rest = {
        "network": "cnn",
        "hidden": "16",
        "batch_size": 16,
        "num_proc": 2,
        "store": root,
        "verbose": 0,
    }
    spark_mnist.fit(few, "whole", epochs=2, **rest)
    spark_mnist.fit(few, "parts", epochs=1, **rest)
    spark_mnist.fit(few, "parts", epochs=1, continuous=True, **rest)
    for whole, part in zip(arrays(root, "whole", 1), arrays(root, "parts", 2), strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-6)
    assert spark_mnist.predict(few, "whole", store=root).count() == 64
    for change in ({"hidden": "32"}, {"dropout": 0.1}):
        with pytest.raises(errors.ModelMismatch, match=r"(hidden=16|dropout=0\.5), and"):
            spark_mnist.fit(few, "parts", continuous=True, **{**rest, **change})


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(collectives, "allreduce_sum", list)
    monkeypatch.setattr(collectives, "_extreme", lambda values, op: values)


def test_bytes_that_never_vary_have_no_deviation(one_rank):
    parts = [np.array([[7, 0], [7, 255]], np.uint8), np.array([[7, 255]], np.uint8)] * 100
    mean, deviation = collectives.moments(lambda: iter(parts), 255.0)
    assert mean == pytest.approx((7 / 255, 2 / 3))
    assert deviation == (0.0, pytest.approx(math.sqrt(2) / 3))


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-290, 1e22, 1e290])
@pytest.mark.parametrize("offset", [0.0, 3e8])
def test_moments_of_any_scale_and_offset(one_rank, scale, offset):
    rows = np.random.default_rng(0).normal(0, 1, (1000, 1)) + offset
    parts = [rows[:600] * scale, rows[600:] * scale]
    (mean,), (deviation,) = collectives.moments(lambda: iter(parts), 1.0)
    assert mean / scale == pytest.approx(rows.mean(), rel=1e-12)
    assert deviation / scale == pytest.approx(rows.std(), rel=1e-6)


def test_floats_that_never_vary_have_no_deviation(one_rank):
    assert collectives.moments(lambda: iter([np.full((999, 1), 0.1)]), 1.0) == ((0.1,), (0.0,))
