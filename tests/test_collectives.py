"""The averaging optimizer on two real ranks, against one process on the joined batch.

The host's name does not resolve, where the system lets the tests give one.
"""

import contextlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from spark_mnist.core import channel
from spark_mnist.launch import launcher, registration, rendezvous
from tests.conftest import PROGRAMS

pytestmark = pytest.mark.ranks

NAME = "no-such-host.invalid"
NAMED = [
    "unshare",
    "--user",
    "--map-root-user",
    "--uts",
    "sh",
    "-c",
    f'hostname {NAME}; exec "$@"',
    "sh",
]
"""Words before a command whose host has that name."""


@pytest.fixture(scope="module")
def named():
    """Return the words that give ranks a host name without an address; none where not allowed."""
    with contextlib.suppress(FileNotFoundError):
        found = subprocess.run([*NAMED, "hostname"], capture_output=True, text=True)
        return NAMED if found.stdout.strip() == NAME else []
    return []


@pytest.fixture(scope="module")
def runs(tmp_path_factory, named):
    """Return the results of each rank, of two ranks and of one."""
    home = tmp_path_factory.mktemp("averaging")
    stores = [rendezvous.Rendezvous() for _ in range(2)]
    servers = [
        channel.HeartbeatServer("127.0.0.1", "127.0.0.1", print, store.answer) for store in stores
    ]
    programs = {}
    with servers[0], servers[1]:
        for server, ranks in zip(servers, (2, 1), strict=True):
            common = launcher._horovod_settings(server.address)
            for rank, numbers in enumerate(registration.assign(["here"] * ranks)):
                output = home / f"{ranks}-{rank}"
                settings = {**common, "HOROVOD_GLOO_IFACE": "lo", **numbers}
                environment = {**os.environ, **{k: str(v) for k, v in settings.items()}}
                command = [*named, sys.executable, PROGRAMS / "averaging.py", output]
                programs[output] = subprocess.Popen(command, env=environment)
        assert [program.wait(200) for program in programs.values()] == [0, 0, 0]
    return [
        [pickle.loads((home / f"{ranks}-{rank}").read_bytes()) for rank in range(ranks)]
        for ranks in (2, 1)
    ]


@pytest.mark.parametrize("name", ["sgd", "clipped", "momentum", "adam"])
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

    theirs, plain = (keras.optimizers.Adam(learning_rate=0.01, **config) for _ in range(2))
    ours = collectives.distributed_optimizer(plain, tf.Variable(0.0, dtype=tf.float64))
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
