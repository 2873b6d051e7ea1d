"""What TensorBoard shows of a fit: curves by epoch, and the graph. Runs on rank 0.

Names and folders are those of Keras's own callback, so that its users find what they know.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from spark_mnist import plan


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Event files of one fit, kept on this machine until they are taken.

    They fill a folder ``train``, with the graph, and one ``validation`` where there is any.
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="spark-mnist-")
        self._root = Path(self._directory.name)
        self._writers: dict[str, Any] = {}

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        self._directory.cleanup()

    def graph(self, model: keras.Model) -> None:
        """Draw what turns features into class probabilities."""
        call = tf.function(lambda features: model(features, training=False))
        signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)
        with self._writer("train").as_default():
            tf.summary.graph(call.get_concrete_function(signature).graph)

    def epoch(self, record: plan.EpochRecord, learning_rate: float) -> None:
        """Note an epoch's means, and the learning rate with which it ended."""
        means = {**record.losses, **record.metrics, "learning_rate": learning_rate}
        for name, value in means.items():
            folder = "validation" if name.startswith("val_") else "train"
            with self._writer(folder).as_default():
                tf.summary.scalar(f"epoch_{name.removeprefix('val_')}", value, record.epoch)

    def files(self) -> dict[str, bytes]:
        """Contents of all files so far, by name below the version."""
        for writer in self._writers.values():
            writer.flush()
        return {
            f"{plan.LOGS}{path.relative_to(self._root)}": path.read_bytes()
            for path in sorted(self._root.rglob("*"))
            if path.is_file()
        }

    def _writer(self, folder: str) -> Any:
        if folder not in self._writers:
            self._writers[folder] = tf.summary.create_file_writer(str(self._root / folder))
        return self._writers[folder]
