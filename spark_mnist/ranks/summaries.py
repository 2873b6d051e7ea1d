"""What TensorBoard shows of a fit: curves by epoch, and the graph. Runs on rank 0.

Names and folders are those of Keras's own callback, so that its users find what they know.
TensorBoard itself need not be installed: TensorFlow writes the events, and since 2.21 comes without
it.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

import keras
import tensorflow as tf

from spark_mnist.core import plan

SCALARS = "scalars"
"""The plugin of TensorBoard that draws curves."""


class SummaryWriter(contextlib.AbstractContextManager["SummaryWriter"]):
    """Event files of one fit, kept in memory until they are taken.

    They fill a folder ``train``, with the graph, and one ``validation`` where there is any.
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
        """Draw what turns features into class probabilities."""
        call = tf.function(lambda features: model(features, training=False))
        signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)
        with self._writer("train").as_default():
            tf.summary.graph(call.get_concrete_function(signature).graph)

    def epoch(self, record: plan.EpochRecord, learning_rate: float) -> None:
        """Note an epoch's means, and the learning rate with which it began."""
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
        """Contents of all files so far, by name below the version."""
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
    """Return what ``tf.summary.scalar`` notes of a value, for which it needs TensorBoard."""
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = SCALARS
    return metadata
