"""Assignment of GPUs to ranks, without GPUs: TensorFlow's list of them is made up."""

import os
import re
import subprocess
import sys

import pytest

import spark_mnist
from spark_mnist import errors
from spark_mnist.launch import registration
from spark_mnist.ranks import gpus
from tests.conftest import PROGRAMS, arrays


def test_two_ranks_on_one_gpu_are_an_error(monkeypatch):
    def both(place):
        return (place, place)

    monkeypatch.setattr(gpus.collectives, "allgather_int", both)
    monkeypatch.delenv(gpus.VISIBLE_DEVICES, raising=False)
    assert gpus.claim([], 0) == "CPU"
    monkeypatch.setenv(gpus.VISIBLE_DEVICES, "")
    with pytest.raises(errors.ClusterError, match=r"two ranks would share a GPU"):
        gpus.claim(["3"], 0)


def test_hosts_of_one_name_have_gpus_of_their_own(monkeypatch):
    """Two hosts are called alike, as containers are; each has a GPU 0."""
    given = []

    def all_of_them(place):
        given.append(place)
        return tuple(given)

    monkeypatch.setattr(gpus.collectives, "allgather_int", all_of_them)
    monkeypatch.setenv(gpus.VISIBLE_DEVICES, "")
    slots = registration.assign(["localhost one", "localhost two", "localhost two"])
    for slot in slots[:2]:
        monkeypatch.setenv(gpus.HOST_ID, slot[gpus.HOST_ID])
        assert gpus.claim(["0"], 0) == "CPU, not GPU 0"
    monkeypatch.setenv(gpus.HOST_ID, slots[2][gpus.HOST_ID])
    with pytest.raises(errors.ClusterError, match=r"two ranks would share a GPU"):
        gpus.claim(["0"], 1)


def test_more_ranks_than_gpus_are_an_error(monkeypatch):
    claimed = []
    monkeypatch.setattr(gpus.tf.config, "list_physical_devices", lambda kind: ["first", "second"])
    monkeypatch.setattr(
        gpus.tf.config, "set_visible_devices", lambda gpus, kind: claimed.append(gpus)
    )
    monkeypatch.setattr(
        gpus.tf.config.experimental, "set_memory_growth", lambda gpu, on: claimed.append((gpu, on))
    )
    monkeypatch.setattr(gpus.collectives, "allgather_int", lambda place: (place, 0))
    assert gpus.claim([], 1) == "GPU 1"
    assert claimed == [["second"], ("second", True)]
    with pytest.raises(errors.ClusterError, match=r"has 2 GPUs for more ranks: lower num_proc"):
        gpus.claim([], 2)


def own():
    import keras

    return keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])


@pytest.mark.parametrize(
    ("network", "precision"), [("mlp", "mixed_float16"), (own, "mixed_bfloat16")]
)
def test_precision_is_of_a_fit_and_not_of_its_model(digits, tmp_path, network, precision):
    store = str(tmp_path)
    options = {"verbose": 0, "batch_size": 16, "network": network, "store": store}
    first = spark_mnist.fit(digits, "m", epochs=8, precision=precision, **options)
    then = spark_mnist.fit(digits, "m", epochs=2, continuous=True, **options)
    accuracies = [record.metrics["val_accuracy"] for record in (*first.records, *then.records)]
    assert min(accuracies[7:]) > 0.7, accuracies
    for file in ("weights.npz", "optimizer.npz"):
        kinds = {array.dtype.name for array in arrays(store, "m", 1, file)}
        assert kinds <= {"float32", "int64"}
        assert len(arrays(store, "m", 1, file)) == len(arrays(store, "m", 2, file))
    (row,) = spark_mnist.evaluate(digits, "m", rate=1, version=1, store=store).collect()
    assert row["metrics"]["accuracy"] > 0.7


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["1 device:CPU:1", "0 device:CPU:0", "1 device:CPU:1", "None anywhere"]),
        ("1,0", ["1 device:CPU:0", "0 device:CPU:1", "1 device:CPU:0", "None anywhere"]),
    ],
)
def test_a_worker_scores_on_the_gpu_of_each_task(visible, names):
    environment = (
        dict(os.environ) if visible is None else {**os.environ, gpus.VISIBLE_DEVICES: visible}
    )
    command = [sys.executable, PROGRAMS / "two_gpus.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*names, "7 anywhere"]
    sees = visible.replace(",", ", ") if visible else "0, 1"
    assert re.search(rf"gave this task GPU 7 on .*, and TensorFlow sees {sees}:", done.stderr)
