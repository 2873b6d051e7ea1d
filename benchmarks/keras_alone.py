"""Keras in memory, in one process, as a user without Spark has it: rows/s on stdout.

    python -m benchmarks.keras_alone ARRAYS fit|predict NETWORK BATCH THREADS EPOCHS SHARE

THREADS=0 lets TensorFlow use all cores; one of SHARE rows is used.
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from spark_mnist.core import plan
from spark_mnist.networks import registry


def main(
    path: str, verb: str, network: str, batch: int, threads: int, epochs: int, share: int
) -> float:
    """Train, or predict, and return rows/s."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    with np.load(path) as saved:
        images, labels = saved["images"].astype("float32") / 255, saved["labels"]
    hidden = registry.REGISTRY[network].hidden
    dropout = registry.REGISTRY[network].dropout
    model = registry.build(
        plan.Network(name=network, inputs=784, classes=10, hidden=hidden, dropout=dropout)
    )
    model.compile(
        optimizer=keras.optimizers.Adam(),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    images, labels = images[::share], labels[::share]
    if verb == "predict":  # once for each size of a batch, of which the last is another
        model.predict_on_batch(images[:batch])
        model.predict_on_batch(images[: len(images) % batch or batch])
    begun = time.perf_counter()
    if verb == "fit":
        model.fit(images, labels, batch_size=batch, epochs=epochs, verbose=0)
    else:
        for _ in range(epochs):
            for start in range(0, len(images), batch):
                model.predict_on_batch(images[start : start + batch])
    return len(images) * epochs / (time.perf_counter() - begun)


if __name__ == "__main__":
    path, verb, network, *numbers = sys.argv[1:]
    sys.stdout.write(f"{main(path, verb, network, *map(int, numbers))}\n")
