import dataclasses

import pytest

from spark_mnist import errors, options, schedules
from spark_mnist.core import plan
from spark_mnist.fitting import training_start
from spark_mnist.networks import registry
from spark_mnist.options import value_types
from spark_mnist.store import model_store


def test_the_manuals_defaults():
    fit, predict, evaluate = (
        options.FitOptions(),
        options.PredictOptions(),
        options.EvaluateOptions(),
    )
    assert (fit.epochs, fit.batch_size, fit.train_validation_ratio, fit.continuous) == (
        5,
        32,
        0.8,
        False,
    )
    assert (predict.batch_size, predict.interpret) == (32, False)
    assert (evaluate.batch_size, evaluate.rate, evaluate.repeat) == (32, 0.7, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 5.0), ("epochs", True), ("epochs", "5"), ("epochs", 0), ("epochs", None),
        ("train_validation_ratio", float("nan")), ("train_validation_ratio", 1.01),
        ("train_validation_ratio", "0.8"), ("continuous", 1), ("continuous", "true"),
        ("network", "resnet"), ("num_proc", 0), ("learning_rate", 0), ("hidden", "128;32"), ("hidden", "0"), ("hidden", (20, 0)), ("hidden", (20.0,)), ("cache", -1), ("cache", 1.5), ("lr_schedule", schedules.Exponential(-1.0)), ("dropout", 1.0), ("store", ""), ("seed", -1),
    ],
)  # fmt: skip
def test_bad_values_name_the_option_what_is_allowed_and_the_value(name, value):
    with pytest.raises(errors.OptionError) as caught:
        options.build(options.FitOptions, {name: value})
    option_type = options.FIELDS[name].metadata["type"]
    assert str(caught.value) == f"{name} must be {option_type.words}, not {value!r}"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("hidden", (128, 32), "128,32"), ("hidden", [5], "5"), ("cache", 1 << 30, 1 << 30),
        ("lr_schedule", schedules.Cosine(20), "cosine:20"),
        ("lr_schedule", schedules.Exponential(0.95), "exponential:0.95"),
        ("lr_schedule", schedules.Exponential(1e-5), "exponential:0.00001"),
        ("lr_schedule", schedules.Step(10, 0.1), "step:10:0.1"),
    ],
)  # fmt: skip
def test_forms_of_python_become_those_of_the_command(name, value, text):
    assert getattr(options.FitOptions(**{name: value}), name) == text
    assert value_types.size(1 << 30) == value_types.size("1g")


def test_an_unknown_option_is_a_type_error_with_the_nearest_name():
    with pytest.raises(TypeError, match="did you mean 'batch_size'"):
        options.build(options.PredictOptions, {"batchsize": 3})


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.FitOptions().epochs = 3


def test_every_network_and_optimizer_of_the_registries_can_be_named_and_built():
    for name in registry.REGISTRY:
        features = "a,b" if registry.REGISTRY[name].table else None
        for optimizer in registry.OPTIMIZERS:
            chosen = options.FitOptions(network=name, optimizer=optimizer, features=features)
            start = training_start.load(model_store.Store("memory://"), "m", chosen)
            begin = start.for_rows(plan.InputSpec(classes=4))
            assert registry.build(begin.network).output_shape == (None, 4)
            assert float(registry.optimizer(begin.optimizer, 0.5).learning_rate) == 0.5


def test_settings_are_not_for_what_a_saved_model_has():
    settings = {"network": "cnn", "optimizer": "sgd", "seed": "3", "batch_size": "64"}
    afresh = options.build(options.FitOptions, {}, settings)
    assert (afresh.network, afresh.optimizer, afresh.seed) == ("cnn", "sgd", 3)
    for given, more in (({"continuous": True}, {}), ({}, {"continuous": "true"})):
        goes_on = options.build(options.FitOptions, given, {**settings, **more})
        found = (goes_on.network, goes_on.optimizer, goes_on.seed, goes_on.batch_size)
        assert found == (None, None, None, 64)
    applied = options.build(options.EvaluateOptions, {}, settings)
    assert (applied.network, applied.seed, applied.batch_size) == (None, 3, 64)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("35000", [35000]),
        (35000, [35000]),
        ("35000-35002", [35000, 35001, 35002]),
        ("65535", [65535]),
        ("0", []),
        ("65536", []),
        ("35002-35000", []),
        ("35000-70000", []),
        ("35000:35002", []),
        (True, []),
        (None, []),
    ],
)
def test_ports_are_one_or_a_range(value, expected):
    assert list(value_types.ports(value)) == expected
    if expected:
        assert options.FitOptions(port=value).port == value
    elif value is not None:
        with pytest.raises(errors.OptionError, match="port must be a port like 35000, or a range"):
            options.FitOptions(port=value)


def test_a_process_has_one_rank():
    assert options.FitOptions(launcher="in-process", num_proc=1).num_proc == 1
    with pytest.raises(errors.OptionError, match="runs one rank, not num_proc=2: leave num_proc"):
        options.FitOptions(launcher="in-process", num_proc=2)
