"""The Keras models that can be trained, and their optimizers. Runs on ranks and executors.

Every network takes float32 ``[B, inputs]`` and gives class probabilities ``[B, classes]``. Layers
are named, so that a saved model's arrays can be told apart. A new network is a function in
``REGISTRY``, with its name in ``options`` and its defaults in ``lineage``.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import layers

from spark_mnist import own, plan

Stack = Callable[[keras.KerasTensor, plan.Network], keras.KerasTensor]
"""From the inputs ``[B, inputs]`` to what the class probabilities are computed of."""


def _dense(x: keras.KerasTensor, network: plan.Network) -> keras.KerasTensor:
    """ReLU layers of ``hidden`` units, then dropout."""
    for number, units in enumerate(network.hidden, start=1):
        x = layers.Dense(units, activation="relu", name=f"hidden_{number}")(x)
    return layers.Dropout(network.dropout, name="dropout")(x) if network.dropout else x


def _cnn(x: keras.KerasTensor, network: plan.Network) -> keras.KerasTensor:
    """32 and 64 filters of 5x5, each with 2x2 pooling, before the dense layers."""
    x = layers.Reshape((28, 28, 1), name="image")(x)
    for number, filters in enumerate((32, 64), start=1):
        name = f"convolution_{number}"
        x = layers.Conv2D(filters, 5, padding="same", activation="relu", name=name)(x)
        x = layers.MaxPooling2D(2, name=f"pooling_{number}")(x)
    return _dense(layers.Flatten(name="flat")(x), network)


REGISTRY: dict[str, Stack] = {
    "softmax": _dense,
    "mlp": _dense,
    "small": _dense,
    "cnn": _cnn,
    "dnn": _dense,
}
"""The networks, by the name in ``network=``."""

OPTIMIZERS: dict[str, Callable[[float], keras.optimizers.Optimizer]] = {
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "sgd": lambda rate: keras.optimizers.SGD(rate),
    "momentum": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
}


def build(network: plan.Network, made: keras.Model | None = None) -> keras.Model:
    """Make the model with fresh weights, drawn from Keras' global seed.

    Args:
        network: What to build.
        made: What the user's function gave, for a network that only it can make.

    Raises:
        errors.ModelMismatch: The network is the user's own, and cannot be made without that.
    """
    inputs = keras.Input((network.inputs,), name="features")
    x = _standardized(inputs, network)
    if network.name == plan.OWN:
        outputs = own.attach(x, network, made)
    else:
        hidden = REGISTRY[network.name](x, network)
        outputs = layers.Dense(network.classes, activation="softmax", name="classes")(hidden)
    return keras.Model(inputs, outputs, name=network.name)


def optimizer(spec: plan.Optimizer, learning_rate: float) -> keras.optimizers.Optimizer:
    """Make the optimizer with the given rate in place of the specification's."""
    return OPTIMIZERS[spec.name](learning_rate)


def _standardized(x: keras.KerasTensor, network: plan.Network) -> keras.KerasTensor:
    """Mean 0 and deviation 1 for each feature, as the training rows had them."""
    if not network.mean:
        return x
    variance = [deviation**2 for deviation in network.deviation]
    return layers.Normalization(mean=[*network.mean], variance=variance, name="standardized")(x)
