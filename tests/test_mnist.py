"""Accuracy on the real MNIST, where its files are: MNIST_DIR names the directory."""

import os

import pytest

import spark_mnist

# The 60,000 images are no part of the repository, and a test must not need the network to fetch
# them. .ci/run names their directory where the machine has them, so there these tests run.
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        not os.environ.get("MNIST_DIR"), reason="MNIST_DIR names no directory with MNIST's files"
    ),
]


@pytest.mark.parametrize(
    ("network", "optimizer", "epochs", "accuracy"),
    [("softmax", "adam", 6, 0.92), ("mlp", "adam", 6, 0.975), ("small", "momentum", 6, 0.945)],
)
def test_two_ranks_learn_to_read_mnist(spark, store, network, optimizer, epochs, accuracy):
    train = spark_mnist.datasets.mnist(spark, "train")
    test = spark_mnist.datasets.mnist(spark, "test")
    assert (train.count(), test.count()) == (60_000, 10_000)
    options = {
        "network": network,
        "optimizer": optimizer,
        "lr_schedule": f"cosine:{epochs}",
        "epochs": epochs,
        "batch_size": 64,
        "train_validation_ratio": 0.9,
    }
    spark_mnist.fit(train, network, num_proc=2, store=store, verbose=0, **options)
    (row,) = spark_mnist.evaluate(test, network, rate=1, batch_size=1024, store=store).collect()
    assert row["metrics"]["accuracy"] >= accuracy
