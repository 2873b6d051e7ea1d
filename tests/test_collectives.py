"""The averaging optimizer on two real ranks, against one process on the joined batch."""

import sys

import numpy as np
import pytest

pytestmark = pytest.mark.ranks

OPTIMIZERS = {
    "sgd": {"class_name": "SGD", "config": {"learning_rate": 0.1}},
    "clipped": {"class_name": "SGD", "config": {"learning_rate": 0.1, "clipnorm": 0.05}},
    "momentum": {"class_name": "SGD", "config": {"learning_rate": 0.1, "momentum": 0.9}},
    "adam": {"class_name": "Adam", "config": {"learning_rate": 0.01}},
}


def train_each(optimizers):
    """Run on a rank: for each optimizer, three steps on this rank's part of the same batches."""
    import horovod.tensorflow as hvd

    from spark_mnist.ranks import collectives

    collectives.start()
    found = {name: steps(config, hvd.rank(), hvd.size()) for name, config in optimizers.items()}
    sums = collectives.allreduce_sum([hvd.rank() + 1.0, 0.5])
    hvd.shutdown()
    return found, sums


def steps(config, rank, ranks):
    import keras
    import tensorflow as tf

    from spark_mnist.ranks import collectives

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


@pytest.fixture(scope="module")
def runs(spark):
    import horovod.spark

    rest = {"use_gloo": True, "verbose": 0, "executable": sys.executable}
    return [horovod.spark.run(train_each, (OPTIMIZERS,), num_proc=n, **rest) for n in (2, 1)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_equal_one_process_on_the_joined_batch(runs, name):
    (first, second), (alone,) = ([found[name] for found, _ in run] for run in runs)
    for a, b, c in zip(first[0], second[0], alone[0], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-6)
    assert first[1] == second[1] != alone[1]


def test_total_adds_over_the_ranks(runs):
    assert [[sums for _, sums in run] for run in runs] == [[[3.0, 1.0]] * 2, [[1.0, 0.5]]]


@pytest.mark.parametrize("config", [{}, {"epsilon": 0.1, "beta_2": 0.9}, {"amsgrad": True}])
def test_adam_in_one_pass_is_keras_adam(config):
    import keras
    import tensorflow as tf

    from spark_mnist.ranks import collectives

    theirs = keras.optimizers.Adam(learning_rate=0.01, **config)
    ours = collectives.distributed_optimizer(theirs, tf.Variable(0.0, dtype=tf.float64))
    assert ("update_step" in vars(type(ours))) == ("amsgrad" not in config)
    random, found = np.random.default_rng(0), []
    gradients = random.normal(size=(5, 7, 3)).astype("float32")
    for optimizer in (ours, theirs):
        weights = keras.Variable(np.ones((7, 3), "float32"), name="kernel")
        optimizer.build([weights])
        for gradient in gradients:
            keras.optimizers.Optimizer.apply(optimizer, [tf.constant(gradient)], [weights])
        found.append([weights.numpy(), *(v.numpy() for v in optimizer.variables)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
