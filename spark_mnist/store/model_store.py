"""Where named models live: each path of a model, how a version comes to be. Driver and rank 0.

    <store>/<model_name>/v000001/          a published version, never changed again
                         manifest.json     written last: no manifest, no version
                         weights.npz, optimizer.npz
                         logs/             what TensorBoard shows
    <store>/<model_name>/.work-<uuid>/     what an unfinished fit needs, removed at its end
    .../.claim, .../.owner                 which process works there

A version's number is claimed first, which only one of several writers can do (on local disks and on
object stores with conditional writes); then its files are written, and last the manifest. So a
reader sees whole versions only, two fits on one name both keep their work, and one that is killed
leaves the version before untouched; the next sweeps up.
"""

from __future__ import annotations

import contextlib
import hashlib
import http
import itertools
import json
import logging
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spark_mnist import errors
from spark_mnist.core import retries
from spark_mnist.store import leases
from spark_mnist.store.filesystem import Files

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of manifests; those of format 1, which earlier releases wrote, have no hash of their own."""
READABLE = (1, 2)
MANIFEST = "manifest.json"
DIGEST = "sha256"
"""The key of a manifest's own hash."""
CLAIM = ".claim"
"""Takes a version's number, and tells for whom; of a version that was deleted, for nobody."""
OWNER = ".owner"
"""The same in a fit's work directory."""
DELETED = b"deleted"
"""What a claim says whose version was deleted."""
PROBE = "probe"
"""What is claimed in a work directory to see that only one of several can."""
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON raises that is not as it should be."""
NO_MANIFEST = f"it has no {MANIFEST}, since its fit was stopped or the file was removed"
WORK = re.compile(r"\.work-[0-9a-f]{32}")
"""The name of a fit's work directory."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"v(\d{6,})")
FILE = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
"""A file's name below its version; it cannot lead out of it."""

Manifest = Mapping[str, Any]


def validate_name(name: str) -> str:
    """Return a model's name if it can be one.

    Raises:
        errors.ModelNameError: It cannot; no name can lead out of the store.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise errors.ModelNameError(
            f"{name!r} cannot be a model's name: use 1 to 64 letters, digits, '.', '_' and '-', "
            "a letter or a digit first"
        )
    return name


@dataclass(frozen=True)
class StoredFile:
    """A file of a version, which need not be held in memory to be published again."""

    files: Files
    path: str
    stamp: dict[str, Any]

    def copy_to(self, files: Files, path: str) -> None:
        """Copy it, and compare what was copied with its stamp.

        Raises:
            errors.DamagedModel: It has changed.
        """
        files.write_blocks(path, lambda: self.files.blocks(self.path))
        if _stamp_of(files.blocks(path)) != self.stamp:
            raise errors.DamagedModel(f"{self.path} changed while it was published")


class Store:
    """The models under one root.

    Args:
        url: A path, or any URL that fsspec opens.
    """

    def __init__(self, url: str) -> None:
        self._files = Files(url)

    @property
    def url(self) -> str:
        """The root with its scheme, as executors can use it."""
        return self._files.url

    def names(self) -> list[str]:
        """Names that have at least one version, sorted."""
        return [
            name
            for name in self._files.entries()
            if NAME.fullmatch(name) and not self._files.target(name) and self.versions(name)
        ]

    def versions(self, name: str) -> list[int]:
        """Numbers of a model's published versions, ascending."""
        return [n for n in self._numbers(name) if self._files.exist(f"{_path(name, n)}/{MANIFEST}")]

    def resolve_version(self, name: str, version: int | None = None) -> int:
        """The number of the newest version, or the given one if it is there.

        Raises:
            errors.ModelNotFound: It is not; the message names what is.
            errors.DamagedModel: It has no manifest.
        """
        self._check(name)
        versions = self.versions(name)
        stopped = self._stopped(name, versions)
        if version in stopped:
            raise self._damaged(name, version, NO_MANIFEST)
        if not versions:
            names = self.names()
            known = ", ".join(names) or "none yet; fit one first"
            hint = errors.did_you_mean(name, names)
            part = f"; its version {stopped[-1]} cannot be used: {NO_MANIFEST}" if stopped else ""
            raise errors.ModelNotFound(
                f"no model {name!r} in {self.url}: there is {known}{hint}{part}"
            )
        if version is not None and version not in versions:
            raise errors.ModelNotFound(f"model {name!r} has no version {version}, only {versions}")
        if version is None and stopped and stopped[-1] > versions[-1]:
            logger.warning(
                "version %d of model %r cannot be used: %s; version %d is the one before",
                *(stopped[-1], name, NO_MANIFEST, versions[-1]),
            )
        return versions[-1] if version is None else version

    def manifest(self, name: str, version: int) -> Manifest:
        """Read what a version says of itself.

        Raises:
            errors.DamagedModel: It cannot be understood.
        """
        try:
            manifest: Manifest = json.loads(self._files.read(f"{_path(name, version)}/{MANIFEST}"))
            known = manifest["format"]
            if known in READABLE:
                manifest["files"].items()
                check_digest(manifest)
        except errors.DamagedModel as error:
            raise self._damaged(name, version, str(error)) from None
        except (OSError, *MALFORMED) as error:
            why = f"its {MANIFEST} is not readable ({error!r})"
            raise self._damaged(name, version, why) from None
        if known not in READABLE:
            why = f"it has format {known!r}; this release reads {FORMAT}: use a newer one"
            raise self._damaged(name, version, why)
        return manifest

    def read(
        self, name: str, version: int, wanted: Collection[str] | None = None
    ) -> tuple[Manifest, dict[str, bytes]]:
        """Read a version: its manifest and its files, each checked against size and hash.

        Args:
            name: The model.
            version: Number of a version.
            wanted: Names of the files to read; None reads all.

        Raises:
            errors.DamagedModel: A file is missing or is not what was written.
        """
        manifest = self.manifest(name, version)
        files = {}
        for file in manifest["files"] if wanted is None else wanted:
            written = manifest["files"].get(file)
            if not FILE.fullmatch(file):
                raise self._damaged(name, version, f"{file!r} is no file of a version")
            try:
                content = self._files.read(f"{_path(name, version)}/{file}")
            except FileNotFoundError:
                raise self._damaged(name, version, f"{file} is missing") from None
            if stamp(content) != written:
                raise self._damaged(name, version, f"{file} differs from its sha256 in {MANIFEST}")
            files[file] = content
        return manifest, files

    def stored(
        self, name: str, version: int, wanted: Collection[str] | None = None
    ) -> dict[str, StoredFile]:
        """Return the files of a version, none of them held in memory, each checked as by ``read``.

        Args:
            name: The model.
            version: Number of a version.
            wanted: Names of the files; None for all.

        Raises:
            errors.DamagedModel: A file is missing or is not what was written.
        """
        manifest = self.manifest(name, version)
        files = {}
        for file in manifest["files"] if wanted is None else wanted:
            if not FILE.fullmatch(file):
                raise self._damaged(name, version, f"{file!r} is no file of a version")
            path = f"{_path(name, version)}/{file}"
            try:
                written = _stamp_of(self._files.blocks(path))
            except FileNotFoundError:
                raise self._damaged(name, version, f"{file} is missing") from None
            if written != manifest["files"].get(file):
                raise self._damaged(name, version, f"{file} differs from its sha256 in {MANIFEST}")
            files[file] = StoredFile(self._files, path, written)
        return files

    def publish(
        self,
        name: str,
        files: Mapping[str, bytes | StoredFile],
        describe: Callable[[int], dict[str, Any]],
    ) -> int:
        """Write a new version, all of it or nothing that a reader would see.

        Args:
            name: The model.
            files: Contents by file name; what lies in a store is copied block by block.
            describe: The manifest for a version number, as JSON values.

        Returns:
            The number of the version.

        Raises:
            errors.DamagedModel: A file to copy is not what was written any more.
        """
        self._check(name)
        stamps = {
            file: content.stamp if isinstance(content, StoredFile) else stamp(content)
            for file, content in files.items()
        }
        version, lease = self._claim(name)
        path = _path(name, version)
        try:
            with self._renewed(f"{path}/{CLAIM}", lease):
                for file, content in files.items():
                    if isinstance(content, StoredFile):
                        content.copy_to(self._files, f"{path}/{file}")
                    else:
                        self._files.write(f"{path}/{file}", content)
                manifest = {"format": FORMAT, **describe(version), "files": stamps}
                manifest[DIGEST] = digest(manifest)
                self._files.write(f"{path}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
        except BaseException as error:
            published = self._is_published(path)
            if published and isinstance(error, OSError):
                return version  # what failed came after
            if not published:
                self._files.remove(path)
            raise
        return version

    def _is_published(self, path: str) -> bool:
        """Whether a version has its manifest; not where that cannot be found out."""
        try:
            return self._files.exist(f"{path}/{MANIFEST}")
        except OSError:
            return False

    def _renewed(self, path: str, lease: bytes) -> contextlib.AbstractContextManager[None]:
        """Renew a lease until a block ends."""
        return leases.renewed(lambda: self._files.write(path, lease))

    def remove(self, name: str, versions: Collection[int], *, forget: bool = False) -> None:
        """Delete versions: of each its manifest first, so that no reader sees a part of it.

        The claim of the highest number stays, so that none is used twice. What a fit under way
        has in the model's folder stays, too: its claim is not ``DELETED``.

        Args:
            name: The model.
            versions: Their numbers.
            forget: Whether to remove the folder, and with it the numbers, of a model that has no
                version left.
        """
        self._check(name)
        for version in versions:
            path = _path(name, version)
            self._files.remove_file(f"{path}/{MANIFEST}")
            self._files.write(f"{path}/{CLAIM}", DELETED)
            for entry in self._files.entries(path):
                if entry != CLAIM:
                    self._files.remove(f"{path}/{entry}")
        if forget and not self.versions(name):
            self._files.remove(name)
            return
        for path in (_path(name, number) for number in self._numbers(name)[:-1]):
            claim = f"{path}/{CLAIM}"
            if self._files.entries(path) == [CLAIM] and self._files.read(claim) == DELETED:
                self._files.remove(path)

    @contextlib.contextmanager
    def work(self, name: str) -> Iterator[str]:
        """Make a fresh directory for one fit and yield its URL; it is removed at the end.

        It stays where ``errors.NotPublished`` is raised, for ``publish``.
        """
        self._check(name)
        path, lease, stays = f"{name}/.work-{uuid.uuid4().hex}", leases.create(), False
        try:
            self._files.make_private(path)
            self._files.write(f"{path}/{OWNER}", lease)
            with self._renewed(f"{path}/{OWNER}", lease):
                yield f"{self.url}/{path}"
        except errors.NotPublished:
            stays = True
            raise
        finally:
            if not stays:
                self._files.remove(path)
                self._files.remove_empty(name)

    def check_claims(self, name: str, work: str) -> None:
        """Refuse a store in which two fits could take the same version's number.

        Args:
            name: A model.
            work: What ``work`` gave for it.

        Raises:
            errors.ClusterError: What is there is written over where it must not be, or cannot be
                written so at all.
        """
        path = f"{name}/{work.rpartition('/')[2]}/{PROBE}"
        try:
            self._files.create_exclusive(path, CLAIM, leases.create())
            with contextlib.suppress(FileExistsError):
                self._files.create_exclusive(path, CLAIM, leases.create())
                raise errors.ClusterError(_no_conditional_writes(self.url, "it wrote twice"))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise errors.ClusterError(_no_conditional_writes(self.url, str(error))) from error
        except OSError as error:
            if retries.http_status(error) != http.HTTPStatus.NOT_IMPLEMENTED:
                raise
            raise errors.ClusterError(_no_conditional_writes(self.url, str(error))) from error

    def remove_abandoned(
        self, name: str, spare: Callable[[str], bool] = lambda work: False
    ) -> list[str]:
        """Remove what killed fits left behind; returns what that was.

        Args:
            name: The model.
            spare: Whether to leave a work directory, by its URL, whose fit is gone.
        """
        self._check(name)
        left = [f"{name}/{entry}" for entry in self._files.entries(name) if WORK.fullmatch(entry)]
        left = [path for path in left if self._is_left(path, OWNER)]
        left = [path for path in left if not spare(f"{self.url}/{path}")]
        left += [_path(name, number) for number in self._stopped(name, self.versions(name))]
        for path in left:
            self._files.remove(path)
        return left

    def _stopped(self, name: str, published: Collection[int]) -> list[int]:
        """Numbers of versions without a manifest that nobody writes any more."""
        taken = (n for n in self._numbers(name) if n not in published)
        return [n for n in taken if self._is_left(_path(name, n), CLAIM)]

    def _is_left(self, path: str, note: str) -> bool:
        """Whether a directory has something in it whose owner is gone."""
        lease = f"{path}/{note}"
        age = self._files.age(lease if self._files.exist(lease) else path)
        if age is None:
            return False
        try:
            content = self._files.read(lease)
        except FileNotFoundError:
            content = b""
        except PermissionError:  # another user's, who alone can tell and remove it
            return False
        left = content != DELETED and leases.is_stale(content, age)
        # Its owner may have finished and gone between the first look and this one.
        return left and not self._files.exist(f"{path}/{MANIFEST}")

    def _check(self, name: str) -> None:
        """Refuse a name that cannot be a model's, or that leads out of the store by a link."""
        if target := self._files.target(validate_name(name)):
            raise errors.ModelNameError(
                f"model {name!r} leads out of the store {self.url} by a link, to {target}"
            )

    def _claim(self, name: str) -> tuple[int, bytes]:
        """Take the next free version number; of several writers, each gets one of its own.

        Returns:
            The number, and the lease that says whose it is.
        """
        lease = leases.create()
        for version in itertools.count(max(self._numbers(name), default=0) + 1):
            with contextlib.suppress(FileExistsError):
                self._files.create_exclusive(_path(name, version), CLAIM, lease)
                return version, lease
        raise AssertionError("unreachable: the count has no end")

    def _numbers(self, name: str) -> list[int]:
        """Version numbers that are taken, published or not."""
        found = (VERSION.fullmatch(entry) for entry in self._files.entries(name))
        return sorted(int(match[1]) for match in found if match)

    def _damaged(self, name: str, version: int, why: str) -> errors.DamagedModel:
        others = [v for v in self.versions(name) if v < version]
        remedy = f"; version={others[-1]} is the one before" if others else ""
        return errors.DamagedModel(
            f"version {version} of model {name!r} cannot be used: {why}{remedy}"
        )


def _path(name: str, version: int) -> str:
    return f"{name}/v{version:06d}"


def _no_conditional_writes(url: str, why: str) -> str:
    return (
        f"{url} cannot write a file only where there is none ({why}), by which two fits would take "
        "the same version: use a store that can, say a disk, S3, Google's or Azure's"
    )


def digest(manifest: Manifest) -> str:
    """Return the sha256 of all that a manifest says but this."""
    said = {key: value for key, value in manifest.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def check_digest(manifest: Manifest) -> None:
    """Compare a manifest with its hash, which those of format 1 do not have.

    Raises:
        errors.DamagedModel: It is not what was written.
    """
    if manifest["format"] != 1 and manifest.get(DIGEST) != digest(manifest):
        raise errors.DamagedModel(f"its {MANIFEST} differs from its own {DIGEST}")


def validate_work_url(url: str) -> str:
    """Return the URL of a fit's work directory.

    Raises:
        errors.ModelNotFound: It is none, or is not there.
    """
    parent, _, name = str(url).rstrip("/").rpartition("/")
    try:
        there = WORK.fullmatch(name) and Files(parent).exist(name)
    except (ImportError, ValueError) as error:  # what fsspec raises of a URL that it cannot open
        raise errors.ModelNotFound(f"{url} cannot be opened: {error}") from error
    if not there:
        raise errors.ModelNotFound(
            f"{url} is no directory of a fit that could not publish: errors.NotPublished has it"
        )
    return f"{parent}/{name}"


def remove_work(url: str) -> None:
    """Remove a fit's work directory, as ``validate_work_url`` gave it."""
    parent, _, name = url.rpartition("/")
    Files(parent).remove(name)


def stamp(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file, by which it is known again."""
    return _stamp_of([content])


def _stamp_of(blocks: Iterable[bytes]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    for block in blocks:
        digest.update(block)
        size += len(block)
    return {"sha256": digest.hexdigest(), "bytes": size}
