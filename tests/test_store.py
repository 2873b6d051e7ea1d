import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_mnist import errors
from spark_mnist.store import Store, checked_name

FILES = {"weights.npz": b"weights", "optimizer.npz": b"slots"}


@pytest.fixture(params=["local", "object store"])
def models(request, tmp_path):
    if request.param == "local":
        return Store(str(tmp_path / "models"))
    return Store(f"memory://{tmp_path.name}")


def describe(version):
    return {"epochs": version}


def test_what_is_published_is_read(models):
    assert models.names() == []
    assert models.publish("m", FILES, describe) == 1
    assert models.publish("m", {**FILES, "weights.npz": b"new"}, describe) == 2
    assert models.names() == ["m"]
    assert models.versions("m") == [1, 2]
    assert models.newest("m") == 2
    assert models.newest("m", 1) == 1
    manifest, files = models.read("m", 1)
    assert (manifest["epochs"], files) == (1, FILES)
    assert models.read("m", 2)[1]["weights.npz"] == b"new"


def test_a_missing_model_names_those_there_are(models):
    models.publish("digits", FILES, describe)
    with pytest.raises(LookupError, match=r"no model 'digit' in .*there is digits.*mean 'digits'"):
        models.newest("digit")
    with pytest.raises(errors.ModelNotFound, match=r"has no version 7, only \[1\]"):
        models.newest("digits", 7)


def test_a_version_without_manifest_is_not_there(models, monkeypatch):
    models.publish("m", FILES, describe)
    write = Store._write

    def killed(self, path, content):
        if path.endswith("manifest.json"):
            raise KeyboardInterrupt
        write(self, path, content)

    monkeypatch.setattr(Store, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        models.publish("m", FILES, describe)
    monkeypatch.undo()
    assert models.versions("m") == [1]
    assert models.read("m", models.newest("m"))[1] == FILES
    assert models.publish("m", FILES, describe) == 3  # the number of the killed one is not reused
    assert models.versions("m") == [1, 3]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda d: (d / "weights.npz").write_bytes(b"wEights"),
            "weights.npz differs from its sha256",
        ),
        (lambda d: (d / "weights.npz").write_bytes(b""), "weights.npz differs from its sha256"),
        (lambda d: (d / "optimizer.npz").unlink(), "optimizer.npz is missing"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json is not readable"),
        (
            lambda d: (d / "manifest.json").write_text('{"format": 1}'),
            "manifest.json is not readable",
        ),
        (
            lambda d: (d / "manifest.json").write_text('{"format": 99}'),
            "format 99; this release reads 1",
        ),
    ],
)
def test_a_damaged_version_is_refused_and_the_one_before_offered(tmp_path, harm, message):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    models.publish("m", FILES, describe)
    harm(tmp_path / "m" / "v000002")
    with pytest.raises(
        OSError, match=f"version 2 of model 'm'.*{message}.*version=1 is the one before"
    ):
        models.read("m", 2)
    assert models.read("m", 1)[1] == FILES


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../m", "a/b", "/etc/x", "-m", ".m", "_m", "a b", "a\0b", "a\n", "%2e%2e", "é", "x" * 65, "a\\b", None],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_are_refused(models, name):
    for use in (
        checked_name,
        lambda n: models.newest(n),
        lambda n: models.publish(n, FILES, describe),
    ):
        with pytest.raises(ValueError, match="cannot be a model's name"):
            use(name)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_every_allowed_name_stays_below_the_root(name):
    root = Path("/store")
    path = Path(os.path.normpath(root / checked_name(name)))
    assert path.parent == root


def test_work_is_removed_whatever_happens(tmp_path):
    models = Store(str(tmp_path))
    with pytest.raises(RuntimeError, match="in the middle"), models.work("m") as url:
        _write_and_fail(Path(url.removeprefix("file://")))
    assert list(tmp_path.iterdir()) == []


def _write_and_fail(directory):
    (directory / "shard").write_text("rows")
    raise RuntimeError("in the middle")


def test_work_leaves_versions_alone(tmp_path):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    with models.work("m"):
        assert models.names() == ["m"]
    assert models.versions("m") == [1]


def _publish_many(root, writer):
    models = Store(root)
    return [
        models.publish("m", {"weights.npz": writer}, lambda _: {"writer": writer.decode()})
        for _ in range(20)
    ]


def test_of_two_writers_both_keep_their_work_and_nothing_is_mixed(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        numbers = pool.starmap(_publish_many, [(str(tmp_path), b"one"), (str(tmp_path), b"two")])
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 41))
    models = Store(str(tmp_path))
    for version in models.versions("m"):
        manifest, files = models.read("m", version)
        assert files["weights.npz"].decode() == manifest["writer"]


def test_the_manifest_says_size_and_hash(tmp_path):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    manifest = json.loads((tmp_path / "m" / "v000001" / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["files"]["weights.npz"]["bytes"] == 7
    assert len(manifest["files"]["weights.npz"]["sha256"]) == 64


def test_what_cannot_be_removed_is_told_and_harms_nothing(tmp_path, monkeypatch, caplog):
    models = Store(str(tmp_path))

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(models._fs, "rm", refuse)
    with models.work("m"):
        assert models.publish("m", FILES, describe) == 1
    assert "could not be removed: read-only" in caplog.text


def test_the_url_is_the_users_own_where_it_is_no_path(tmp_path):
    assert Store("memory://models/").url == "memory://models"
    assert Store(str(tmp_path)).url == f"file://{tmp_path}"
    assert Store(f"file://{tmp_path}").url == f"file://{tmp_path}"
