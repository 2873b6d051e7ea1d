"""The least that a data-parallel step costs: layers of Keras in one loop of TensorFlow, no Spark.

    python -m benchmarks.bare_loop ARRAYS NETWORK BATCH RANKS

Each rank keeps its rows as bytes and gathers a batch inside the step; gradients are averaged as one
vector over Horovod and Gloo; Adam and an accuracy are those of Keras. Nothing is checked, weighed,
counted, saved or watched. Writes rows/s of all ranks, the median of three runs, without the time in
which TensorFlow traces the loop.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.queues import Queue
from typing import Any

STEPS = {"mlp": 400, "cnn": 40}
"""Steps of a run, by network."""
LOCAL = "127.0.0.1"


def network(name: str) -> Any:
    """Make the network with logits."""
    from keras import Input, Sequential, layers

    dense = layers.Dense(10)
    if name == "mlp":
        hidden = [layers.Dense(units, activation="relu") for units in (128, 32)]
        return Sequential([Input((784,)), *hidden, dense])
    convolutions = [
        layer
        for filters in (32, 64)
        for layer in (
            layers.Conv2D(filters, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
        )
    ]
    flat = [layers.Flatten(), layers.Dense(1024, activation="relu")]
    return Sequential([Input((784,)), layers.Reshape((28, 28, 1)), *convolutions, *flat, dense])


def train(rank: int, ranks: int, port: int, words: list[str], results: Queue[float]) -> None:
    """Train on one rank; rank 0 puts the rows/s of all ranks into ``results``."""
    arrays, name, batch = words[0], words[1], int(words[2])
    place = {"RANK": rank, "SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_SIZE": ranks}
    place |= {"CROSS_RANK": 0, "CROSS_SIZE": 1, "HOSTNAME": "localhost", "CYCLE_TIME": 0.3}
    place |= {"GLOO_RENDEZVOUS_ADDR": LOCAL, "GLOO_RENDEZVOUS_PORT": port, "GLOO_IFACE": "lo"}
    place |= {"CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo"}
    os.environ |= {f"HOROVOD_{key}": str(value) for key, value in place.items()}
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    policy = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # as ranks do, for Gloo's threads
    hvd.init()
    os.sched_setscheduler(0, policy, os.sched_param(0))
    keras.utils.set_random_seed(0)
    with np.load(arrays) as rows:
        images, labels = (tf.constant(rows[kind][rank::ranks]) for kind in ("images", "labels"))
    model, optimizer = network(name), keras.optimizers.Adam()
    variables = model.trainable_variables
    optimizer.build(variables)
    accuracy = keras.metrics.SparseCategoricalAccuracy()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def average(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        if ranks == 1:
            return gradients
        flat = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0)
        sizes = [gradient.shape.num_elements() for gradient in gradients]
        parts = tf.split(hvd.allreduce(flat, op=hvd.Average), sizes)
        return [tf.reshape(part, g.shape) for part, g in zip(parts, gradients, strict=True)]

    @tf.function
    def run(steps: tf.Tensor) -> None:
        for _ in tf.range(steps):
            index = tf.random.uniform([batch], 0, tf.shape(labels)[0], tf.int32)
            x = tf.cast(tf.gather(images, index), tf.float32) / 255.0
            y = tf.gather(labels, index)
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                value = loss(y, logits)
            optimizer.apply(average(tape.gradient(value, variables)), variables)
            accuracy.update_state(y, logits)

    run(tf.constant(10))
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        run(tf.constant(STEPS[name]))
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        results.put(ranks * batch * STEPS[name] / statistics.median(seconds))
    hvd.shutdown()


def main(words: list[str]) -> None:
    """Start the ranks, and print the figure."""
    from horovod.runner.http.http_server import RendezvousServer

    ranks = int(words[3])
    server = RendezvousServer()
    port = server.start()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=train, args=(rank, ranks, port, words, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    sys.stdout.write(f"{results.get(timeout=300)}\n")
    for process in processes:
        process.join()
    server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
