import builtins
import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow.fs
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from spark_mnist import errors
from spark_mnist.core import retries
from spark_mnist.store import leases
from spark_mnist.store.filesystem import Files
from spark_mnist.store.model_store import Store, validate_name
from tests.conftest import PROGRAMS

FILES = {"weights.npz": b"weights", "optimizer.npz": b"slots"}


class Hadoop(ArrowFSWrapper):
    """fsspec's file system for HDFS, on local files: it removes directories with their content."""

    protocol = "hadoop"

    def __init__(self, **_):
        super().__init__(pyarrow.fs.LocalFileSystem())

    def mv(self, path1, path2, **_):
        if self.exists(path2):
            raise OSError(f"rename {path1} to {path2} failed: the target is there")
        super().mv(path1, path2)


@pytest.fixture(params=["local", "object store", "hadoop"])
def models(request, tmp_path):
    if request.param == "local":
        return Store(str(tmp_path / "models"))
    if request.param == "hadoop":
        fsspec.register_implementation("hadoop", Hadoop, clobber=True)
        return Store(f"hadoop://{tmp_path}/models")
    return Store(f"memory://{tmp_path.name}")


def describe(version):
    return {"epochs": version}


def test_what_is_published_is_read(models):
    assert models.names() == []
    assert models.publish("m", FILES, describe) == 1
    assert models.publish("m", {**FILES, "weights.npz": b"new"}, describe) == 2
    assert models.names() == ["m"]
    assert models.versions("m") == [1, 2]
    assert models.resolve_version("m") == 2
    assert models.resolve_version("m", 1) == 1
    manifest, files = models.read("m", 1)
    assert (manifest["epochs"], files) == (1, FILES)
    assert models.read("m", 2)[1]["weights.npz"] == b"new"


def test_a_missing_model_names_those_there_are(models):
    models.publish("digits", FILES, describe)
    with pytest.raises(LookupError, match=r"no model 'digit' in .*which has digits.*mean 'digits'"):
        models.resolve_version("digit")
    with pytest.raises(errors.ModelNotFound, match=r"has no version 7, only \[1\]"):
        models.resolve_version("digits", 7)


class Killed(BaseException):
    """The process is gone: no operation works any more."""


class Faulty:
    """Breaks the file operation of a given number, and all that follow if the process is dead."""

    def __init__(self, monkeypatch, files, number, error, dead):
        self.count, self._number, self._error, self._dead = 0, number, error, dead
        for name in ("makedirs", "mkdir", "replace", "fsync", "open", "close"):
            monkeypatch.setattr(os, name, self._breaking(getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self._opening(open))
        monkeypatch.setattr(files, "_fs", self._proxy(files._fs))

    def step(self):
        self.count += 1
        if self.count == self._number or (self._dead and self.count > self._number):
            raise self._error

    def _breaking(self, real):
        def operation(*args, **kwargs):
            self.step()
            return real(*args, **kwargs)

        return operation

    def _opening(self, real):
        def opening(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return real(path, mode, *args, **kwargs)
            self.step()
            file = real(path, mode, *args, **kwargs)
            write = file.write

            def some(content):
                try:
                    self.step()
                except BaseException:
                    write(content[: len(content) // 2])
                    raise
                return write(content)

            return Wrapped(file, write=some)

        return opening

    def _proxy(self, fs):
        names = ("ls", "exists", "cat_file", "pipe_file", "makedirs", "rm", "rmdir")
        return Wrapped(fs, **{name: self._breaking(getattr(fs, name)) for name in names})


class Wrapped:
    """An object with some of its methods replaced."""

    def __init__(self, real, **methods):
        self._real = real
        self.__dict__.update(methods)

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self._real.close()


NEW = {**FILES, "weights.npz": b"new"}
ENOSPC = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("dead", [True, False], ids=["killed", "disk full"])
def test_a_publish_that_fails_at_any_operation_leaves_the_old_version_or_the_new(models, dead):
    models.publish("m", FILES, describe)
    number, outcomes = 0, []
    while True:
        number += 1
        taken = models.versions("m")
        with pytest.MonkeyPatch.context() as patch:
            fault = Faulty(patch, models._files, number, Killed() if dead else ENOSPC, dead)
            with contextlib.suppress(Killed, OSError):
                models.publish("m", NEW, describe)
                outcomes.append("published")
        if fault.count < number:
            break
        newest = models.resolve_version("m")
        assert models.read("m", newest)[1] in (FILES, NEW)
        if outcomes[-1:] != ["published"] or newest == taken[-1]:
            outcomes.append("old" if newest == taken[-1] else "new")
        assert set(models.versions("m")) - set(taken) <= {newest}
        for version in models.versions("m"):
            models.read("m", version)
    assert outcomes.count("old") >= 5
    assert outcomes[-1] == "published"
    assert number > 5


@pytest.mark.ranks
def test_a_full_disk_leaves_nothing_behind_and_says_so(tmp_path):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    failed = 0
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            fault = Faulty(patch, models._files, number, ENOSPC, dead=False)
            try:
                models.publish("m", NEW, describe)
            except OSError as error:
                failed += error is ENOSPC
        if fault.count < number:
            break
        if models.versions("m") == [1]:
            assert sorted(os.listdir(tmp_path / "m")) == ["v000001"]
        else:  # the directory was there, or the rename was done before it could be made sure of
            models.remove("m", models.versions("m")[1:])
            shutil.rmtree(tmp_path / "m" / "v000002")
    assert failed > 17


def test_a_real_kill_at_any_file_operation_is_survived_and_swept(tmp_path):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    for number in itertools.count(1):
        before = models.versions("m")
        command = [sys.executable, PROGRAMS / "killed_writer.py", str(tmp_path), str(number)]
        killed = subprocess.run(command).returncode == -signal.SIGKILL
        newest = models.resolve_version("m")
        assert models.read("m", newest)[1] == (FILES if newest == 1 else NEW)
        models.remove_abandoned("m")
        published = {f"v{version:06d}" for version in models.versions("m")}
        for name in set(os.listdir(tmp_path / "m")) - published:
            # Killed before it could say who it is: too little is there to be taken for a version.
            assert set(os.listdir(tmp_path / "m" / name)) <= {".claim.tmp"}
        if not killed:
            break
        assert len(models.versions("m")) - len(before) in (0, 1)
    assert number > 12


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
            "format 99; this release reads formats 1 and 2",
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


def test_a_missing_manifest_is_named_and_the_version_before_is_used(tmp_path, caplog, monkeypatch):
    models = Store(str(tmp_path))
    for _ in range(2):
        models.publish("m", FILES, describe)
    (tmp_path / "m" / "v000002" / "manifest.json").unlink()
    assert models.resolve_version("m") == 1
    assert caplog.text == ""  # this process, which still lives, might be about to write it
    monkeypatch.setattr(leases, "is_stale", lambda *_: True)
    assert models.resolve_version("m") == 1
    assert "version 2 of model 'm' cannot be used: it has no manifest.json" in caplog.text
    with pytest.raises(errors.DamagedModel, match=r"no manifest.json.*version=1 is the one before"):
        models.resolve_version("m", 2)
    (tmp_path / "m" / "v000001" / "manifest.json").unlink()
    with pytest.raises(errors.ModelNotFound, match="version 2 cannot be used: it has no manifest"):
        models.resolve_version("m")


def test_what_a_killed_fit_left_is_swept_and_what_lives_is_not(tmp_path, monkeypatch):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    models.publish("m", FILES, describe)
    models.remove("m", [1])
    with models.work("m") as mine:
        assert models.remove_abandoned("m") == []
        left = tmp_path / "m" / f".work-{'0' * 32}"
        shutil.copytree(mine.removeprefix("file://"), left)
        gone = json.loads(leases.create()) | {"started": 1}
        (left / ".owner").write_text(json.dumps(gone))
        (tmp_path / "m" / "v000003").mkdir()
        (tmp_path / "m" / "v000003" / ".claim").write_text(json.dumps(gone))
        (tmp_path / "m" / "notes").mkdir()
        assert models.remove_abandoned("m") == [f"m/.work-{'0' * 32}", "m/v000003"]
        assert os.path.isdir(mine.removeprefix("file://"))
    assert sorted(os.listdir(tmp_path / "m")) == ["notes", "v000002"]
    assert models.publish("m", FILES, describe) == 3


@pytest.mark.parametrize(
    ("note", "age", "left"),
    [
        ({}, 0, False),
        ({"started": 1}, 0, True),
        ({"pid": 2**30}, 0, True),
        ({"pid": "../.."}, 0, False),
        ({"pid": None}, 0, False),
        ({"machine": "another"}, 0, False),
        ({"machine": "another"}, leases.LEASE_S - 1, False),
        ({"machine": "another"}, leases.LEASE_S + 1, True),
        ({"machine": "another", "lease": leases.UNRENEWED_S}, leases.LEASE_S + 1, False),
        (None, 0, False),
        (None, leases.UNRENEWED_S + 1, True),
    ],
)
def test_a_note_tells_whether_its_process_is_gone(note, age, left):
    content = b"torn" if note is None else json.dumps(json.loads(leases.create()) | note).encode()
    assert leases.is_stale(content, age) is left


def test_a_process_may_have_any_name():
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    comm.write_bytes(b"12345) 1 a\xc3")
    try:
        assert not leases.is_stale(leases.create(), 0)
    finally:
        comm.write_bytes(before)


def test_what_another_user_is_at_is_left_alone(tmp_path, monkeypatch):
    models = Store(str(tmp_path))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with models.work("m"):
        monkeypatch.setattr("spark_mnist.store.filesystem.Files.read", refuse)
        assert models.remove_abandoned("m") == []


def test_deleting_a_model_leaves_the_number_that_a_fit_has_taken(tmp_path):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)

    def meanwhile(number):
        models.remove("m", [models.publish("m", FILES, describe), 1])
        return describe(number)

    assert models.publish("m", FILES, meanwhile) == 2
    assert models.versions("m") == [2]
    assert models.publish("m", FILES, describe) == 4


@pytest.mark.parametrize("link", ["m", "m/v000001"])
def test_links_out_of_the_store_are_refused(tmp_path, link):
    models = Store(str(tmp_path / "store"))
    Store(str(tmp_path)).publish("outside", FILES, describe)
    (tmp_path / "store" / link).parent.mkdir(parents=True)
    target = tmp_path / "outside" if link == "m" else tmp_path / "outside" / "v000001"
    (tmp_path / "store" / link).symlink_to(target)
    assert models.names() == []
    uses = [
        lambda: models.resolve_version("m"),
        lambda: models.publish("m", FILES, describe),
        lambda: models.remove("m", [1]),
        lambda: models.remove_abandoned("m"),
        lambda: models.work("m").__enter__(),
    ]
    for use in uses:
        with pytest.raises(errors.ModelNameError, match="leads out of the store"):
            use()
    assert Store(str(tmp_path)).read("outside", 1)[1] == FILES


def test_a_fits_directory_is_its_owners_alone(tmp_path):
    with Store(str(tmp_path)).work("m") as url:
        assert stat.S_IMODE(os.stat(url.removeprefix("file://")).st_mode) == 0o700


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../m", "a/b", "/etc/x", "-m", ".m", "_m", "a b", "a\0b", "a\n", "%2e%2e", "é", "\uff4d", "m\u2024h5", "m/", "C:m", "~m", "m\u202e", "x" * 65, "a\\b", None],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_are_refused(models, name):
    for use in (
        validate_name,
        lambda n: models.resolve_version(n),
        lambda n: models.publish(n, FILES, describe),
    ):
        with pytest.raises(ValueError, match="is not a valid model name"):
            use(name)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_every_allowed_name_stays_below_the_root(name):
    root = Path("/store")
    path = Path(os.path.normpath(root / validate_name(name)))
    assert path.parent == root


def test_work_is_removed_whatever_happens(tmp_path):
    models = Store(str(tmp_path))
    with pytest.raises(RuntimeError, match="in the middle"), models.work("m") as url:
        _write_and_fail(Path(url.removeprefix("file://")))
    assert list(tmp_path.iterdir()) == []


def _write_and_fail(directory):
    (directory / "shard").write_text("rows")
    raise RuntimeError("in the middle")


def test_work_leaves_versions_alone(models):
    models.publish("m", FILES, describe)
    with models.work("m"):
        assert models.names() == ["m"]
    assert models.versions("m") == [1]
    models.publish("m", FILES, describe)
    models.remove("m", [1])
    assert models.remove_abandoned("m") == []
    assert models.read("m", 2)[1] == FILES


def test_an_interrupt_after_a_version_is_published_does_not_undo_it(tmp_path, monkeypatch):
    models = Store(str(tmp_path))
    real = Files.write

    def interrupted(self, path, content):
        real(self, path, content)
        if path.endswith("manifest.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Files, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.publish("m", FILES, describe)
    assert models.read("m", 1)[1] == FILES


def test_a_version_that_is_finished_while_another_sweeps_stays(tmp_path, monkeypatch):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    path = tmp_path / "m" / "v000001" / "manifest.json"
    manifest = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(leases, "is_stale", lambda *_: path.write_bytes(manifest) > 0)
    assert models.remove_abandoned("m") == []
    assert models.versions("m") == [1]


def _publish_many(root, writer):
    models = Store(root)
    return [
        models.publish("m", {"weights.npz": writer}, lambda _: {"writer": writer.decode()})
        for _ in range(20)
    ]


@pytest.mark.ranks
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
    assert manifest["format"] == 2
    assert manifest["files"]["weights.npz"]["bytes"] == 7
    assert len(manifest["files"]["weights.npz"]["sha256"]) == 64


@pytest.mark.ranks
def test_what_cannot_be_removed_is_told_and_harms_nothing(tmp_path, monkeypatch, caplog):
    models = Store(str(tmp_path))

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(models._files._fs, "rm", refuse)
    with models.work("m"):
        assert models.publish("m", FILES, describe) == 1
    assert "could not be removed: read-only" in caplog.text


def test_the_url_is_the_users_own_where_it_is_no_path(tmp_path):
    assert Store("memory://models/").url == "memory://models"
    assert Store(str(tmp_path)).url == f"file://{tmp_path}"
    assert Store(f"file://{tmp_path}").url == f"file://{tmp_path}"
    assert Store("dbfs:/models").url == Store("/dbfs/models").url == "file:///dbfs/models"
    assert Store("dbfs:/Volumes/a/b").url == Store("/Volumes/a/b").url == "file:///Volumes/a/b"


class Flaky(MemoryFileSystem):
    """Refuses every operation on every path once: before it is done, or its answer after it."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    error = OSError(errno.EIO, "SlowDown")
    late = False

    def _refused(name):
        def operation(self, *args, **kwargs):
            if self.inside:  # one operation of fsspec's is made of others
                return getattr(MemoryFileSystem, name)(self, *args, **kwargs)
            key = (name, args[0] if args else "")
            self.tried[key] = self.tried.get(key, 0) + 1
            refused = self.tried[key] == 1
            if not refused or self.late:
                Flaky.inside = True
                try:
                    result = getattr(MemoryFileSystem, name)(self, *args, **kwargs)
                finally:
                    Flaky.inside = False
            if refused:
                raise self.error
            return result

        return operation

    inside: ClassVar[bool] = False
    tried: ClassVar[dict] = {}
    for _name in (
        "ls",
        "exists",
        "cat_file",
        "pipe_file",
        "rm",
        "rm_file",
        "mv",
        "makedirs",
        "modified",
    ):
        locals()[_name] = _refused(_name)


ERRORS = [
    OSError(errno.EIO, "SlowDown"),
    TimeoutError("the endpoint did not answer"),
    ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    OSError("An error occurred (503) when calling: Service Unavailable"),
]


@pytest.fixture
def flaky(monkeypatch, tmp_path):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(retries, "DELAYS_S", (0.0,) * 6)
    Flaky.store, Flaky.tried, Flaky.pseudo_dirs = {}, {}, [""]
    return Store(f"flaky://{tmp_path.name}")


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("late", [False, True])
def test_what_a_store_refuses_for_a_moment_is_tried_again(flaky, monkeypatch, error, late):
    monkeypatch.setattr(Flaky, "error", error)
    monkeypatch.setattr(Flaky, "late", late)
    with flaky.work("m") as work:
        flaky.check_claims("m", work)
        assert flaky.publish("m", FILES, describe) == 1
    assert flaky.read("m", 1)[1] == FILES
    stored = flaky.references("m", 1)
    assert flaky.publish("m", stored, describe) == 2
    flaky.remove("m", [1])
    assert flaky.versions("m") == [2]
    assert flaky.remove_abandoned("m") == []


def answered(status):
    """Return the exception that S3's client raises for an answer."""
    return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def translated(status):
    """Return the OSError that s3fs raises for an answer without an errno of its own."""
    error = OSError(errno.EIO, "an answer")
    error.__cause__ = answered(status)
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (PermissionError(errno.EACCES, "denied"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError("503"), False),
        (OSError(errno.ETIMEDOUT, "timed out"), True),
        (BrokenPipeError(), True),
        (EndpointConnectionError(endpoint_url="http://store"), True),
        (answered(503), True),
        (answered(501), False),
        (translated(501), False),
        (translated(503), True),
        (OSError("Connection refused by namenode"), True),
    ],
)
def test_which_errors_are_worth_another_try(error, transient):
    assert retries.is_transient(error) is transient


def test_what_stays_refused_is_raised(flaky, monkeypatch):
    monkeypatch.setattr(retries, "DELAYS_S", (0.0,))
    with pytest.raises(OSError, match="SlowDown"):
        flaky.publish("m", FILES, describe)


@pytest.mark.parametrize(
    ("key", "value"), [("epochs", 9), ("created", "never"), ("files", {}), ("sha256", "0" * 64)]
)
def test_a_manifest_that_was_changed_is_refused(tmp_path, key, value):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    path = tmp_path / "m" / "v000001" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(
        errors.DamagedModel, match=r"its manifest\.json differs from its own sha256"
    ):
        models.manifest("m", 1)


def test_a_manifest_of_an_earlier_release_has_no_hash(tmp_path):
    models = Store(str(tmp_path))
    models.publish("m", FILES, describe)
    path = tmp_path / "m" / "v000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "format": 1}))
    assert models.read("m", 1)[1] == FILES


def test_the_numbers_of_a_deleted_model_are_not_used_again(models):
    models.publish("m", FILES, describe)
    models.publish("m", FILES, describe)
    models.remove("m", [1, 2])
    assert models.names() == []
    assert models.publish("m", FILES, describe) == 3
    assert models.remove_abandoned("m") == []


def test_a_lease_is_renewed_while_its_owner_works(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL_S", 0.05)
    with Store(str(tmp_path)).work("m") as url:
        lease = Path(url.removeprefix("file://")) / ".owner"
        before = lease.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while lease.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lease.stat().st_mtime_ns > before


class Overwriting(MemoryFileSystem):
    """A store without conditional writes: it writes over what is there."""

    protocol = "overwriting"

    def pipe_file(self, path, value, mode="overwrite", **_):
        super().pipe_file(path, value)


def test_a_store_without_conditional_writes_is_found_out(tmp_path):
    fsspec.register_implementation("overwriting", Overwriting, clobber=True)
    models = Store(f"overwriting://{tmp_path.name}")
    with (
        pytest.raises(errors.ClusterError, match="cannot write a file only where there is none"),
        models.work("m") as work,
    ):
        models.check_claims("m", work)


def test_a_mount_that_opens_no_directory(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *args):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "no directories here")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    models = Store(str(tmp_path))
    assert models.publish("m", FILES, describe) == 1
    assert models.versions("m") == [1]


def test_an_error_of_a_stores_client_becomes_an_os_error():
    def refuse():
        raise answered(403)

    with pytest.raises(OSError, match="ClientError"):
        retries.call("write", refuse)


@pytest.mark.parametrize(
    "error",
    [
        errors.NotPublished("not taken", work="file:///store/m/.work-1"),
        errors.RankError("rank 1 raised", rank=1, rank_traceback="line 1"),
        errors.BadRows("2 rows", {"null": 2}),
    ],
)
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == (str(error), vars(error))
