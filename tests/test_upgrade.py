"""Versions that others wrote: release 0.1.0 on numpy 1 (first_release/), and the newest packages that
setup.cfg allows (newest_set/: Python 3.13, PySpark 4.3, TensorFlow 2.21, numpy 2.5). Both are read on
whatever is installed here. And one of a release to come.
"""

import json
import shutil
from pathlib import Path

import pytest

import spark_mnist
from spark_mnist import errors

pytestmark = pytest.mark.ranks

WRITTEN = {name: Path(__file__).parent / name for name in ("first_release", "newest_set")}
OPTIONS = {"batch_size": 16, "verbose": 0}


@pytest.fixture(params=WRITTEN)
def old(request, tmp_path):
    """A store with the model ``digits``: softmax, two epochs of two ranks."""
    return shutil.copytree(WRITTEN[request.param], tmp_path / "models")


def test_anothers_model_predicts_and_goes_on(old, digits, held_out):
    store = str(old)
    info = spark_mnist.describe("digits", store=store)
    assert (info.version, info.num_epochs, info.ranks, info.network.name) == (1, 2, 2, "softmax")
    (row,) = spark_mnist.evaluate(held_out, "digits", rate=1, store=store).collect()
    found = spark_mnist.predict(held_out, "digits", interpret=True, store=store)
    right = found.where("label = interpreted").count() / held_out.count()
    assert row["metrics"]["accuracy"] == right > 0.8
    fit = spark_mnist.fit(digits, "digits", epochs=1, continuous=True, store=store, **OPTIONS)
    assert ([record.epoch for record in fit.records], fit.version) == ([3], 2)
    assert fit.records[0].losses["loss"] < info.losses["loss"]


def test_a_format_to_come_is_refused_with_what_to_do(old, held_out):
    path = old / "digits" / "v000001" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    message = "version 1 of model 'digits' cannot be used: it has format 3; this release reads formats 1 and 2: use a newer release of spark_mnist"
    with pytest.raises(errors.DamagedModel, match=message):
        spark_mnist.predict(held_out, "digits", store=str(old))


def test_the_same_fit_gives_the_same_losses_on_every_set_of_packages(spark, store, capsys):
    whole = spark_mnist.datasets.digits(spark, "train")
    fit = spark_mnist.fit(
        whole, "digits", network="softmax", epochs=2, num_proc=2, store=store, **OPTIONS
    )
    path = WRITTEN["newest_set"] / "digits" / "v000001" / "manifest.json"
    for record, there in zip(fit.records, json.loads(path.read_text())["history"], strict=True):
        with capsys.disabled():
            print(f"\nepoch {record.epoch}: {record.losses} here, {there['losses']} there")
        assert record.losses == pytest.approx(there["losses"], rel=1e-5)
        assert record.metrics == there["metrics"]
