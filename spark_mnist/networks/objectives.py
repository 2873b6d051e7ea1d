"""Losses and metrics of a network's outputs, by Keras's names. Runs on: driver, rank, Spark task.

An import of this module brings names; Keras is loaded when a loss or a metric is made. Shape
letters: B = rows of a batch, C = classes or labels, K = numbers of a target.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spark_mnist import errors
from spark_mnist.core import plan

Loss = Callable[[Any, Any], Any]
"""Function from targets and outputs of B rows to B losses, without a mean over the rows."""

ALIASES: Mapping[str, str] = {
    "mse": "mean_squared_error",
    "mae": "mean_absolute_error",
    "mape": "mean_absolute_percentage_error",
    "msle": "mean_squared_logarithmic_error",
    "logcosh": "log_cosh",
    "kld": "kl_divergence",
    "bce": "binary_crossentropy",
}
"""Short names of losses, as Keras has them."""
_FLAG_LOSSES = (
    *("binary_crossentropy", "binary_focal_crossentropy", "mean_squared_error"),
    *("mean_absolute_error", "hinge", "squared_hinge"),
)
CLASS_LOSS = "sparse_categorical_crossentropy"
"""Default loss of classes."""
LOSSES: Mapping[str, tuple[str, ...]] = {
    plan.CLASSIFICATION: (
        *(CLASS_LOSS, "categorical_crossentropy"),
        *("categorical_focal_crossentropy", "categorical_hinge", "kl_divergence"),
        *("mean_squared_error", "mean_absolute_error"),
    ),
    plan.BINARY: _FLAG_LOSSES,
    plan.MULTILABEL: _FLAG_LOSSES,
    plan.REGRESSION: (
        *("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error"),
        *("mean_squared_logarithmic_error", "huber", "log_cosh", "poisson", "cosine_similarity"),
    ),
}
"""Losses that fit each task, as Keras names them; the first is the default."""
UNSCALED_LOSSES = (
    *("mean_absolute_percentage_error", "mean_squared_logarithmic_error", "poisson"),
)
"""Losses whose targets must not be standardized, as they compare with 0."""
POSITIVE_LOSSES = ("poisson",)
"""Losses whose outputs must be above 0."""
METRICS: tuple[str, ...] = (
    *("accuracy", "acc", "auc", "precision", "recall", "f1_score", "binary_accuracy"),
    *("categorical_accuracy", "sparse_categorical_accuracy", "top_k_categorical_accuracy"),
    *("sparse_top_k_categorical_accuracy", "true_positives", "true_negatives"),
    *("false_positives", "false_negatives", "binary_crossentropy", "categorical_crossentropy"),
    *("sparse_categorical_crossentropy", "mse", "mean_squared_error", "mae"),
    *("mean_absolute_error", "mape", "mean_absolute_percentage_error", "msle"),
    *("mean_squared_logarithmic_error", "rmse", "root_mean_squared_error", "r2_score"),
    *("cosine_similarity", "log_cosh_error", "poisson", "hinge", "squared_hinge"),
    *("categorical_hinge", "kl_divergence"),
)
"""Metrics by name: those of Keras that need no arguments."""
NUMBER_METRICS = (
    *("mse", "mean_squared_error", "mae", "mean_absolute_error", "mape", "msle", "rmse"),
    *("mean_absolute_percentage_error", "mean_squared_logarithmic_error", "r2_score"),
    *("root_mean_squared_error", "cosine_similarity", "log_cosh_error", "poisson"),
)
"""Metrics of numbers; classes and labels may have them, too, as probabilities are numbers."""
CLASS_METRICS = (
    *("categorical_accuracy", "sparse_categorical_accuracy", "top_k_categorical_accuracy"),
    *("sparse_top_k_categorical_accuracy", "categorical_crossentropy"),
    *("sparse_categorical_crossentropy", "categorical_hinge"),
)
"""Metrics of one of several classes alone."""
METRIC_ALIASES: Mapping[str, str] = {
    "acc": "accuracy",
    "mean_squared_error": "mse",
    "mean_absolute_error": "mae",
    "root_mean_squared_error": "rmse",
    "r2_score": "r2",
}
"""Other names of metrics that are reported."""
REPORTED: Mapping[str, tuple[str, ...]] = {
    plan.CLASSIFICATION: ("accuracy",),
    plan.BINARY: ("accuracy", "precision", "recall", "auc"),
    plan.MULTILABEL: ("accuracy", "f1_micro", "f1_macro"),
    plan.REGRESSION: ("mse", "rmse", "mae", "r2"),
}
"""Metrics that training and evaluation report of each task."""
ACTIVATIONS: Mapping[str, str | None] = {
    plan.CLASSIFICATION: "softmax",
    plan.BINARY: "sigmoid",
    plan.MULTILABEL: "sigmoid",
    plan.REGRESSION: None,
}
"""Activation that makes the outputs of each task: probabilities, or numbers as they are."""
LAYER_NAMES: Mapping[str, str] = {
    plan.CLASSIFICATION: "classes",
    plan.BINARY: "probability",
    plan.MULTILABEL: "labels",
    plan.REGRESSION: "numbers",
}
"""Name of the last layer of a network of this library, for one output."""


def loss_name(task: str, name: str) -> str:
    """Return Keras's name of a loss.

    Raises:
        errors.OptionError: The loss does not fit the task.
    """
    full_name = ALIASES.get(name.lower(), name.lower())
    if full_name not in LOSSES[task]:
        fitting = [other for other, names in LOSSES.items() if full_name in names]
        hint = (
            f"; it is one for task={' or '.join(fitting)}"
            if fitting
            else errors.did_you_mean(name, LOSSES[task])
        )
        raise errors.OptionError(
            f"loss={name} cannot be used with task={task}, which takes "
            f"{', '.join(LOSSES[task])}, or a function in Python{hint}"
        )
    return full_name


def check_metric(task: str, name: str) -> None:
    """Refuse a name that Keras has no metric for.

    Raises:
        errors.OptionError: There is no such metric.
    """
    if name.lower() not in METRICS:
        hint = errors.did_you_mean(name, METRICS)
        raise errors.OptionError(
            f"metrics={name} is not a metric of Keras: {', '.join(METRICS)}, or a function in "
            f"Python{hint}"
        )
    if task == plan.REGRESSION and name.lower() not in NUMBER_METRICS:
        raise errors.OptionError(
            f"metrics={name} cannot be used with task={task}; use mae, rmse or r2"
        )
    if task in (plan.BINARY, plan.MULTILABEL) and name.lower() in CLASS_METRICS:
        raise errors.OptionError(
            f"metrics={name} cannot be used with task={task}; use binary_accuracy, "
            "binary_crossentropy, auc, precision or recall"
        )


def make_loss(output: plan.Output, loss: Any = None) -> Loss:
    """Return the loss of an output as a function that takes no mean over the rows.

    Args:
        output: The output.
        loss: The user's loss: a function of targets and outputs, one that makes a loss, a loss of
            Keras, its name or its configuration; without it, the loss that ``output`` names.

    Raises:
        errors.OptionError: A function of the user made something else.
    """
    import keras

    loss = resolve_loss(output, loss)
    try:
        loss = keras.losses.get(loss)
    except (TypeError, ValueError) as error:
        raise errors.OptionError(f"loss= must make a loss of Keras: {error}") from None
    if isinstance(loss, keras.losses.Loss):
        loss = _of_probabilities(loss).call
    elif not callable(loss):
        raise errors.OptionError(f"loss= must make a loss, not {loss!r:.80}")
    has_one_hot_targets = needs_one_hot(output, loss)

    def row_losses(targets: Any, outputs: Any) -> Any:
        if has_one_hot_targets:
            targets = keras.ops.one_hot(targets, output.size, dtype="float32")
        values = keras.ops.cast(loss(targets, outputs), "float32")
        axes = tuple(range(1, len(values.shape)))
        return keras.ops.mean(values, axis=axes) if axes else values

    return row_losses


def check_loss(output: plan.Output, loss: Any) -> None:
    """Try the user's loss of an output on some rows.

    Raises:
        errors.OptionError: It cannot be used with such targets and outputs, or gives something else
            than a loss for each row.
    """
    if describe_loss(output, resolve_loss(output, loss)) == CLASS_LOSS:
        loss_name(output.task, CLASS_LOSS)  # on numbers it fails in TensorFlow's graph alone
    name = f"loss of output {output.name!r}" if output.name else "loss="
    row_losses = make_loss(output, loss)
    rows = 2 if output.units != 2 else 3  # so that rows and units are not taken for each other
    try:
        values = row_losses(*_example(output, rows))
    except Exception as error:  # of any type: the function is the user's
        raise errors.OptionError(
            f"{name} cannot be used with task={output.task}: {_first_line(error)}"
        ) from error
    if tuple(values.shape) != (rows,):
        shape = tuple(values.shape)
        raise errors.OptionError(
            f"{name} must give a loss for each row, and gave numbers of the shape {shape} for "
            f"{rows} rows: take no mean or sum over the rows"
        )


def check_metrics(output: plan.Output, metrics: Any) -> list[str]:
    """Try the user's metrics of an output on some rows, and return their names.

    Raises:
        errors.OptionError: One cannot be used with such targets and outputs.
    """
    output_metrics = make_metrics(output, metrics)
    for metric in output_metrics:
        target, values = _example(output, 2 if output.units != 2 else 3)
        try:
            metric.update_state(metric_target(output, metric, target), values)
            metric.result()
        except Exception as error:  # of any type: the metric may be the user's
            raise errors.OptionError(
                f"metrics= has {metric.name!r}, which cannot be used with task={output.task}: "
                f"{_first_line(error)}"
            ) from error
    return [metric.name for metric in output_metrics]


def _example(output: plan.Output, rows: int) -> tuple[Any, Any]:
    """Return targets and outputs of some rows, as training has them."""
    from keras import ops

    if output.task == plan.CLASSIFICATION:
        return ops.zeros((rows,), "int32"), ops.full((rows, output.units), 1 / output.units)
    return ops.zeros((rows, output.target_size)), ops.full((rows, output.units), 0.5)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def loss_names(outputs: Sequence[plan.Output]) -> list[str]:
    """Return the names of the losses of an epoch's training: of all outputs, then of each."""
    return ["loss", *(output.prefixed("loss") for output in outputs if output.name)]


def check_result_names(
    outputs: Sequence[plan.Output], metrics: Mapping[str, Sequence[str]]
) -> None:
    """Check that all losses and metrics of an epoch have names of their own.

    Args:
        outputs: The outputs.
        metrics: Names of the user's metrics by output.

    Raises:
        errors.OptionError: Two have the same name.
    """
    names = loss_names(outputs)
    for output in outputs:
        output_names = (*REPORTED[output.task], *metrics.get(output.name, ()))
        names += [output.prefixed(name) for name in output_names]
    names += [f"val_{name}" for name in names]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise errors.OptionError(
            f"two losses or metrics would be called {duplicates[0]!r}: give the metrics, or the "
            "outputs in label=, other names"
        )


def resolve_loss(output: plan.Output, loss: Any = None) -> Any:
    """Return the loss of an output as ``keras.losses.get`` takes it; see ``make_loss``.

    Raises:
        errors.DamagedModel: The configuration in ``output`` is not one of a loss of Keras.
    """
    import keras

    if isinstance(loss, SentLoss):
        sent: Any = object.__new__(loss.loss_class)
        vars(sent).update(loss.attributes)
        return sent
    if loss is not None and not isinstance(loss, str):
        return _call_factory(loss)
    text = loss or output.loss
    if not text.startswith("{"):
        return text or LOSSES[output.task][0]
    try:
        description = json.loads(text)
        loss_class = getattr(keras.losses, description["class_name"])
        if not issubclass(loss_class, keras.losses.Loss):
            raise TypeError(loss_class)
        return loss_class(**description["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise errors.DamagedModel(f"a saved model has no loss of Keras: {error!r}") from None


def needs_one_hot(output: plan.Output, loss: Any) -> bool:
    """Return whether a loss of Keras takes one-hot targets, for an output that learns classes.

    A function of the user takes the numbers of the classes, as ``label`` has them.
    """
    if output.task != plan.CLASSIFICATION:
        return False
    return needs_one_hot_function(getattr(getattr(loss, "__self__", None), "fn", loss))


def make_metrics(output: plan.Output, metrics: Any) -> list[Any]:
    """Make the user's further metrics of an output.

    Args:
        output: The output.
        metrics: Names, metrics of Keras, their configurations, functions of targets and outputs, or
            functions that make such; or a function that makes a list of these.

    Raises:
        errors.OptionError: There is no metric of that name, or a function made something else.
    """
    import keras

    value = _call_factory(metrics)
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else []
    items = [*dict.fromkeys(names)] or _flat(value)
    result = []
    for item in items:
        item = _call_factory(item)
        if (
            isinstance(item, str)
            and METRIC_ALIASES.get(item.lower(), item.lower()) in (REPORTED[output.task])
        ):
            continue  # each fit of the task has it
        try:
            metric = keras.metrics.get(_metric_name(output, item))
        except (TypeError, ValueError) as error:
            raise errors.OptionError(f"metrics= has no metric of Keras: {error}") from None
        if not isinstance(metric, keras.metrics.Metric):
            if not callable(metric):
                raise errors.OptionError(f"metrics= must make a metric, not {metric!r:.80}")
            name = item if isinstance(item, str) else getattr(item, "__name__", "metric")
            metric = keras.metrics.MeanMetricWrapper(metric, name=name)
        elif isinstance(item, str) and metric.name != item:
            metric = type(metric).from_config({**metric.get_config(), "name": item})
        result.append(metric)
    return result


def metric_needs_one_hot(output: plan.Output, metric: Any) -> bool:
    """Return whether a metric takes one-hot targets, for an output that learns classes.

    A metric of the user takes the numbers of the classes.
    """
    import keras

    if output.task != plan.CLASSIFICATION:
        return False
    if isinstance(metric, keras.metrics.MeanMetricWrapper):
        return needs_one_hot_function(metric._fn)
    name = type(metric).__name__
    takes_numbers = name.startswith("Sparse") or getattr(metric, "sparse_y_true", False)
    return getattr(keras.metrics, name, None) is type(metric) and not takes_numbers


def metric_target(output: plan.Output, metric: Any, target: Any) -> Any:
    """Return targets as a metric takes them."""
    import keras

    if metric_needs_one_hot(output, metric):
        return keras.ops.one_hot(target, output.size, dtype="float32")
    return target


def needs_one_hot_function(function: Any) -> bool:
    """Return whether a function of targets and outputs is one of Keras's for one-hot targets."""
    module = str(getattr(function, "__module__", "")).partition(".")[0]
    name = getattr(function, "__name__", "")
    takes_numbers = name.startswith("sparse_") or name == "categorical_generalized_cross_entropy"
    return module == "keras" and not takes_numbers


def _metric_name(output: plan.Output, item: Any) -> Any:
    """Return Keras's name of a metric; of classes, the one that takes their numbers."""
    if not isinstance(item, str):
        return item
    item = {"rmse": "root_mean_squared_error"}.get(item.lower(), item)
    if output.task != plan.CLASSIFICATION:
        return item
    names = {
        "categorical_accuracy": "sparse_categorical_accuracy",
        "categorical_crossentropy": "sparse_categorical_crossentropy",
        "top_k_categorical_accuracy": "sparse_top_k_categorical_accuracy",
    }
    return names.get(item, item)


def compiled(model: Any, outputs: Sequence[plan.Output]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return losses and metrics that a user's model was compiled with, by name of the output.

    They are configurations of Keras, or functions; without ``compile`` there are none.

    Raises:
        errors.ModelMismatch: The model was compiled for other outputs.
    """
    if not getattr(model, "compiled", False) or not hasattr(model, "_compile_metrics"):
        return {}, {}
    metrics = getattr(model._compile_metrics, "_user_metrics", None)
    by_name = {output.name: output for output in outputs}
    losses = {
        name: sendable(by_name[name], loss)
        for name, loss in _compiled_by_output("loss", model.loss, outputs).items()
        if loss is not None
    }
    metric_items = {
        name: [*_flat(items)]
        for name, items in _compiled_by_output("metrics", metrics, outputs).items()
    }
    return losses, {name: items for name, items in metric_items.items() if items}


def compiled_weights(model: Any, outputs: Sequence[plan.Output]) -> dict[str, float]:
    """Return the weights of losses that a user's model was compiled with, by name of the output.

    Raises:
        errors.ModelMismatch: The model was compiled for other outputs.
    """
    compile_loss = getattr(model, "_compile_loss", None)
    weights = getattr(compile_loss, "_user_loss_weights", None)
    by_output = _compiled_by_output("loss_weights", weights, outputs)
    return {name: float(_flat(weight)[0]) for name, weight in by_output.items()}


def _compiled_by_output(what: str, values: Any, outputs: Sequence[plan.Output]) -> dict[str, Any]:
    """Return what ``compile`` was given, by name of the output."""
    names = [output.name for output in outputs]
    if values is None:
        return {}
    if names == [""]:
        if isinstance(values, Mapping) and len(values) == 1:
            (values,) = values.values()
        return {"": values}
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in names]
        if unknown:
            raise errors.ModelMismatch(
                f"the network was compiled with {what} for an output {unknown[0]!r}; label= names "
                f"{', '.join(names)}"
            )
        return dict(values)
    if isinstance(values, list | tuple) and len(values) == len(names):
        return dict(zip(names, values, strict=True))
    return dict.fromkeys(names, values)


def _flat(items: Any) -> Sequence[Any]:
    return items if isinstance(items, list | tuple) else [items]


def describe_loss(output: plan.Output, loss: Any) -> str:
    """Return a loss as text that a manifest keeps: a name of Keras, or the configuration of one.

    A loss that only the user's function makes is ``plan.CUSTOM``.
    """
    import keras

    if isinstance(loss, str):
        return ALIASES.get(loss.lower(), loss)
    function = getattr(loss, "fn", loss)
    if isinstance(loss, keras.losses.Loss):
        if getattr(keras.losses, type(loss).__name__, None) is not type(loss):
            return plan.CUSTOM
        config = _settings(loss)
        if config == {key: _settings(type(loss)()).get(key) for key in config}:
            name = getattr(function, "__name__", "")
            if _has_loss(name):
                return name
        return json.dumps({"class_name": type(loss).__name__, "config": config})
    name = getattr(loss, "__name__", "")
    is_known = getattr(keras.losses, name, None) is loss and _has_loss(name)
    return name if is_known else plan.CUSTOM


def _has_loss(name: str) -> bool:
    """Return whether Keras finds a loss by its name, which some of its losses do not have."""
    import keras

    try:
        return bool(name) and keras.losses.get(name) is not None
    except ValueError:
        return False


def _settings(loss: Any) -> dict[str, Any]:
    """Return the arguments that distinguish a loss of Keras from others of its class.

    Some, such as the ``delta`` of Huber's loss, are not in Keras's own configuration.
    """
    config = {**getattr(loss, "_fn_kwargs", {}), **loss.get_config()}
    others = ("name", "dtype", "reduction", "from_logits")
    return {key: value for key, value in config.items() if key not in others}


@dataclass(frozen=True)
class SentLoss:
    """A loss of the user's class in a form that can be sent whole.

    Keras's own way to pickle a loss keeps what its configuration has, and nothing else.
    """

    loss_class: type
    attributes: Mapping[str, Any]


def sendable(output: plan.Output, loss: Any) -> Any:
    """Return a loss in a form that ranks receive as it is: text, a function, or ``SentLoss``."""
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(loss, keras.losses.Loss):
        return loss
    text = describe_loss(output, loss)
    return text if text != plan.CUSTOM else SentLoss(type(loss), dict(vars(loss)))


def targets(outputs: Sequence[plan.Output], labels: Any) -> list[Any]:
    """Return the target of each output as its loss takes it.

    Args:
        outputs: The outputs.
        labels: Classes ``[B]``, or numbers ``[B, K]`` of all outputs in order.

    Returns:
        For each output: classes int32 ``[B]``; for a binary output float32 ``[B, 1]``; for labels
        and numbers float32 ``[B, C]``, numbers in the units in which they are learned.
    """
    from keras import ops

    result, start = [], 0
    for output in outputs:
        end = start + output.target_size
        values = labels if len(labels.shape) == 1 else labels[:, start:end]
        if output.task == plan.CLASSIFICATION:
            values = ops.cast(ops.reshape(values, (-1,)), "int32")
        elif output.task == plan.BINARY:
            values = ops.cast(ops.reshape(values, (-1, 1)), "float32")
        else:
            values = ops.cast(standardized(output, values), "float32")
        result.append(values)
        start = end
    return result


def standardized(output: plan.Output, numbers: Any) -> Any:
    """Return numbers ``[B, K]`` in the units in which an output learns them."""
    if not output.mean:
        return numbers
    import numpy as np

    mean, deviation = np.asarray(output.mean), np.asarray(output.deviation)
    return (numbers - mean) / deviation


def original(output: plan.Output, numbers: Any) -> Any:
    """Return float64 numbers ``[B, K]`` of an output in the units of the label."""
    if not output.mean:
        return numbers
    import numpy as np

    return numbers * np.asarray(output.deviation) + np.asarray(output.mean)


def by_output(outputs: Sequence[plan.Output], values: Any) -> list[Any]:
    """Return what a network gives, a tensor or a dictionary of tensors, in the order of outputs."""
    if isinstance(values, Mapping):
        return [values[output.name] for output in outputs]
    return [values]


def _call_factory(value: Any) -> Any:
    """Return what a function without required arguments makes; other values stay."""
    if isinstance(value, functools.partial) and inspect.isclass(value.func):
        return value()
    if not callable(value) or not inspect.isroutine(value):
        return value() if inspect.isclass(value) else value
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # a function of C
        return value
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind in positional]
    return value if required else value()


def _of_probabilities(loss: Any) -> Any:
    """Return a loss of Keras for probabilities, which the outputs of networks are here."""
    if not getattr(loss, "_fn_kwargs", {}).get("from_logits"):
        return loss
    return type(loss)(**{**_settings(loss), "from_logits": False})
