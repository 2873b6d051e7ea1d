"""Take steps with each optimizer on one rank, and save what came of it: averaging.py OUTPUT."""

import pickle
import sys
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from spark_mnist.ranks import collectives

OPTIMIZERS = {
    "sgd": {"class_name": "SGD", "config": {"learning_rate": 0.1}},
    "clipped": {"class_name": "SGD", "config": {"learning_rate": 0.1, "clipnorm": 0.05}},
    "momentum": {"class_name": "SGD", "config": {"learning_rate": 0.1, "momentum": 0.9}},
    "adam": {"class_name": "Adam", "config": {"learning_rate": 0.01}},
}


def train_each(optimizers):
    """For each optimizer, take three steps on this rank's part of the same batches."""
    collectives.start()
    found = {name: steps(config, hvd.rank(), hvd.size()) for name, config in optimizers.items()}
    sums = collectives.allreduce_sum([hvd.rank() + 1.0, 0.5])
    hvd.shutdown()
    return found, sums


def steps(config, rank, ranks):
    keras.utils.set_random_seed(rank)  # other weights on each rank, until rank 0's are broadcast
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(3)]
    )
    without_gradient = keras.Variable(np.ones(2, "float32"), name="unused")
    waited = tf.Variable(0.0, dtype=tf.float64)
    model.optimizer = collectives.distributed_optimizer(
        keras.optimizers.deserialize(config), waited
    )
    trained = [*model.trainable_variables, without_gradient]
    model.optimizer.build(trained)
    collectives.broadcast(model)
    rng = np.random.default_rng(7)
    part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    for _ in range(3):
        x, y = rng.normal(size=(2, 8, 6)).astype("float32")
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[part]) - y[part, :3]) ** 2)
        gradients = tape.gradient(loss, [v.value for v in trained])
        assert gradients[-1] is None
        model.optimizer.apply(gradients, trained)
    assert (float(waited) > 0) == (ranks > 1)
    return [v.numpy() for v in model.weights], collectives.digest(model)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(pickle.dumps(train_each(OPTIMIZERS)))
