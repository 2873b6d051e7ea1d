"""The loop over batches, which TensorFlow runs in its graph. Runs on ranks.

Keras's own ``fit`` makes iterators and callbacks anew for every epoch, and does not tell how long
its steps waited for rows. Here Keras's steps stand in a loop that does. Shape letters: B = rows of
a batch, W = numbers of a row.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

BLOCK = 32
"""Most steps that TensorFlow takes without coming back to Python."""
SECONDS = 1.0
"""That a call should take at most: each one that returns is a sign of life."""


class Loop:
    """Takes one kind of step, many at a time.

    Args:
        step: What Keras does with one batch: ``train_step`` or ``test_step`` of a compiled model.
    """

    def __init__(self, step: Callable[[Any], Any]) -> None:
        self._step = step
        # Without autograph, as Keras runs its steps: a user's layers are not rewritten.
        self._call = tf.function(self._take, reduce_retracing=True, autograph=False)
        self._most = 1
        """Steps of the next call, as the last one went."""
        self.seconds = 0.0
        """In all blocks of ``timed``."""
        self.waited = 0.0
        """That steps waited for rows."""

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a block."""
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun

    def run(self, data: tf.data.Dataset, steps: int) -> Iterator[int]:
        """Take so many steps.

        Args:
            data: Batches of (features [B, W] float32, label [B] int32, weight [B] float32).
            steps: How many of them.

        Yields:
            The number of steps done, after each call of TensorFlow; each multiple of ``BLOCK`` is
            among them.
        """
        batches, done = iter(data), 0
        while done < steps:
            count = min(self._most, BLOCK - done % BLOCK, steps - done)
            begun = time.perf_counter()
            self.waited += float(self._call(batches, tf.constant(count)))
            seconds = time.perf_counter() - begun
            self._most = max(1, min(BLOCK, int(count * SECONDS / seconds)))
            done += count
            yield done

    def _take(self, batches: Any, count: tf.Tensor) -> tf.Tensor:
        """Take so many steps in the graph; returns the seconds of waiting."""

        def one(done: tf.Tensor, waited: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            asked = tf.timestamp()
            with tf.control_dependencies([asked]):
                batch = _next(batches)
            with tf.control_dependencies(batch):
                got = tf.timestamp()
            self._step(batch)
            return done + 1, waited + got - asked

        start = tf.constant(0), tf.constant(0.0, tf.float64)
        _, waited = tf.while_loop(lambda done, _: done < count, one, start, parallel_iterations=1)
        return waited


def _next(batches: Any) -> tuple[tf.Tensor, ...]:
    """The next batch, taken on this thread: ``next`` wakes another one up to take it."""
    (iterator,) = tf.nest.flatten(batches, expand_composites=True)
    specs = tf.nest.flatten(batches.element_spec)
    batch = tf.raw_ops.IteratorGetNextSync(
        iterator=iterator,
        output_types=[spec.dtype for spec in specs],
        output_shapes=[spec.shape for spec in specs],
    )
    return tuple(batch)
