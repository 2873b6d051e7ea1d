"""The way of the Databricks notebooks: Petastorm's converter and ``make_tf_dataset`` on every rank.

Horovod's own optimizer does not average with Keras 3, so in our environment the ranks use ours; in
the peers' one they use its own, as the notebooks do.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from pyspark.sql import DataFrame


def converted(rows: DataFrame, directory: str) -> Any:
    """Materialise as the notebooks do."""
    from petastorm.spark import SparkDatasetConverter, make_spark_converter

    rows.sparkSession.conf.set(
        SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, f"file://{directory}"
    )
    try:
        return make_spark_converter(rows)
    finally:
        rows.sparkSession.conf.unset(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF)


Compiled = Callable[[Any], list[Any]]
"""Compiles a model on a rank with an optimizer that averages, and returns callbacks for it."""


def ours(model: Any) -> list[Any]:
    """Compile with our optimizer, on Keras 3."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    from spark_mnist.ranks import collectives

    waited = tf.Variable(0.0, dtype=tf.float64)
    optimizer = collectives.distributed_optimizer(keras.optimizers.Adam(0.001 * hvd.size()), waited)
    model.compile(optimizer=optimizer, **COMPILED)
    model.optimizer.build(model.trainable_variables)
    collectives.broadcast(model)
    return []


def horovods(model: Any) -> list[Any]:
    """Compile with Horovod's optimizer, on Keras 2, as the notebooks do."""
    import horovod.tensorflow.keras as hvd
    from tensorflow import keras

    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.001 * hvd.size()))
    model.compile(optimizer=optimizer, **COMPILED)
    return [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]


COMPILED = {
    "loss": "sparse_categorical_crossentropy",
    "metrics": ["accuracy"],
    "jit_compile": False,
}


def throughput(
    converter: Any, *, ranks: int, batch: int, epochs: int, compiled: Compiled = ours
) -> float:
    """Train the mlp; returns rows/s of all ranks."""
    import cloudpickle
    import horovod.spark

    per_rank = len(converter) // ranks
    seconds = horovod.spark.run(
        _rank,
        args=(cloudpickle.dumps(converter), per_rank // batch, batch, epochs, compiled),
        num_proc=ranks,
        use_gloo=True,
        verbose=0,
        executable=sys.executable,
    )
    return per_rank // batch * batch * ranks * epochs / max(seconds)


def _rank(pickled: bytes, steps: int, batch: int, epochs: int, compiled: Compiled) -> float:
    """Train on a rank with a pickled converter; returns the seconds."""
    import cloudpickle
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from tensorflow import keras

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    hvd.init()
    with contextlib.suppress(ImportError):  # the older packages need no more than Petastorm itself
        from spark_mnist.compat import petastorm

        petastorm.module()
    converter = cloudpickle.loads(pickled)
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    callbacks = compiled(model)
    shard = {"cur_shard": hvd.rank(), "shard_count": hvd.size()}
    with converter.make_tf_dataset(
        batch_size=batch, num_epochs=None, shuffling_queue_capacity=10_000, **shard
    ) as rows:
        data = rows.map(lambda row: (tf.reshape(row.image, (-1, 784)), row.label))
        begun = time.perf_counter()
        model.fit(data, steps_per_epoch=steps, epochs=epochs, verbose=0, callbacks=callbacks)
        seconds = time.perf_counter() - begun
    hvd.shutdown()
    return seconds
