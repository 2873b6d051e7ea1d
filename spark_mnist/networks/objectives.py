"""Losses and metrics of a network's outputs, by Keras's names. Runs on: driver, rank, Spark task.

An import of this module brings names; Keras is loaded when a loss or a metric is made. Shape
letters: B = rows of a batch, C = classes or labels, K = numbers of a target.
"""

from __future__ import annotations

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
    if name.lower() in ("accuracy", "acc") and task == plan.REGRESSION:
        raise errors.OptionError(
            f"metrics={name} cannot be used with task={task}; use mae, rmse or r2"
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
    items = [name.strip() for name in value.split(",")] if isinstance(value, str) else _flat(value)
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
    return getattr(keras.metrics, name, None) is type(metric) and not name.startswith("Sparse")


def needs_one_hot_function(function: Any) -> bool:
    """Return whether a function of targets and outputs is one of Keras's for one-hot targets."""
    module = str(getattr(function, "__module__", "")).partition(".")[0]
    return module == "keras" and not getattr(function, "__name__", "").startswith("sparse_")


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
            return getattr(function, "__name__", "") or plan.CUSTOM
        return json.dumps({"class_name": type(loss).__name__, "config": config})
    name = getattr(loss, "__name__", "")
    return name if getattr(keras.losses, name, None) is loss else plan.CUSTOM


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
