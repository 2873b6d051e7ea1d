"""Callbacks of the user during training, on every rank with the same logs. Runs on: rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import horovod.tensorflow as hvd
import keras

from spark_mnist.core import plan
from spark_mnist.networks import callbacks
from spark_mnist.ranks import collectives


class Hooks:
    """The user's callbacks, and the learning rate and the end that they ask for.

    Args:
        training: Plan of the training.
        model: The compiled model.
        state: State of the callbacks in the checkpoint from which rank 0 resumes; empty without.
    """

    def __init__(self, training: plan.TrainingPlan, model: keras.Model, state: bytes = b"") -> None:
        self._model = model
        self._callbacks = callbacks.make(training.callbacks_fn) if training.callbacks_fn else []
        self.has_batch_hooks = any(map(callbacks.has_batch_hooks, self._callbacks))
        """Whether steps must return to Python one by one."""
        self.rate_factor = training.resume.rate_factor if training.resume else 1.0
        """Factor of the learning rate that callbacks have set."""
        self._planned_rate = self._rate = 0.0
        if not self._callbacks:
            return
        self._list = keras.callbacks.CallbackList(
            self._callbacks,
            model=model,
            epochs=training.first_epoch + training.epochs,
            steps=training.sharding.steps,
            verbose=0,
        )
        model.stop_training = False
        self._list.on_train_begin()
        if content := collectives.broadcast_bytes(state):
            callbacks.restore(self._callbacks, content)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate that the plan says, times the factor of the callbacks."""
        self._model.optimizer.learning_rate.assign(rate * self.rate_factor)
        self._planned_rate, self._rate = rate, self._current_rate()

    def epoch_begin(self, epoch: int) -> None:
        """Call the hooks of an epoch's begin; epochs count from 0 over the model's life."""
        if self._callbacks:
            self._list.on_epoch_begin(epoch)
            self._take_rate()

    def batch_begin(self, step: int) -> None:
        """Call the hooks before a step, where callbacks have any."""
        if self.has_batch_hooks:
            self._list.on_train_batch_begin(step)
            self._take_rate()

    def batch_end(self, step: int, means: Callable[[], Mapping[str, float]]) -> None:
        """Call the hooks after a step, with the means over the epoch so far of all ranks."""
        if self.has_batch_hooks:
            self._list.on_train_batch_end(step, dict(means()))
            self._take_rate()

    def epoch_end(self, epoch: int, means: Mapping[str, float]) -> bool:
        """Call the hooks of an epoch's end.

        Returns:
            Whether a callback of any rank ends the training.
        """
        if not self._callbacks:
            return False
        self._list.on_epoch_end(epoch, dict(means))
        self._take_rate()
        is_first = hvd.rank() == 0
        values = [self.rate_factor if is_first else 0.0, float(self._model.stop_training)]
        self.rate_factor, stops = collectives.allreduce_sum(values)
        return bool(stops)

    def train_end(self) -> None:
        """Call the hooks of the end of the training, which may change the weights."""
        if self._callbacks:
            self._list.on_train_end()

    def save(self) -> dict[str, bytes]:
        """Return the file of a checkpoint that keeps the callbacks' state; none without any."""
        return {plan.CALLBACKS: callbacks.save(self._callbacks)} if self._callbacks else {}

    def _take_rate(self) -> None:
        """Keep a learning rate that a callback has set, as a factor of the plan's."""
        rate = self._current_rate()
        if rate != self._rate:
            if self._planned_rate:
                self.rate_factor = rate / self._planned_rate
            self._rate = rate

    def _current_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._model.optimizer.learning_rate))
