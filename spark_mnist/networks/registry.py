"""Registries of the networks that can be trained, and of the optimizers.

Runs on: driver, rank, Spark task.

An import of this module brings names and defaults; Keras is loaded when a model or an optimizer is
built. Every network takes float32 ``[B, inputs]``, or float64 where it standardizes them, and gives
float32 ``[B, units]``: probabilities of classes or labels, or numbers. A network with several
inputs or outputs takes or gives dictionaries of these. Layers have names, so that the arrays of a
saved model can be told apart. A new network is one entry in ``REGISTRY``. Shape letter: B = rows of
a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.networks import objectives

LayerBuilder = Callable[[Any, plan.Network], Any]
"""Function from the inputs ``[B, inputs]`` to the input of the layer of class probabilities."""


@dataclass(frozen=True)
class Architecture:
    """Layers of a network, and its default settings."""

    build_layers: LayerBuilder
    hidden: tuple[int, ...] = ()
    """Units of the dense hidden layers; a network without hidden layers takes no units."""
    dropout: float = 0.0
    table: bool = False
    """Whether the network reads a table; the others read pictures."""


@dataclass(frozen=True)
class OptimizerDefaults:
    """A Keras optimizer, and its default settings."""

    name: str
    learning_rate: float
    """Default learning rate of one rank."""
    settings: Mapping[str, Any] = field(default_factory=dict)


def _dense(x: Any, network: plan.Network) -> Any:
    """Add ReLU layers of ``hidden`` units, then dropout."""
    from keras import layers

    for number, units in enumerate(network.hidden, start=1):
        x = layers.Dense(units, activation="relu", name=f"hidden_{number}")(x)
    return layers.Dropout(network.dropout, name="dropout")(x) if network.dropout else x


def _cnn(x: Any, network: plan.Network) -> Any:
    """Add 32 and 64 filters of 5x5, each followed by 2x2 pooling, before the dense layers."""
    from keras import layers

    x = layers.Reshape((28, 28, 1), name="image")(x)
    for number, filters in enumerate((32, 64), start=1):
        name = f"convolution_{number}"
        x = layers.Conv2D(filters, 5, padding="same", activation="relu", name=name)(x)
        x = layers.MaxPooling2D(2, name=f"pooling_{number}")(x)
    return _dense(layers.Flatten(name="flat")(x), network)


REGISTRY: Mapping[str, Architecture] = {
    "mlp": Architecture(_dense, hidden=(128, 32)),
    "softmax": Architecture(_dense),
    "small": Architecture(_dense, hidden=(20, 20)),
    "cnn": Architecture(_cnn, hidden=(1024,), dropout=0.5),
    "dnn": Architecture(_dense, hidden=(10, 20, 10), table=True),
}
"""Networks by their name in ``network=``."""
FLOAT32, MIXED_FLOAT16, MIXED_BFLOAT16 = "float32", "mixed_float16", "mixed_bfloat16"
"""Precisions; the gradients of ``MIXED_FLOAT16`` would vanish if the loss were not scaled."""
MAX_OFFSET_DEVIATIONS = 1e4
"""Largest mean, in standard deviations, at which float32 tells the values of a feature apart."""
PICTURES, TABLE = "mlp", "dnn"
"""Default networks for pictures and for tables."""

OPTIMIZERS: Mapping[str, OptimizerDefaults] = {
    "adam": OptimizerDefaults("Adam", 0.001),
    "sgd": OptimizerDefaults("SGD", 0.1),
    "momentum": OptimizerDefaults("SGD", 0.02, {"momentum": 0.9}),
}
"""Optimizers by their name in ``optimizer=``; the first is the default."""


def is_table(name: Any) -> bool:
    """Return whether a value of ``network=`` names a network for tables."""
    return isinstance(name, str) and name in REGISTRY and REGISTRY[name].table


def build(
    network: plan.Network,
    user_model: Any = None,
    dtype: str | None = None,
    *,
    original_units: bool = False,
) -> Any:
    """Make the Keras model with new weights, from Keras's global seed.

    Args:
        network: Description of the network.
        user_model: The user's model, for a network that only the user's function can make.
        dtype: Dtype of the inputs; ``input_dtype`` where None.
        original_units: Whether numbers come in the units of the label, also where they are learned
            standardized.

    Raises:
        errors.ModelMismatch: The network is the user's own, and cannot be made without
            ``user_model``.
    """
    import keras

    from spark_mnist.networks import custom

    # The user chooses all names of a custom model, so its inputs get none here.
    name = None if network.name == plan.CUSTOM else "features"
    dtype = dtype or input_dtype(network)
    if network.parts:
        model = custom.model(network, user_model)
        dtypes = custom.input_dtypes(model)
        x = inputs = {
            name: keras.Input((width,), name=name, dtype=dtypes[name])
            for name, width in network.parts
        }
        outputs = custom.attach(x, network, model)
    else:
        model = custom.model(network, user_model) if network.name == plan.CUSTOM else None
        if not network.mean:
            dtype = custom.integer_dtype(model) or dtype
        inputs = keras.Input((network.inputs,), name=name, dtype=dtype)
        x = _standardize(inputs, network, dtype)
        if model is not None:
            outputs = custom.attach(x, network, model)
        else:
            hidden = REGISTRY[network.name].build_layers(x, network)
            outputs = [_last_layer(output)(hidden) for output in network.heads]
    outputs = [
        _finish(output, tensor, original_units)
        for output, tensor in zip(network.heads, outputs, strict=True)
    ]
    names = [output.name for output in network.heads]
    by_name = outputs[0] if names == [""] else dict(zip(names, outputs, strict=True))
    return keras.Model(inputs, by_name, name=network.name)


def _last_layer(output: plan.Output) -> Any:
    """Return the layer that makes an output of a network of this library."""
    from keras import layers

    return layers.Dense(
        output.units,
        activation=objectives.ACTIVATIONS[output.task],
        name=output.name or objectives.LAYER_NAMES[output.task],
        dtype=FLOAT32,
    )


def _finish(output: plan.Output, tensor: Any, original_units: bool) -> Any:
    """Return an output as float32, and if asked in the units of the label."""
    from keras import layers

    suffix = f"_{output.name}" if output.name else ""
    if tensor.dtype != FLOAT32:  # the outputs of a user's model, in mixed precision
        tensor = layers.Activation("linear", dtype=FLOAT32, name=f"as_float32{suffix}")(tensor)
    if original_units and output.mean:
        scale, offset = np.asarray(output.deviation), np.asarray(output.mean)
        dtype = _exact_dtype(output.mean, output.deviation)
        tensor = layers.Rescaling(scale, offset, dtype=dtype, name=f"label_units{suffix}")(tensor)
    return tensor


def input_dtype(network: plan.Network) -> str:
    """Return the dtype of a network's inputs.

    It is float64 where the network standardizes them: as float32, seconds since 1970 differ by 128
    or not at all.
    """
    return "float64" if network.mean else FLOAT32


def exported_dtype(network: plan.Network) -> str:
    """Return the dtype of an exported network's inputs.

    It is float32, as other tools expect, except where float32 cannot tell the values of a feature
    apart.
    """
    return _exact_dtype(network.mean, network.deviation)


def has_exact_floats(network: plan.Network) -> bool:
    """Return whether float32 tells the values of all features and labels of a network apart."""
    scales = [(network.mean, network.deviation)]
    scales += [(output.mean, output.deviation) for output in network.heads]
    return all(_exact_dtype(*scale) == FLOAT32 for scale in scales)


def _exact_dtype(means: Sequence[float], deviations: Sequence[float]) -> str:
    """Return float32, or float64 where float32 cannot tell numbers of such means apart."""
    mean, deviation = np.asarray(means), np.asarray(deviations)
    is_coarse = bool((np.abs(mean) > MAX_OFFSET_DEVIATIONS * deviation).any())
    limits = np.finfo(np.float32)
    is_out_of_range = bool(
        ((deviation < limits.tiny) | (deviation > limits.max / MAX_OFFSET_DEVIATIONS)).any()
    )
    return "float64" if is_coarse or is_out_of_range else FLOAT32


def numbers(stored: Any, scale: float, dtype: str = FLOAT32) -> Any:
    """Convert stored rows ``[B, inputs]`` to the inputs of a network."""
    from keras import ops

    return ops.cast(stored, dtype) / scale


def inputs(stored: Any, encoding: plan.Encoding, dtype: str = FLOAT32) -> Any:
    """Convert stored rows to the inputs of a network.

    Args:
        stored: Rows ``[B, W]`` as ``encoding`` says.
        encoding: Layout of a row.
        dtype: Dtype of a single input.

    Returns:
        ``[B, W]``, or a dictionary of several inputs; integers stay integers.
    """
    import tensorflow as tf

    if encoding.dtype == "int64":
        return stored
    if not encoding.parts:
        return numbers(stored, encoding.scale, dtype)
    tensors, start = {}, 0
    for name, part in encoding.parts:
        end = start + part.row_bytes
        stored_part = stored[:, start:end]
        if part.dtype != "uint8":
            itemsize = np.dtype(part.dtype).itemsize
            stored_part = tf.reshape(stored_part, (-1, part.width, itemsize))
            stored_part = tf.bitcast(stored_part, part.dtype)
        is_integer = part.dtype == "int64"
        tensors[name] = stored_part if is_integer else numbers(stored_part, part.scale, FLOAT32)
        start = end
    return tensors


def optimizer(spec: plan.Optimizer, learning_rate: float) -> Any:
    """Make a Keras optimizer of this library, with a learning rate for all ranks.

    Args:
        spec: Description of the optimizer.
        learning_rate: The rate, in place of the one for a single rank.
    """
    import keras

    defaults = OPTIMIZERS[spec.name]
    settings = {**defaults.settings, "clipnorm": spec.clipnorm}
    if spec.accumulate_steps > 1:
        settings["gradient_accumulation_steps"] = spec.accumulate_steps
    return getattr(keras.optimizers, defaults.name)(learning_rate, **settings)


def optimizer_learning_rate(optimizer_fn: plan.ModelFn) -> float:
    """Return the learning rate of the optimizer that a user's function makes.

    Raises:
        errors.OptionError: The function makes something else, or an optimizer with a schedule.
    """
    import keras

    user_optimizer = optimizer_fn()
    if not isinstance(user_optimizer, keras.optimizers.Optimizer):
        raise errors.OptionError(
            f"optimizer= must make an optimizer of Keras, not {user_optimizer!r:.80}"
        )
    if not isinstance(user_optimizer._learning_rate, keras.Variable):
        raise errors.OptionError(
            "the optimizer has a schedule of Keras: give it a number, and the schedule as "
            "lr_schedule="
        )
    return float(keras.ops.convert_to_numpy(user_optimizer.learning_rate))


def _standardize(x: Any, network: plan.Network, dtype: str) -> Any:
    """Scale each feature to mean 0 and deviation 1 over the training rows."""
    from keras import layers

    if not network.mean:
        return x
    # Not Keras's Normalization, which replaces deviations below 1e-7 by 1e-7.
    # Arrays of float64, since TensorFlow makes float32 of lists.
    mean, deviation = np.asarray(network.mean), np.asarray(network.deviation)
    scale, offset = 1 / deviation, -mean / deviation
    return layers.Rescaling(scale, offset, dtype=dtype, name="standardized")(x)
