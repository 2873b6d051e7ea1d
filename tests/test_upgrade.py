"""A version as release 0.1.0 wrote it, in first_release/, and one of a release to come."""

import json
import shutil
from pathlib import Path

import pytest

import spark_mnist
from spark_mnist import errors

WRITTEN = Path(__file__).parent / "first_release"
OPTIONS = {"batch_size": 16, "verbose": 0}


@pytest.fixture
def old(tmp_path):
    """A store with the model ``digits``: softmax, two epochs of two ranks."""
    return shutil.copytree(WRITTEN, tmp_path / "models")


def test_the_first_releases_model_predicts_and_goes_on(old, digits, held_out, in_process):
    store = str(old)
    info = spark_mnist.describe("digits", store=store)
    assert (info.version, info.epochs, info.ranks, info.network.name) == (1, 2, 2, "softmax")
    (row,) = spark_mnist.evaluate(held_out, "digits", rate=1, store=store).collect()
    found = spark_mnist.predict(held_out, "digits", interpret=True, store=store)
    right = found.where("label = interpreted").count() / held_out.count()
    assert row["metrics"]["accuracy"] == right > 0.8
    fit = spark_mnist.fit(digits, "digits", epochs=1, continuous=True, store=store, **OPTIONS)
    assert ([record.epoch for record in fit.epochs], fit.version) == ([3], 2)
    assert fit.epochs[0].losses["loss"] < info.losses["loss"]


def test_a_format_to_come_is_refused_with_what_to_do(old, held_out):
    path = old / "digits" / "v000001" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    message = "version 1 of model 'digits' cannot be used: it has format 2; this release reads 1: use a newer one"
    with pytest.raises(errors.DamagedModel, match=message):
        spark_mnist.predict(held_out, "digits", store=str(old))
