"""Data-parallel training with Keras 3 over Horovod's public collectives. Runs on ranks.

Horovod's own ``DistributedOptimizer`` hooks a method that Keras 3 no longer calls: it trains
without averaging and without a word. Here the averaging sits in ``apply``, where every gradient
passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf


def averaged(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the same optimizer, made to average the ranks' gradients before it applies them.

    Clipping, weight decay and moments come after, on the average. One allreduce a tensor, so that
    each starts while the backward pass still computes the next. A gradient that is None stays so.
    """
    base = type(optimizer)

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        mean = [
            g if g is None else hvd.allreduce(tf.convert_to_tensor(g), op=hvd.Average)
            for g in grads
        ]
        base.apply(self, mean, trainable_variables)

    distributed: Any = type(base.__name__, (base,), {"apply": apply, "__module__": base.__module__})
    return distributed.from_config(optimizer.get_config())


def state(model: keras.Model) -> list[keras.Variable]:
    """Weights and optimizer variables in a fixed order, those that all ranks share.

    Seed generators' states are left out: they are no part of what was learned, and Horovod cannot
    broadcast their type.
    """
    return [*model.weights, *model.optimizer.variables]


def broadcast(model: keras.Model) -> None:
    """Give every rank rank 0's weights and optimizer variables."""
    hvd.broadcast_variables([variable.value for variable in state(model)], root_rank=0)


def seed_dropout(model: keras.Model, key: Sequence[int]) -> None:
    """Set the states of the model's random layers from a key, say (seed, epoch, rank).

    They are no part of a checkpoint, so an epoch must not depend on how it was arrived at.
    """
    states = [v for v in model.variables if "seed_generator_state" in v.path]
    for number, variable in enumerate(states):
        rng = np.random.default_rng((*key, number))
        variable.assign(rng.integers(0, 2**32, variable.shape, dtype=np.uint32))


def average_statistics(model: keras.Model) -> None:
    """Give every rank the mean of what layers like BatchNormalization noted of their own rows."""
    for variable in model.non_trainable_weights:
        value = tf.convert_to_tensor(variable.value)
        if value.dtype.is_floating:
            variable.assign(hvd.allreduce(value, op=hvd.Average))


def moments(rows: Any, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each feature over the rows of all ranks.

    Args:
        rows: This rank's, ``[N, W]`` as stored.
        scale: What a stored number is divided by.

    Returns:
        W numbers each. A feature that never varies gets a deviation of 1.
    """
    values = np.asarray(rows, np.float64) / scale
    count = total([len(values)])[0]
    mean = np.asarray(total(values.sum(axis=0))) / count
    variance = np.asarray(total(((values - mean) ** 2).sum(axis=0))) / count
    deviation = np.sqrt(variance)
    return tuple(mean.tolist()), tuple(np.where(deviation > 0, deviation, 1.0).tolist())


def total(values: Sequence[float]) -> list[float]:
    """Sum each value over the ranks."""
    summed = hvd.allreduce(tf.constant(values, tf.float64), op=hvd.Sum)
    return [float(value) for value in summed.numpy()]


def gathered(pair: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """A pair of numbers of each rank, in rank order."""
    first, second = [0.0] * hvd.size(), [0.0] * hvd.size()
    first[hvd.rank()], second[hvd.rank()] = pair
    summed = [int(value) for value in total([*first, *second])]
    return tuple(zip(summed[: hvd.size()], summed[hvd.size() :], strict=True))


def finite(model: keras.Model) -> bool:
    """Whether all weights are numbers; the same on every rank, as the weights are."""
    return all(np.isfinite(keras.ops.convert_to_numpy(w)).all() for w in model.trainable_weights)


def digest(model: keras.Model) -> str:
    """sha256 of what all ranks must hold alike."""
    sha = hashlib.sha256()
    for variable in state(model):
        sha.update(keras.ops.convert_to_numpy(variable).tobytes())
    return sha.hexdigest()
