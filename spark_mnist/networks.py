"""The Keras models that can be trained, and their optimizers. Runs on ranks and executors.

Every network takes float32 ``[B, inputs]`` and gives class probabilities ``[B, classes]``. Layers
are named, so that a saved model's arrays can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable

import keras

from spark_mnist import plan

Stack = Callable[[keras.KerasTensor], keras.KerasTensor]


def _softmax(x: keras.KerasTensor) -> keras.KerasTensor:
    """Softmax regression: no hidden layer."""
    return x


def _mlp(x: keras.KerasTensor) -> keras.KerasTensor:
    """Two ReLU layers of 128 and 32 units."""
    for number, units in enumerate((128, 32), start=1):
        x = keras.layers.Dense(units, activation="relu", name=f"hidden_{number}")(x)
    return x


REGISTRY: dict[str, Stack] = {"mlp": _mlp, "softmax": _softmax}
"""The layers between input and class probabilities, by the name in ``network=``."""

OPTIMIZERS: dict[str, Callable[[float], keras.optimizers.Optimizer]] = {
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "sgd": lambda rate: keras.optimizers.SGD(rate),
    "momentum": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
}


def build(network: plan.Network) -> keras.Model:
    """Make the model with fresh weights, drawn from Keras' global seed."""
    inputs = keras.Input((network.inputs,), name="features")
    hidden = REGISTRY[network.name](inputs)
    outputs = keras.layers.Dense(network.classes, activation="softmax", name="classes")(hidden)
    return keras.Model(inputs, outputs, name=network.name)


def optimizer(spec: plan.Optimizer, learning_rate: float) -> keras.optimizers.Optimizer:
    """Make the optimizer with the given rate in place of the specification's."""
    return OPTIMIZERS[spec.name](learning_rate)
