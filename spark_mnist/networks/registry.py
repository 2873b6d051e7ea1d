"""The networks that can be trained, and their optimizers: one registry of each.

Whoever imports this module gets names and defaults; Keras is loaded when something is built. Every
network takes float32 ``[B, inputs]``, float64 where it standardises them, and gives class
probabilities ``[B, classes]``. Layers are named, so that a saved model's arrays can be told apart.
A new network is one entry in ``REGISTRY``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spark_mnist.core import plan

LayerBuilder = Callable[[Any, plan.Network], Any]
"""From the inputs ``[B, inputs]`` to what the class probabilities are computed of."""


@dataclass(frozen=True)
class Architecture:
    """The layers of a network, and its settings where the user gives none."""

    build_layers: LayerBuilder
    hidden: tuple[int, ...] = ()
    """Units of the dense hidden layers; a network without any takes none."""
    dropout: float = 0.0
    table: bool = False
    """Whether it reads a table; the others read pictures."""


@dataclass(frozen=True)
class OptimizerDefaults:
    """An optimizer of Keras's, and its settings."""

    name: str
    learning_rate: float
    """For one rank, where the user gives none."""
    settings: Mapping[str, Any] = field(default_factory=dict)


def _dense(x: Any, network: plan.Network) -> Any:
    """ReLU layers of ``hidden`` units, then dropout."""
    from keras import layers

    for number, units in enumerate(network.hidden, start=1):
        x = layers.Dense(units, activation="relu", name=f"hidden_{number}")(x)
    return layers.Dropout(network.dropout, name="dropout")(x) if network.dropout else x


def _cnn(x: Any, network: plan.Network) -> Any:
    """32 and 64 filters of 5x5, each with 2x2 pooling, before the dense layers."""
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
"""The networks, by the name in ``network=``."""
FLOAT32, MIXED_FLOAT16, MIXED_BFLOAT16 = "float32", "mixed_float16", "mixed_bfloat16"
"""Precisions; the gradients of ``MIXED_FLOAT16`` would vanish if the loss were not scaled."""
MOST_OFFSET = 1e4
"""Deviations from zero up to which floats tell the values of a feature apart."""
PICTURES, TABLE = "mlp", "dnn"
"""Those that are trained where none is named."""

OPTIMIZERS: Mapping[str, OptimizerDefaults] = {
    "adam": OptimizerDefaults("Adam", 0.001),
    "sgd": OptimizerDefaults("SGD", 0.1),
    "momentum": OptimizerDefaults("SGD", 0.02, {"momentum": 0.9}),
}
"""The optimizers, by the name in ``optimizer=``; the first where none is named."""


def is_table(name: Any) -> bool:
    """Whether what ``network=`` was given names a network for tables."""
    return isinstance(name, str) and name in REGISTRY and REGISTRY[name].table


def build(network: plan.Network, user_model: Any = None, dtype: str | None = None) -> Any:
    """Make the Keras model with fresh weights, drawn from Keras' global seed.

    Args:
        network: What to build.
        user_model: What the user's function gave, for a network that only it can make.
        dtype: Of the inputs, where not ``input_dtype``.

    Raises:
        errors.ModelMismatch: The network is the user's own, and cannot be made without that.
    """
    import keras

    from spark_mnist.networks import custom

    # Names of a user's model are his.
    name = None if network.name == plan.CUSTOM else "features"
    dtype = dtype or input_dtype(network)
    inputs = keras.Input((network.inputs,), name=name, dtype=dtype)
    x = _standardized(inputs, network, dtype)
    if network.name == plan.CUSTOM:
        outputs = custom.attach(x, network, user_model)
    else:
        hidden = REGISTRY[network.name].build_layers(x, network)
        outputs = keras.layers.Dense(
            network.classes, activation="softmax", name="classes", dtype=FLOAT32
        )(hidden)
    if outputs.dtype != FLOAT32:  # of a user's model, in mixed precision
        outputs = keras.layers.Activation("linear", dtype=FLOAT32, name="as_float32")(outputs)
    return keras.Model(inputs, outputs, name=network.name)


def input_dtype(network: plan.Network) -> str:
    """Return the dtype of a network's inputs.

    Doubles until they are standardised: seconds since 1970 differ by 128 or not at all as floats.
    """
    return "float64" if network.mean else FLOAT32


def exported_dtype(network: plan.Network) -> str:
    """Return the dtype in which a network outside of Spark takes its inputs.

    Floats, as other tools expect them, but where features could not be told apart as floats.
    """
    mean, deviation = np.asarray(network.mean), np.asarray(network.deviation)
    coarse = bool((np.abs(mean) > MOST_OFFSET * deviation).any())
    limits = np.finfo(np.float32)
    outside = bool(((deviation < limits.tiny) | (deviation > limits.max / MOST_OFFSET)).any())
    return "float64" if coarse or outside else FLOAT32


def numbers(stored: Any, scale: float, dtype: str = FLOAT32) -> Any:
    """Convert rows as they are stored, ``[B, inputs]``, to what a network takes."""
    from keras import ops

    return ops.cast(stored, dtype) / scale


def optimizer(spec: plan.Optimizer, learning_rate: float) -> Any:
    """Make the Keras optimizer with the given rate in place of the specification's."""
    import keras

    rule = OPTIMIZERS[spec.name]
    return getattr(keras.optimizers, rule.name)(learning_rate, **rule.settings)


def _standardized(x: Any, network: plan.Network, dtype: str) -> Any:
    """Mean 0 and deviation 1 for each feature, as the training rows had them."""
    from keras import layers

    if not network.mean:
        return x
    # Not Keras's Normalization, which takes deviations below 1e-7 for 1e-7.
    # As arrays of doubles, since TensorFlow makes floats of lists.
    mean, deviation = np.asarray(network.mean), np.asarray(network.deviation)
    scale, offset = 1 / deviation, -mean / deviation
    return layers.Rescaling(scale, offset, dtype=dtype, name="standardized")(x)
