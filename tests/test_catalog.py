"""Saved models: listed, described, deleted, rolled back; on a disk and on an object store."""

import dataclasses
import threading
from pathlib import Path

import fsspec
import pytest

import spark_mnist
from spark_mnist import errors
from spark_mnist.data import row_counts
from spark_mnist.fitting import results
from spark_mnist.store import model_store

MANIFEST = {
    "name": "m", "parent": None, "created": "2026-01-02T03:04:05+00:00", "epochs": 2,
    "input": {}, "network": {"name": "small", "inputs": 784, "classes": 10, "hidden": [20, 20]},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "history": [
        {"epoch": 1, "losses": {"loss": 2.0}, "metrics": {"accuracy": 0.5}},
        {"epoch": 2, "losses": {"loss": 1.0}, "metrics": {"accuracy": 0.75}},
        {"epoch": 3, "losses": {"loss": 1.5}, "metrics": {"accuracy": 0.7}},
    ],
    "ranks": 2, "batch_size": 32, "seed": 0, "rows": {"train": 8, "validation": 2},
    "libraries": {"keras": "3"},
}  # fmt: skip


@pytest.fixture(params=["disk", "object store"])
def url(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "models")
    else:
        yield "memory://catalog"
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def saved(url):
    """A store with three versions of a model."""
    store = model_store.Store(url)
    for number in (1, 2, 3):
        files = {"weights.npz": b"w%d" % number, "logs/train/events": b"e"}
        store.publish("m", files, lambda version: {**MANIFEST, "version": version})
    return store


def test_describe_tells_the_epoch_that_was_kept(saved, url):
    info = spark_mnist.describe("m", store=url)
    assert (info.name, info.version, info.num_epochs, info.bytes) == ("m", 3, 2, 3)
    assert (info.losses, info.metrics) == ({"loss": 1.0}, {"accuracy": 0.75})
    assert (info.network.hidden, info.optimizer.name, info.input.features) == (
        (20, 20),
        "sgd",
        ("image",),
    )
    assert [record.epoch for record in info.history] == [1, 2, 3]
    assert spark_mnist.describe("m", 2, url).version == 2
    assert [(model.name, model.version) for model in spark_mnist.models(url)] == [("m", 3)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.num_epochs = 5


def test_a_deleted_version_is_gone_and_its_number_is_not_used_again(saved, url):
    assert spark_mnist.delete("m", 3, url) == [3]
    assert saved.versions("m") == [1, 2]
    assert spark_mnist.describe("m", store=url).version == 2
    assert saved.publish("m", {}, lambda version: {**MANIFEST, "version": version}) == 4


def test_a_deleted_model_leaves_nothing_but_its_last_number(saved, url, tmp_path):
    assert spark_mnist.delete("m", store=url) == [1, 2, 3]
    assert spark_mnist.models(url) == []
    there = [*fsspec.filesystem("memory").find("/catalog"), *(tmp_path / "models").rglob("*")]
    assert [str(p)[-14:] for p in there if "." in str(p)[-14:]] == ["v000003/.claim"]
    assert saved.publish("m", {}, lambda version: {**MANIFEST, "version": version}) == 4
    spark_mnist.delete("m", store=url)
    with pytest.raises(errors.ModelNotFound, match="no model 'm'"):
        spark_mnist.delete("m", store=url)


def test_deleting_a_model_leaves_a_fit_under_way_alone(saved, url):
    with saved.work("m") as work:
        fs, path = fsspec.core.url_to_fs(work)
        fs.pipe_file(f"{path}/shard", b"rows")
        spark_mnist.delete("m", store=url)
        assert fs.cat_file(f"{path}/shard") == b"rows"
        assert saved.publish("m", {}, lambda version: {**MANIFEST, "version": version}) == 4
    assert len(saved.versions("m")) == 1


def test_rollback_publishes_a_copy(saved, url):
    assert spark_mnist.rollback("m", 1, url) == 4
    manifest, files = saved.read("m", 4)
    assert (manifest["version"], manifest["parent"]) == (4, 1)
    assert files == {"weights.npz": b"w1", "logs/train/events": b"e"}
    assert saved.versions("m") == [1, 2, 3, 4]


def test_a_damaged_version_is_not_rolled_back_to(saved, url):
    saved._files.write("m/v000001/weights.npz", b"xx")
    with pytest.raises(errors.DamagedModel, match="differs from its sha256"):
        spark_mnist.rollback("m", 1, url)
    assert saved.versions("m") == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda url: spark_mnist.describe("n", store=url), LookupError, "no model 'n'.*which has m"),
        (lambda url: spark_mnist.describe("m", 9, url), LookupError, "no version 9, only"),
        (lambda url: spark_mnist.delete("m", 9, url), LookupError, "no version 9"),
        (lambda url: spark_mnist.delete("../m", store=url), ValueError, "is not a valid model name"),
        (lambda url: spark_mnist.describe("m", "1", url), ValueError, "version must be int >= 1, not '1'"),
        (lambda url: spark_mnist.delete("m", True, url), ValueError, "version must be int >= 1, not T"),
        (lambda url: spark_mnist.delete("m", store=""), ValueError, "store must be text, not ''"),
        (lambda url: spark_mnist.rollback("m", 9, url), LookupError, "no version 9"),
        (lambda url: spark_mnist.rollback("m", None, url), ValueError, "rollback needs the version"),
    ],
)  # fmt: skip
def test_what_is_not_there(saved, url, call, error, message):
    with pytest.raises(error, match=message):
        call(url)
    assert saved.versions("m") == [1, 2, 3]


def test_the_same_by_commands(spark, saved, url):
    def run(words):
        return spark_mnist.command(f"mymnist {words} store='{url}'")

    table = run("models")
    assert table.columns == ["name", "version", "epochs", "losses", "metrics", "created"]
    assert [(row["name"], row["version"], row["epochs"]) for row in table.collect()] == [
        ("m", 3, 2)
    ]
    told = {row["property"]: row["value"] for row in run("describe m version=2").collect()}
    assert (told["name"], told["version"], told["epochs"]) == ("m", "2", "2")
    assert '"hidden": [20, 20]' in told["network"]
    assert [row["version"] for row in run("rollback m version=1").collect()] == [4]
    assert [row["version"] for row in run("delete m version=4").collect()] == [4]
    assert [row["version"] for row in run("delete m").collect()] == [1, 2, 3]
    assert run("models").count() == 0
    with pytest.raises(errors.OptionError, match="rollback needs the version"):
        run("rollback m")
    with pytest.raises(errors.CommandError, match="predict needs a DataFrame"):
        run("predict m")


@pytest.mark.parametrize(
    "change",
    [
        {"history": []},
        {"epochs": 7},
        {"ranks": None, "created": "yesterday"},
        {"network": {"name": "mlp"}},
        {"network": {"surprise": 1}},
        {"network": {"name": "resnet", "inputs": 784, "classes": 10}},
        {"optimizer": {}},
        {"input": []},
    ],
)
def test_an_odd_manifest_spoils_no_list(saved, url, change, caplog):
    saved.publish("odd", {}, lambda version: {**MANIFEST, **change, "name": "odd", "version": 1})
    assert [model.name for model in spark_mnist.models(url)] == ["m"]
    assert "model 'odd' cannot be" in caplog.text
    with pytest.raises(errors.DamagedModel, match="model 'odd' cannot be"):
        spark_mnist.describe("odd", store=url)


def test_files_of_a_manifest_lie_in_its_version(saved, tmp_path):
    (tmp_path / "victim").write_bytes(b"secret")
    for name in ("../../../victim", "/etc/passwd", "logs/../../x", ".claim"):
        with pytest.raises(errors.DamagedModel, match="is no file of a version"):
            saved.read("m", 1, (name,))


def test_the_session_of_the_process_names_the_store(spark, saved, url):
    spark.conf.set("spark.mnist.store", url)
    found = []
    try:
        thread = threading.Thread(target=lambda: found.extend(spark_mnist.models()))
        thread.start()
        thread.join()
        other = spark.newSession()
        other.conf.set("spark.mnist.store", url)
        spark.conf.unset("spark.mnist.store")
        assert spark_mnist.command("models", other.range(1)).count() == 1
    finally:
        spark.conf.unset("spark.mnist.store")
    assert [model.name for model in found] == ["m"]


def test_an_old_manifest_without_input_reads_pictures(tmp_path):
    old = {k: v for k, v in MANIFEST.items() if k != "input"}
    store = model_store.Store(str(tmp_path))
    store.publish("m", {"weights.npz": b""}, lambda version: {**old, "version": version})
    info = spark_mnist.describe("m", store=str(tmp_path))
    assert (info.input.features, info.input.width, info.network.mean) == (("image",), 784, ())
    assert (Path(tmp_path) / "m" / "v000001" / "manifest.json").exists()


def test_former_names_still_work_and_name_the_new_ones(root, digits):
    info = spark_mnist.describe("m", store=root)
    with pytest.warns(DeprecationWarning, match="ModelInfo.epochs is now num_epochs"):
        assert info.epochs == info.num_epochs == 15
    result = results.FitResult("m", 1, info.history, digits, None, None)
    with pytest.warns(DeprecationWarning, match="FitResult.epochs is now records"):
        assert result.epochs == info.history
    counts = row_counts.RowCounts(total=5, dropped={"x": 1}, train=3, validation=1, by_rank=())
    with pytest.warns(DeprecationWarning, match="RowCounts.given is now total"):
        assert counts.given == 5
    with pytest.warns(DeprecationWarning, match="RowCounts.read is now by_rank"):
        assert counts.read == ()
