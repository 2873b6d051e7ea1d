"""Loop over batches, which TensorFlow runs in its graph. Runs on: rank.

Keras's own ``fit`` makes new iterators and callbacks for every epoch, and does not tell how long
its steps waited for rows. Here steps run in a loop that measures the wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from spark_mnist.ranks import batches, collectives

BLOCK = 32
"""Most steps that TensorFlow takes without returning to Python."""
MAX_CALL_S = 1.0
"""Seconds that a call should take at most: each call that returns is a sign of life."""


class Loop:
    """Loop that takes one kind of step, many at a time.

    Args:
        step: Function of one batch, say ``Objective.train_step``.
        clock: Function that returns seconds since any moment.
    """

    def __init__(
        self, step: Callable[[Any], Any], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._step, self._clock = step, clock
        self._take: Callable[[Any, tf.Tensor], tuple[Any, ...]] | None = None
        """Function that makes the batches of ``run``."""
        # Without autograph, as Keras runs its steps: a user's layers are not rewritten.
        self._call = tf.function(self._take_steps, reduce_retracing=True, autograph=False)
        self._max_steps = 1
        """Most steps of the next call, from the speed of the last call."""
        self.seconds = 0.0
        """Seconds in all blocks of ``timer``."""
        self.wait_s = 0.0
        """Seconds that steps waited for rows."""

    @contextlib.contextmanager
    def timer(self) -> Iterator[None]:
        """Add the time of a block to ``seconds``."""
        start = self._clock()
        yield
        self.seconds += self._clock() - start

    def run(self, data: batches.Batches, block: int = BLOCK) -> Iterator[int]:
        """Take a step on each batch.

        Args:
            data: Batches of one shard, the same in all calls.
            block: Most steps of a call of TensorFlow.

        Yields:
            The number of steps of the epoch so far, after each call of TensorFlow; each multiple of
            ``block`` is among them.
        """
        self._take, step = data.take, data.first
        while step < data.steps:
            count = min(self._max_steps, block - step % block, data.steps - step)
            start = self._clock()
            first, end = tf.constant(step), tf.constant(step + count)
            self.wait_s += float(self._call(data.source, first, end))
            seconds = self._clock() - start
            self._max_steps = max(1, min(BLOCK, int(count * MAX_CALL_S / seconds)))
            step += count
            yield step

    def _take_steps(self, source: Any, first: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
        """Take the steps up to ``end`` in the graph; return the seconds of waiting for rows."""
        assert self._take is not None
        take = self._take

        def take_step(step: tf.Tensor, wait_s: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            wait_start = collectives.timestamp()
            with tf.control_dependencies([wait_start]):
                batch = take(source, step)
            with tf.control_dependencies(tf.nest.flatten(batch)):
                wait_end = collectives.timestamp()
            self._step(batch)
            return step + 1, wait_s + wait_end - wait_start

        start = first, tf.constant(0.0, tf.float64)
        _, wait_s = tf.while_loop(
            lambda step, _: step < end, take_step, start, parallel_iterations=1
        )
        return wait_s
