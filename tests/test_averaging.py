"""The averaging optimizer on two real ranks, against one process on the joined batch."""

import sys

import numpy as np
import pytest


def _weights_after_steps(optimizer_config, tell_apart):
    """Run on a rank: three steps on this rank's half, from weights that differ before broadcast."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    from spark_mnist import averaging

    hvd.init()
    rank, ranks = hvd.rank(), hvd.size()
    keras.utils.set_random_seed(rank if tell_apart else 0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dropout(0.0),
            keras.layers.Dense(3),
        ]
    )
    unused = keras.Variable(np.ones(2, "float32"), name="unused")
    model.optimizer = averaging.averaged(keras.optimizers.deserialize(optimizer_config))
    trained = [*model.trainable_variables, unused]
    model.optimizer.build(trained)
    averaging.broadcast(model)
    rng = np.random.default_rng(7)
    for _ in range(3):
        x, y = rng.normal(size=(8, 6)).astype("float32"), rng.normal(size=(8, 3)).astype("float32")
        mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[mine]) - y[mine]) ** 2)
        grads = tape.gradient(loss, [v.value for v in trained])
        assert grads[-1] is None
        model.optimizer.apply(grads, trained)
    found = (
        [v.numpy() for v in model.weights],
        averaging.digest(model),
        averaging.total([rank + 1.0]),
    )
    hvd.shutdown()
    return found


OPTIMIZERS = {
    "sgd": {"class_name": "SGD", "config": {"learning_rate": 0.1}},
    "clipped": {"class_name": "SGD", "config": {"learning_rate": 0.1, "clipnorm": 0.05}},
    "momentum": {"class_name": "SGD", "config": {"learning_rate": 0.1, "momentum": 0.9}},
    "adam": {"class_name": "Adam", "config": {"learning_rate": 0.01}},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Keras on the gradient that is None
def test_two_ranks_equal_one_process_on_the_joined_batch(spark, name):
    import horovod.spark

    arguments = {
        "args": (OPTIMIZERS[name], True),
        "use_gloo": True,
        "verbose": 0,
        "executable": sys.executable,
    }
    runs = [
        horovod.spark.run(_weights_after_steps, num_proc=ranks, **arguments) for ranks in (2, 1)
    ]
    (two, other), (one,) = runs
    for a, b, c in zip(two[0], other[0], one[0], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-6)
    assert two[1] == other[1]
    assert (two[2], one[2]) == ([3.0], [1.0])
