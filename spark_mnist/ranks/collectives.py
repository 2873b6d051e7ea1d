"""Data-parallel training with Keras 3 over Horovod's public collectives. Runs on ranks.

Horovod's own ``DistributedOptimizer`` hooks a method that Keras 3 no longer calls: it trains
without averaging and without a word. Here the averaging sits in ``apply``, where every gradient
passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

BUCKET_BYTES = 4 << 20
"""Gradients of which one allreduce takes at most so many bytes, or one that is larger alone."""
TUNED = {
    "HOROVOD_CYCLE_TIME": "0.3",  # milliseconds between two looks for gradients; its own is 1
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",  # for a rank that starts late; its own is 30
}
"""Horovod's settings where the user's environment has none."""
UNFUSED = {"HOROVOD_FUSION_THRESHOLD": "0"}
"""One more where there are other ranks: Horovod would fuse what arrives together, and so add in
another order each time. A process that starts Horovod twice with both settings crashes, which only
a single rank in the user's process would."""


def start() -> None:
    """Start Horovod, tuned for short steps; what the user set in its environment stays."""
    settings = TUNED | (UNFUSED if os.environ.get("HOROVOD_SIZE", "1") != "1" else {})
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    with _yielding_threads():
        hvd.init()


@contextlib.contextmanager
def _yielding_threads() -> Iterator[None]:
    """Let threads that start here, Horovod's and Gloo's, give way to all others that wake up.

    Gloo's thread polls for as long as data waits that nobody has asked for. At equal standing it
    keeps its core until the scheduler's next tick, and the thread that would ask from running.
    """
    try:
        before = os.sched_getscheduler(0)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:  # a sandbox may forbid it: steps are slower then
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


def distributed_optimizer(
    optimizer: keras.optimizers.Optimizer, waited: tf.Variable, *, compressed: bool = False
) -> keras.optimizers.Optimizer:
    """Return the same optimizer, made to average the ranks' gradients before it applies them.

    Clipping, weight decay and moments come after, on the average. Gradients travel in buckets, in
    the order in which the backward pass gives them, so that one bucket is summed while the next is
    computed, and numbers are always added in the same order. A gradient that is None stays so.

    Args:
        optimizer: For the gradients of one rank.
        waited: Takes the seconds from a rank's last gradient until all are averaged, float64.
        compressed: Whether gradients travel as float16.
    """
    base = type(optimizer)

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        mean = grads
        if hvd.size() > 1:
            variables = trainable_variables
            if variables is None:
                variables = self._trainable_variables
            mean = _mean(grads, variables, waited, compressed)
        base.apply(self, mean, trainable_variables)

    members = {"apply": apply, "__module__": base.__module__}
    if base is keras.optimizers.Adam and not optimizer.amsgrad:
        members["update_step"] = _adam_step
    distributed: Any = type(base.__name__, (base,), members)
    return distributed.from_config(optimizer.get_config())


def _adam_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """Adam's step, as Keras's and with its slots, but in one pass over memory, not a dozen."""
    slot, kind = self._get_variable_index(variable), variable.dtype
    done = tf.cast(self.iterations.value + 1, kind)
    beta1, beta2 = tf.constant(self.beta_1, kind), tf.constant(self.beta_2, kind)
    tf.raw_ops.ResourceApplyAdam(
        var=_handle(variable),
        m=_handle(self._momentums[slot]),
        v=_handle(self._velocities[slot]),
        beta1_power=tf.pow(beta1, done),
        beta2_power=tf.pow(beta2, done),
        lr=tf.cast(learning_rate, kind),
        beta1=beta1,
        beta2=beta2,
        epsilon=tf.constant(self.epsilon, kind),
        grad=tf.cast(tf.convert_to_tensor(gradient), kind),
    )


def _handle(variable: Any) -> tf.Tensor:
    """Of TensorFlow's variable, which Keras hands over bare or in one of its own."""
    own = variable.value if isinstance(variable, keras.Variable) else variable
    return own.handle


def _mean(
    grads: Sequence[Any], variables: Sequence[Any], waited: tf.Variable, compressed: bool
) -> list[Any]:
    compression = hvd.Compression.fp16 if compressed else hvd.Compression.none
    own = [
        grad if grad is None else tf.ensure_shape(tf.convert_to_tensor(grad), variable.shape)
        for grad, variable in zip(grads, variables, strict=True)
    ]
    with tf.control_dependencies([g for g in own if g is not None]):
        begun = tf.timestamp()
    mean: list[Any] = [None] * len(own)
    for bucket in _buckets(own):
        flat = _flatten_bucket([own[index] for index in bucket])
        averaged_bucket = hvd.allreduce(flat, op=hvd.Average, compression=compression)
        for index, part in zip(
            bucket, _split_bucket(averaged_bucket, [own[i] for i in bucket]), strict=True
        ):
            mean[index] = part
    with tf.control_dependencies([g for g in mean if g is not None]):
        waited.assign_add(tf.timestamp() - begun)
    return mean


def _buckets(grads: Sequence[Any]) -> list[list[int]]:
    """Return the places of gradients that travel together, last layer first."""
    buckets: list[list[int]] = []
    size, dtype = 0, None
    for index in reversed(range(len(grads))):
        grad = grads[index]
        if grad is None:
            continue
        bytes_of_grad = grad.shape.num_elements() * grad.dtype.size
        if not buckets or size + bytes_of_grad > BUCKET_BYTES or grad.dtype != dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(index)
        size, dtype = size + bytes_of_grad, grad.dtype
    return buckets


def _flatten_bucket(grads: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return several gradients as one vector, one as it is."""
    if len(grads) == 1:
        return grads[0]
    return tf.concat([tf.reshape(grad, [-1]) for grad in grads], axis=0)


def _split_bucket(flat: tf.Tensor, grads: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Undo ``_flatten_bucket``."""
    if len(grads) == 1:
        return [flat]
    parts = tf.split(flat, [grad.shape.num_elements() for grad in grads])
    return [tf.reshape(part, grad.shape) for part, grad in zip(parts, grads, strict=True)]


def synchronize_batch_norm(model: keras.Model) -> None:
    """Let layers that normalise a batch take mean and variance over the batches of all ranks."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.BatchNormalization):
            base = type(layer)
            members = {"_moments": _moments_of_all_ranks, "__module__": base.__module__}
            layer.__class__ = type(base.__name__, (base,), members)


def _moments_of_all_ranks(self: Any, inputs: Any, mask: Any) -> tuple[Any, Any]:
    """Mean and variance of a batch over all ranks, each of which has as many rows."""
    if mask is not None:  # its rows would need weights; only tracing the layer tells of one
        raise NotImplementedError("sync_batch_norm=true does not go with masked inputs")
    axes = [axis for axis in range(len(inputs.shape)) if axis != self.axis % len(inputs.shape)]
    x = tf.cast(inputs, tf.float32)
    mean = hvd.allreduce(tf.reduce_mean(x, axes), op=hvd.Average)
    shape = [-1 if axis not in axes else 1 for axis in range(len(inputs.shape))]
    distances = tf.reduce_mean(tf.square(x - tf.reshape(mean, shape)), axes)
    variance = hvd.allreduce(distances, op=hvd.Average)
    return tf.cast(mean, inputs.dtype), tf.cast(variance, inputs.dtype)


def state(model: keras.Model) -> list[keras.Variable]:
    """Weights and optimizer variables in a fixed order, those that all ranks share.

    Seed generators' states are left out: they are no part of what was learned, and Horovod cannot
    broadcast their type.
    """
    return [*model.weights, *model.optimizer.variables]


def broadcast(model: keras.Model) -> None:
    """Give every rank rank 0's weights and optimizer variables."""
    hvd.broadcast_variables([variable.value for variable in state(model)], root_rank=0)


def seed_random_layers(model: keras.Model, key: Sequence[int]) -> None:
    """Set the states of the model's random layers from a key, say (seed, epoch, rank).

    They are no part of a checkpoint, so an epoch must not depend on how it was arrived at.
    """
    states = [v for v in model.variables if "seed_generator_state" in v.path]
    for number, variable in enumerate(states):
        rng = np.random.default_rng((*key, number))
        variable.assign(rng.integers(0, 2**32, variable.shape, dtype=np.uint32))


def statistics(model: keras.Model) -> list[npt.NDArray[Any]]:
    """Return the weights that no gradient changes, as they are now."""
    return [keras.ops.convert_to_numpy(variable) for variable in model.non_trainable_weights]


def average_statistics(model: keras.Model, before: Sequence[npt.NDArray[Any]]) -> None:
    """Give every rank the mean of what layers like BatchNormalization noted of their own rows.

    Args:
        model: Of this rank.
        before: What ``statistics`` gave before the epoch. Weights that no rank has changed since
            stay as they are, to the last bit, which the mean of equal numbers need not be.
    """
    if not before:
        return
    now = statistics(model)
    changed = allreduce_sum(
        [float(not np.array_equal(a, b)) for a, b in zip(before, now, strict=True)]
    )
    for variable, ranks in zip(model.non_trainable_weights, changed, strict=False):
        value = tf.convert_to_tensor(variable.value)
        if ranks and value.dtype.is_floating:
            variable.assign(hvd.allreduce(value, op=hvd.Average))


def moments(
    parts: Callable[[], Iterable[npt.NDArray[Any]]], scale: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each feature over the rows of all ranks.

    Args:
        parts: Gives this rank's rows as stored, part by part, ``[n, W]``; called three times.
        scale: What a stored number is divided by.

    Returns:
        W numbers each. A feature that never varies has a deviation of 0.
    """
    lows, highs, rows = [], [], 0
    for part in parts():
        lows.append(part.min(axis=0).astype(np.float64))
        highs.append(part.max(axis=0).astype(np.float64))
        rows += len(part)
    low, high = extreme(np.min(lows, axis=0), hvd.Min), extreme(np.max(highs, axis=0), hvd.Max)
    count = allreduce_sum([rows])[0]
    # In units of a power of two, so that no sum or square overflows and nothing is rounded; and
    # from the least value, so that small differences of large numbers are kept.
    largest = np.maximum(np.abs(low), np.abs(high))
    exponent = np.frexp(largest)[1]
    start = np.ldexp(low, -exponent)
    distance = np.ldexp(high, -exponent) - start
    shrink = np.frexp(distance)[1]

    def units(part: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        whole: npt.NDArray[np.float64] = np.ldexp(part.astype(np.float64), -exponent)
        return np.asarray(np.ldexp(whole - start, -shrink), np.float64)

    mean = (
        np.asarray(allreduce_sum(np.sum([units(part).sum(axis=0) for part in parts()], axis=0)))
        / count
    )
    squares = [((units(part) - mean) ** 2).sum(axis=0) for part in parts()]
    variance = np.asarray(allreduce_sum(np.sum(squares, axis=0))) / count
    means = np.ldexp(start + np.ldexp(mean, shrink), exponent) / scale
    deviations = np.ldexp(np.ldexp(np.sqrt(variance), shrink), exponent) / scale
    sound = (high > low) & (deviations > np.finfo(np.float64).tiny)
    return tuple(means.tolist()), tuple(np.where(sound, deviations, 0.0).tolist())


def extreme(values: npt.NDArray[np.float64], op: Any) -> npt.NDArray[np.float64]:
    """Return the least or largest of each value over the ranks."""
    extremes: npt.NDArray[np.float64] = np.asarray(hvd.allreduce(tf.constant(values), op=op))
    return extremes


def allreduce_sum(values: npt.ArrayLike) -> list[float]:
    """Sum each value over the ranks."""
    summed = hvd.allreduce(tf.constant(values, tf.float64), op=hvd.Sum)
    return [float(value) for value in summed.numpy()]


def allgather_int(number: int) -> tuple[int, ...]:
    """A whole number of each rank, in rank order."""
    numbers = [0.0] * hvd.size()
    numbers[hvd.rank()] = number
    return tuple(int(value) for value in allreduce_sum(numbers))


def finite(model: keras.Model) -> bool:
    """Whether all weights are numbers; the same on every rank, as the weights are."""
    floats = (w for w in model.weights if "float" in w.dtype)
    return all(np.isfinite(keras.ops.convert_to_numpy(w)).all() for w in floats)


def digest(model: keras.Model) -> str:
    """sha256 of what all ranks must hold alike."""
    sha = hashlib.sha256()
    for variable in state(model):
        sha.update(keras.ops.convert_to_numpy(variable).tobytes())
    return sha.hexdigest()
