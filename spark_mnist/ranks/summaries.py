"""TensorBoard files of a fit: curves by epoch, and the graph. Runs on: rank.

Only rank 0 writes them. Names and folders are those of Keras's own callback, so that its users find
the names that they know. TensorBoard itself need not be installed: TensorFlow writes the events,
and since 2.21 comes without TensorBoard.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

import keras
import tensorflow as tf

from spark_mnist.core import plan

SCALARS_PLUGIN = "scalars"
"""Name of TensorBoard's plugin that draws curves."""


class SummaryWriter(contextlib.AbstractContextManager["SummaryWriter"]):
    """Writer of the event files of one fit, which stay in memory until ``files`` returns them.

    The files lie in a folder ``train``, with the graph, and in a folder ``validation`` where the
    fit validates.
    """

    def __init__(self) -> None:
        self._root = f"ram://spark_mnist/{uuid.uuid4().hex}"
        self._writers: dict[str, Any] = {}

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        if tf.io.gfile.exists(self._root):
            tf.io.gfile.rmtree(self._root)

    def graph(self, model: keras.Model) -> None:
        """Write the graph that turns features into outputs."""
        call = tf.function(lambda features: model(features, training=False))
        signature = tf.nest.map_structure(
            lambda tensor: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype), model.input
        )
        with self._writer("train").as_default():
            tf.summary.graph(call.get_concrete_function(signature).graph)

    def epoch(self, record: plan.EpochRecord, learning_rate: float) -> None:
        """Write an epoch's means, and the learning rate at the start of the epoch."""
        means = {**record.losses, **record.metrics, "learning_rate": learning_rate}
        for name, value in means.items():
            folder = "validation" if name.startswith("val_") else "train"
            with self._writer(folder).as_default():
                tf.summary.write(
                    f"epoch_{name.removeprefix('val_')}",
                    tf.constant(value, tf.float32),
                    step=record.epoch,
                    metadata=_scalar_metadata(),
                )

    def files(self) -> dict[str, bytes]:
        """Return the contents of all files so far, by path below the version's directory."""
        for writer in self._writers.values():
            writer.flush()
        return {
            f"{plan.LOGS}{path.removeprefix(f'{self._root}/')}": tf.io.gfile.GFile(
                path, "rb"
            ).read()
            for path in sorted(tf.io.gfile.glob(f"{self._root}/*/*"))
        }

    def _writer(self, folder: str) -> Any:
        if folder not in self._writers:
            self._writers[folder] = tf.summary.create_file_writer(f"{self._root}/{folder}")
        return self._writers[folder]


def _scalar_metadata() -> Any:
    """Return the metadata of a scalar; ``tf.summary.scalar`` needs TensorBoard to make it."""
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = SCALARS_PLUGIN
    return metadata
