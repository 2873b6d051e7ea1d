"""Data-parallel training with Keras 3 over Horovod's public collectives. Runs on: rank.

Horovod's own ``DistributedOptimizer`` hooks a method that Keras 3 no longer calls: it trains
without averaging and without a warning. Here gradients are averaged in ``apply``, which receives
every gradient.
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

from spark_mnist import errors
from spark_mnist.core import host_names

BUCKET_BYTES = 4 << 20
"""Most bytes of gradients in one allreduce; a larger gradient travels alone."""
HOROVOD_DEFAULTS = {
    "HOROVOD_CYCLE_TIME": "0.3",  # milliseconds between two looks for gradients; its own is 1
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",  # for a rank that starts late; its own is 30
}
"""Horovod's settings where the user's environment has none."""
HOROVOD_FUSION_OFF = {"HOROVOD_FUSION_THRESHOLD": "0"}
"""One more setting where there are other ranks. Horovod would fuse gradients that arrive together,
and so add numbers in another order each time. A process that starts Horovod twice with both
settings crashes; only a single rank in the user's process would do so."""


def start() -> None:
    """Start Horovod, tuned for short steps; settings that the environment already has stay.

    Raises:
        errors.ClusterError: Horovod needs an address of this host's name, and there is none; it
            would end the process.
    """
    alone = os.environ.get("HOROVOD_SIZE", "1") == "1"
    settings = {"HOROVOD_GLOO_IFACE": host_names.loopback()} if alone else HOROVOD_FUSION_OFF
    for name, value in (HOROVOD_DEFAULTS | settings).items():
        os.environ.setdefault(name, value)
    host_names.check(os.environ.get("HOROVOD_GLOO_IFACE", ""))
    with _batch_scheduling():
        hvd.init()


@contextlib.contextmanager
def _batch_scheduling() -> Iterator[None]:
    """Let threads that start in this block, Horovod's and Gloo's, yield to threads that wake up.

    Gloo's thread polls for as long as data waits that nobody has asked for. With an equal
    scheduling policy Gloo's thread would keep its core until the scheduler's next tick, and so
    block the thread that would ask for the data.
    """
    try:
        policy = os.sched_getscheduler(0)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:  # a sandbox may forbid it: steps are slower then
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, os.sched_param(0))


def distributed_optimizer(
    optimizer: keras.optimizers.Optimizer, wait_s: tf.Variable, *, compressed: bool = False
) -> keras.optimizers.Optimizer:
    """Make an optimizer average the ranks' gradients before it applies them, and return it.

    It keeps all that the user has set, also what its configuration does not hold.

    Clipping, weight decay and moments come after, on the average. Gradients travel in buckets, in
    the order in which the backward pass computes them. So one bucket is summed while the next is
    computed, and numbers are always added in the same order. A gradient that is None stays None.

    Args:
        optimizer: Optimizer for the gradients of one rank, not used before.
        wait_s: Float64 variable to which the seconds are added from a rank's last gradient until
            all gradients are averaged.
        compressed: Whether gradients travel as float16.
    """
    base = type(optimizer)

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        means = grads
        if hvd.size() > 1:
            variables = trainable_variables
            if variables is None:
                variables = self._trainable_variables
            means = _average_gradients(grads, variables, wait_s, compressed)
        base.apply(self, means, trainable_variables)

    members = {"apply": apply, "__module__": base.__module__}
    if base is keras.optimizers.Adam and not optimizer.amsgrad:
        members["update_step"] = _adam_step
    optimizer.__class__ = type(base.__name__, (base,), members)
    return optimizer


def finalize_average(model: keras.Model) -> None:
    """Give a model the moving average of its weights, where its optimizer keeps one."""
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if inner.use_ema:
        optimizer.finalize_variable_values(model.trainable_variables)


def _adam_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """Take Adam's step like Keras and with its slots, in one pass over memory, not a dozen."""
    slot, dtype = self._get_variable_index(variable), variable.dtype
    step = tf.cast(tf.convert_to_tensor(self.iterations) + 1, dtype)
    beta1, beta2 = tf.constant(self.beta_1, dtype), tf.constant(self.beta_2, dtype)
    tf.raw_ops.ResourceApplyAdam(
        var=_handle(variable),
        m=_handle(self._momentums[slot]),
        v=_handle(self._velocities[slot]),
        beta1_power=tf.pow(beta1, step),
        beta2_power=tf.pow(beta2, step),
        lr=tf.cast(learning_rate, dtype),
        beta1=beta1,
        beta2=beta2,
        epsilon=tf.constant(self.epsilon, dtype),
        grad=tf.cast(tf.convert_to_tensor(gradient), dtype),
    )


def _handle(variable: Any) -> tf.Tensor:
    """Return the handle of TensorFlow's variable, which Keras passes bare or in one of its own."""
    tf_variable = variable.value if isinstance(variable, keras.Variable) else variable
    return tf_variable.handle


def timestamp() -> tf.Tensor:
    """Return seconds, in a graph; always 0 with ``TF_DETERMINISTIC_OPS``, which allows no clock."""
    if os.environ.get("TF_DETERMINISTIC_OPS", "0").lower() in ("1", "true"):
        return tf.constant(0.0, tf.float64)
    return tf.timestamp()


def _average_gradients(
    grads: Sequence[Any], variables: Sequence[Any], wait_s: tf.Variable, compressed: bool
) -> list[Any]:
    compression = hvd.Compression.fp16 if compressed else hvd.Compression.none
    local_grads = [
        grad if grad is None else tf.ensure_shape(tf.convert_to_tensor(grad), variable.shape)
        for grad, variable in zip(grads, variables, strict=True)
    ]
    with tf.control_dependencies([g for g in local_grads if g is not None]):
        wait_start = timestamp()
    means: list[Any] = [None] * len(local_grads)
    for bucket in _buckets(local_grads):
        flat = _flatten_bucket([local_grads[index] for index in bucket])
        flat_mean = hvd.allreduce(flat, op=hvd.Average, compression=compression)
        for index, part in zip(
            bucket, _split_bucket(flat_mean, [local_grads[i] for i in bucket]), strict=True
        ):
            means[index] = part
    with tf.control_dependencies([g for g in means if g is not None]):
        wait_s.assign_add(timestamp() - wait_start)
    return means


def _buckets(grads: Sequence[Any]) -> list[list[int]]:
    """Return for each bucket the indices of the gradients in it, last layer first."""
    buckets: list[list[int]] = []
    size, dtype = 0, None
    for index in reversed(range(len(grads))):
        grad = grads[index]
        if grad is None:
            continue
        grad_bytes = grad.shape.num_elements() * grad.dtype.size
        if not buckets or size + grad_bytes > BUCKET_BYTES or grad.dtype != dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(index)
        size, dtype = size + grad_bytes, grad.dtype
    return buckets


def _flatten_bucket(grads: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return several gradients as one vector, and a single gradient as it is."""
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
    """Make batch normalization layers use mean and variance over the batches of all ranks."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.BatchNormalization):
            base = type(layer)
            members = {"_moments": _global_moments, "__module__": base.__module__}
            layer.__class__ = type(base.__name__, (base,), members)


def _global_moments(self: Any, inputs: Any, mask: Any) -> tuple[Any, Any]:
    """Return mean and variance of a batch over all ranks, each of which has as many rows."""
    if mask is not None:  # its rows would need weights; a mask shows only when Keras traces layers
        raise errors.OptionError("sync_batch_norm=true does not support masked inputs")
    axes = [axis for axis in range(len(inputs.shape)) if axis != self.axis % len(inputs.shape)]
    x = tf.cast(inputs, tf.float32)
    mean = hvd.allreduce(tf.reduce_mean(x, axes), op=hvd.Average)
    shape = [-1 if axis not in axes else 1 for axis in range(len(inputs.shape))]
    distances = tf.reduce_mean(tf.square(x - tf.reshape(mean, shape)), axes)
    variance = hvd.allreduce(distances, op=hvd.Average)
    return tf.cast(mean, inputs.dtype), tf.cast(variance, inputs.dtype)


def _state(model: keras.Model) -> list[keras.Variable]:
    """Return the weights and optimizer variables that all ranks share, in a fixed order.

    The states of seed generators are excluded: they are not learned, and Horovod cannot broadcast
    their type.
    """
    return [*model.weights, *model.optimizer.variables]


def broadcast(model: keras.Model) -> None:
    """Give every rank rank 0's weights and optimizer variables."""
    hvd.broadcast_variables([variable.value for variable in _state(model)], root_rank=0)


def seed_random_layers(model: keras.Model, key: Sequence[int]) -> None:
    """Set the states of the model's random layers from a key, say (seed, epoch, rank).

    A checkpoint does not hold these states, so an epoch must not depend on how the fit reached it.
    """
    for number, variable in enumerate(random_states(model)):
        rng = np.random.default_rng((*key, number))
        variable.assign(rng.integers(0, 2**32, variable.shape, dtype=np.uint32))


def random_states(model: keras.Model) -> list[keras.Variable]:
    """Return the states of the model's random layers."""
    return [v for v in model.variables if "seed_generator_state" in v.path]


def statistics(model: keras.Model) -> list[npt.NDArray[Any]]:
    """Return copies of the weights that no gradient changes."""
    return [keras.ops.convert_to_numpy(variable) for variable in model.non_trainable_weights]


def average_statistics(model: keras.Model, before: Sequence[npt.NDArray[Any]]) -> None:
    """Give every rank the mean of the ranks' statistics, say those of BatchNormalization layers.

    Args:
        model: Model of this rank.
        before: Result of ``statistics`` before the epoch. Weights that no rank has changed since
            then stay equal to the last bit; the mean of equal numbers need not be.
    """
    if not before:
        return
    now = statistics(model)
    change_counts = allreduce_sum(
        [float(not np.array_equal(a, b)) for a, b in zip(before, now, strict=True)]
    )
    for variable, change_count in zip(model.non_trainable_weights, change_counts, strict=False):
        value = tf.convert_to_tensor(variable.value)
        if change_count and value.dtype.is_floating:
            variable.assign(hvd.allreduce(value, op=hvd.Average))


def moments(
    parts: Callable[[], Iterable[npt.NDArray[Any]]], scale: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each feature over the rows of all ranks.

    Args:
        parts: Function that returns this rank's rows as stored, part by part, ``[n, W]``; called
            three times.
        scale: Divisor of the stored numbers.

    Returns:
        W means and W deviations. A feature that never varies has a deviation of 0.
    """
    lows, highs, rows = [], [], 0
    for part in parts():
        lows.append(part.min(axis=0).astype(np.float64))
        highs.append(part.max(axis=0).astype(np.float64))
        rows += len(part)
    low, high = _extreme(np.min(lows, axis=0), hvd.Min), _extreme(np.max(highs, axis=0), hvd.Max)
    count = allreduce_sum([rows])[0]
    # Numbers are in units of a power of two, so that no sum or square overflows and nothing is
    # rounded; and count from the least value, so that small differences of large numbers stay.
    largest = np.maximum(np.abs(low), np.abs(high))
    exponent = np.frexp(largest)[1]
    origin = np.ldexp(low, -exponent)
    value_range = np.ldexp(high, -exponent) - origin
    range_exponent = np.frexp(value_range)[1]

    def units(part: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = np.ldexp(part.astype(np.float64), -exponent)
        return np.asarray(np.ldexp(values - origin, -range_exponent), np.float64)

    mean = (
        np.asarray(allreduce_sum(np.sum([units(part).sum(axis=0) for part in parts()], axis=0)))
        / count
    )
    squares = [((units(part) - mean) ** 2).sum(axis=0) for part in parts()]
    variance = np.asarray(allreduce_sum(np.sum(squares, axis=0))) / count
    means = np.ldexp(origin + np.ldexp(mean, range_exponent), exponent) / scale
    deviations = np.ldexp(np.ldexp(np.sqrt(variance), range_exponent), exponent) / scale
    varies = (high > low) & (deviations > np.finfo(np.float64).tiny)
    return tuple(means.tolist()), tuple(np.where(varies, deviations, 0.0).tolist())


def _extreme(values: npt.NDArray[np.float64], op: Any) -> npt.NDArray[np.float64]:
    """Return the least or largest of each value over the ranks, as ``op`` says."""
    extremes: npt.NDArray[np.float64] = np.asarray(hvd.allreduce(tf.constant(values), op=op))
    return extremes


def allreduce_sum(values: npt.ArrayLike) -> list[float]:
    """Sum each value over the ranks."""
    sums = hvd.allreduce(tf.constant(values, tf.float64), op=hvd.Sum)
    return [float(value) for value in sums.numpy()]


def allgather_int(number: int) -> tuple[int, ...]:
    """Return an integer of each rank, in rank order."""
    numbers = [0.0] * hvd.size()
    numbers[hvd.rank()] = number
    return tuple(int(value) for value in allreduce_sum(numbers))


def gather_bytes(content: bytes) -> bytes:
    """Return the bytes of all ranks, of equal length, joined in rank order; on every rank."""
    buffer = tf.constant(np.frombuffer(content, np.uint8))
    return bytes(hvd.allgather(buffer).numpy().tobytes())


def broadcast_bytes(content: bytes) -> bytes:
    """Return rank 0's bytes on every rank."""
    size = int(allreduce_sum([len(content) if hvd.rank() == 0 else 0])[0])
    if not size:
        return b""
    buffer = np.frombuffer(content, np.uint8) if hvd.rank() == 0 else np.zeros(size, np.uint8)
    received = hvd.broadcast(tf.constant(buffer), root_rank=0)
    return bytes(received.numpy().tobytes())


def finite(model: keras.Model) -> bool:
    """Return whether all weights are finite; equal on every rank, since the weights are equal."""
    floats = (w for w in model.weights if "float" in w.dtype)
    return all(np.isfinite(keras.ops.convert_to_numpy(w)).all() for w in floats)


def digest(model: keras.Model) -> str:
    """Return the sha256 of the variables that must be equal on all ranks."""
    sha = hashlib.sha256()
    for variable in _state(model):
        sha.update(keras.ops.convert_to_numpy(variable).tobytes())
    return sha.hexdigest()
