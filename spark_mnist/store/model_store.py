"""Model store: the paths of each model, and how a version is published.

    <store>/<model_name>/v000001/          a published version, never changed again
                         manifest.json     written last: no manifest, no version
                         weights.npz, optimizer.npz
                         logs/             TensorBoard's files
    <store>/<model_name>/.work-<uuid>/     files of an unfinished fit, removed at its end
    .../.claim, .../.owner                 lease of the process that works there

A version's number is claimed first, which only one of several writers can do (on local disks and on
object stores with conditional writes). Then the version's files are written, and last the manifest.
So a reader sees whole versions only, and two fits on one name both keep their work. A fit that is
killed leaves the version before untouched, and the next fit removes what it left behind.
Runs on: driver, rank.
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
"""Format of new manifests; those of format 1, of earlier releases, have no hash of their own."""
READABLE_FORMATS = (1, 2)
"""Formats of manifests that this release reads."""
MANIFEST = "manifest.json"
DIGEST = "sha256"
"""Key of a manifest's own hash."""
CLAIM = ".claim"
"""File that claims a version's number; it has its owner's lease, or ``DELETED``."""
OWNER = ".owner"
"""File with the owner's lease in a fit's work directory."""
DELETED = b"deleted"
"""Content of the claim of a version that was deleted."""
PROBE = "probe"
"""Directory that is claimed in a work directory, to check that only one of several writers can."""
MALFORMED_MANIFEST_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Exceptions that reading a malformed manifest raises."""
NO_MANIFEST = f"it has no {MANIFEST}, since its fit was stopped or the file was removed"
"""Reason why a version without a manifest cannot be used."""
WORK_NAME = re.compile(r"\.work-[0-9a-f]{32}")
"""Name of a fit's work directory."""
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Name of a model."""
VERSION_NAME = re.compile(r"v(\d{6,})")
"""Name of a version's directory, with its number."""
FILE_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
"""Name of a file below its version; it cannot lead out of the version."""

Manifest = Mapping[str, Any]


def validate_name(name: str) -> str:
    """Return a model's name if it can be one.

    Raises:
        errors.ModelNameError: It cannot be a model's name; no such name can lead out of the store.
    """
    if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
        raise errors.ModelNameError(
            f"{name!r} is not a valid model name: use 1 to 64 letters, digits, '.', '_' and '-', "
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
        """Copy the file, and compare the copy with the stamp.

        Raises:
            errors.DamagedModel: The file has changed.
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
        """Root with its scheme, as executors can use it."""
        return self._files.url

    def names(self) -> list[str]:
        """Return the names that have at least one version, sorted."""
        return [
            name
            for name in self._files.entries()
            if MODEL_NAME.fullmatch(name) and not self._files.target(name) and self.versions(name)
        ]

    def versions(self, name: str) -> list[int]:
        """Return the numbers of a model's published versions, ascending."""
        return [
            number
            for number in self._numbers(name)
            if self._files.exists(f"{_path(name, number)}/{MANIFEST}")
        ]

    def resolve_version(self, name: str, version: int | None = None) -> int:
        """Return the number of the newest version, or the given number if that version exists.

        Raises:
            errors.ModelNotFound: The version does not exist; the message names those that do.
            errors.DamagedModel: The version has no manifest.
        """
        self._check_name(name)
        versions = self.versions(name)
        unfinished = self._unfinished_numbers(name, versions)
        if version in unfinished:
            raise self._damaged_model(name, version, NO_MANIFEST)
        if not versions:
            names = self.names()
            choices = ", ".join(names) or "none yet; fit one first"
            hint = errors.did_you_mean(name, names)
            remark = (
                f"; its version {unfinished[-1]} cannot be used: {NO_MANIFEST}"
                if unfinished
                else ""
            )
            raise errors.ModelNotFound(
                f"no model {name!r} in {self.url}, which has {choices}{hint}{remark}"
            )
        if version is not None and version not in versions:
            raise errors.ModelNotFound(f"model {name!r} has no version {version}, only {versions}")
        if version is None and unfinished and unfinished[-1] > versions[-1]:
            logger.warning(
                "version %d of model %r cannot be used: %s; version %d is the one before",
                *(unfinished[-1], name, NO_MANIFEST, versions[-1]),
            )
        return versions[-1] if version is None else version

    def manifest(self, name: str, version: int) -> Manifest:
        """Read the manifest of a version.

        Raises:
            errors.DamagedModel: The manifest cannot be understood.
        """
        try:
            manifest: Manifest = json.loads(self._files.read(f"{_path(name, version)}/{MANIFEST}"))
            format_number = manifest["format"]
            if format_number in READABLE_FORMATS:
                manifest["files"].items()
                check_digest(manifest)
        except errors.DamagedModel as error:
            raise self._damaged_model(name, version, str(error)) from None
        except (OSError, *MALFORMED_MANIFEST_ERRORS) as error:
            reason = f"its {MANIFEST} is not readable ({error!r})"
            raise self._damaged_model(name, version, reason) from None
        if format_number not in READABLE_FORMATS:
            reason = (
                f"it has format {format_number!r}; this release reads formats 1 and {FORMAT}: use "
                "a newer release of spark_mnist"
            )
            raise self._damaged_model(name, version, reason)
        return manifest

    def read(
        self, name: str, version: int, file_names: Collection[str] | None = None
    ) -> tuple[Manifest, dict[str, bytes]]:
        """Read a version: its manifest and its files, each checked against size and hash.

        Args:
            name: Name of the model.
            version: Number of the version.
            file_names: Names of the files to read; None reads all.

        Raises:
            errors.DamagedModel: A file is missing or is not what was written.
        """
        manifest = self.manifest(name, version)
        files = {}
        for file in manifest["files"] if file_names is None else file_names:
            expected_stamp = manifest["files"].get(file)
            if not FILE_NAME.fullmatch(file):
                raise self._damaged_model(name, version, f"{file!r} is no file of a version")
            try:
                content = self._files.read(f"{_path(name, version)}/{file}")
            except FileNotFoundError:
                raise self._damaged_model(name, version, f"{file} is missing") from None
            if stamp(content) != expected_stamp:
                raise self._damaged_model(
                    name, version, f"{file} differs from its sha256 in {MANIFEST}"
                )
            files[file] = content
        return manifest, files

    def references(
        self, name: str, version: int, file_names: Collection[str] | None = None
    ) -> dict[str, StoredFile]:
        """Return the files of a version, none of them held in memory, each checked as by ``read``.

        Args:
            name: Name of the model.
            version: Number of the version.
            file_names: Names of the files; None for all.

        Raises:
            errors.DamagedModel: A file is missing or is not what was written.
        """
        manifest = self.manifest(name, version)
        files = {}
        for file in manifest["files"] if file_names is None else file_names:
            if not FILE_NAME.fullmatch(file):
                raise self._damaged_model(name, version, f"{file!r} is no file of a version")
            path = f"{_path(name, version)}/{file}"
            try:
                actual_stamp = _stamp_of(self._files.blocks(path))
            except FileNotFoundError:
                raise self._damaged_model(name, version, f"{file} is missing") from None
            if actual_stamp != manifest["files"].get(file):
                raise self._damaged_model(
                    name, version, f"{file} differs from its sha256 in {MANIFEST}"
                )
            files[file] = StoredFile(self._files, path, actual_stamp)
        return files

    def publish(
        self,
        name: str,
        files: Mapping[str, bytes | StoredFile],
        describe: Callable[[int], dict[str, Any]],
    ) -> int:
        """Write a new version, all of it or nothing that a reader would see.

        Args:
            name: Name of the model.
            files: Contents by file name; files of a store are copied block by block.
            describe: Function that returns the manifest for a version number, as JSON values.

        Returns:
            The number of the version.

        Raises:
            errors.DamagedModel: A file to copy is not what was written any more.
        """
        self._check_name(name)
        stamps = {
            file: content.stamp if isinstance(content, StoredFile) else stamp(content)
            for file, content in files.items()
        }
        version, lease = self._claim_number(name)
        path = _path(name, version)
        try:
            with self._renew_lease(f"{path}/{CLAIM}", lease):
                for file, content in files.items():
                    if isinstance(content, StoredFile):
                        content.copy_to(self._files, f"{path}/{file}")
                    else:
                        self._files.write(f"{path}/{file}", content)
                manifest = {"format": FORMAT, **describe(version), "files": stamps}
                manifest[DIGEST] = digest(manifest)
                self._files.write(f"{path}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
        except BaseException as error:
            is_published = self._is_published(path)
            if is_published and isinstance(error, OSError):
                return version  # the failure came after publication
            if not is_published:
                self._files.remove(path)
            raise
        return version

    def _is_published(self, path: str) -> bool:
        """Return whether a version has its manifest; False where that cannot be found out."""
        try:
            return self._files.exists(f"{path}/{MANIFEST}")
        except OSError:
            return False

    def _renew_lease(self, path: str, lease: bytes) -> contextlib.AbstractContextManager[None]:
        """Renew a lease until the block ends."""
        return leases.renewal(lambda: self._files.write(path, lease))

    def remove(self, name: str, versions: Collection[int], *, forget: bool = False) -> None:
        """Delete versions, the manifest of each first, so that no reader sees a part of a version.

        The claim of the highest number stays, so that no number is used twice. Files of a running
        fit in the model's folder stay, too: its claim is not ``DELETED``.

        Args:
            name: Name of the model.
            versions: Numbers of the versions.
            forget: Whether to remove the folder, and with it the numbers, of a model that has no
                version left.
        """
        self._check_name(name)
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
        """Make a new directory for one fit and yield its URL; remove the directory at the end.

        The directory stays where ``errors.NotPublished`` is raised, for ``publish``.
        """
        self._check_name(name)
        path, lease, keeps_directory = f"{name}/.work-{uuid.uuid4().hex}", leases.create(), False
        try:
            self._files.make_private(path)
            self._files.write(f"{path}/{OWNER}", lease)
            with self._renew_lease(f"{path}/{OWNER}", lease):
                yield f"{self.url}/{path}"
        except errors.NotPublished:
            keeps_directory = True
            raise
        finally:
            if not keeps_directory:
                self._files.remove(path)
                self._files.remove_empty(name)

    def check_claims(self, name: str, work: str) -> None:
        """Refuse a store in which two fits could claim the same version number.

        Args:
            name: Name of a model.
            work: URL that ``work`` yielded for that model.

        Raises:
            errors.ClusterError: The store overwrites a file where it must not, or has no write that
                never overwrites.
        """
        path = f"{name}/{work.rpartition('/')[2]}/{PROBE}"
        try:
            self._files.create_exclusive(path, CLAIM, leases.create())
            with contextlib.suppress(FileExistsError):
                self._files.create_exclusive(path, CLAIM, leases.create())
                raise errors.ClusterError(_no_conditional_writes(self.url, "it wrote twice"))
        except (NotImplementedError, TypeError, ValueError) as error:
            # The file system's client has no exclusive write: it says so, or it does not know the
            # argument (TypeError) or its value (ValueError).
            raise errors.ClusterError(_no_conditional_writes(self.url, str(error))) from error
        except OSError as error:
            if retries.http_status(error) != http.HTTPStatus.NOT_IMPLEMENTED:
                raise
            raise errors.ClusterError(_no_conditional_writes(self.url, str(error))) from error

    def remove_abandoned(
        self, name: str, spare: Callable[[str], bool] = lambda work: False
    ) -> list[str]:
        """Remove what killed fits left behind, and return the paths.

        Args:
            name: Name of the model.
            spare: Function of the URL of an abandoned work directory; returns whether to keep it.
        """
        self._check_name(name)
        paths = [
            f"{name}/{entry}" for entry in self._files.entries(name) if WORK_NAME.fullmatch(entry)
        ]
        paths = [path for path in paths if self._is_abandoned(path, OWNER)]
        paths = [path for path in paths if not spare(f"{self.url}/{path}")]
        paths += [
            _path(name, number) for number in self._unfinished_numbers(name, self.versions(name))
        ]
        for path in paths:
            self._files.remove(path)
        return paths

    def _unfinished_numbers(self, name: str, published_versions: Collection[int]) -> list[int]:
        """Return the numbers of versions without a manifest that no fit writes any more."""
        unpublished = (number for number in self._numbers(name) if number not in published_versions)
        return [number for number in unpublished if self._is_abandoned(_path(name, number), CLAIM)]

    def _is_abandoned(self, path: str, lease_name: str) -> bool:
        """Return whether the owner of a directory, which has something in it, is gone."""
        lease_path = f"{path}/{lease_name}"
        age = self._files.age(lease_path if self._files.exists(lease_path) else path)
        if age is None:
            return False
        try:
            content = self._files.read(lease_path)
        except FileNotFoundError:
            content = b""
        except PermissionError:  # it is another user's, who alone can tell and remove it
            return False
        is_abandoned = content != DELETED and leases.is_stale(content, age)
        # The owner may have published and ended between the first check and this one.
        return is_abandoned and not self._files.exists(f"{path}/{MANIFEST}")

    def _check_name(self, name: str) -> None:
        """Refuse a name that cannot be a model's, or that leads out of the store by a link."""
        if target := self._files.target(validate_name(name)):
            raise errors.ModelNameError(
                f"model {name!r} leads out of the store {self.url} by a link, to {target}"
            )

    def _claim_number(self, name: str) -> tuple[int, bytes]:
        """Claim the next free version number; of several writers, each gets one of its own.

        Returns:
            The number, and the lease that names its owner.
        """
        lease = leases.create()
        for version in itertools.count(max(self._numbers(name), default=0) + 1):
            with contextlib.suppress(FileExistsError):
                self._files.create_exclusive(_path(name, version), CLAIM, lease)
                return version, lease
        raise AssertionError("unreachable: the count has no end")

    def _numbers(self, name: str) -> list[int]:
        """Return the version numbers that are in use, published or not."""
        matches = (VERSION_NAME.fullmatch(entry) for entry in self._files.entries(name))
        return sorted(int(match[1]) for match in matches if match)

    def _damaged_model(self, name: str, version: int, reason: str) -> errors.DamagedModel:
        earlier = [number for number in self.versions(name) if number < version]
        remedy = f"; version={earlier[-1]} is the one before" if earlier else ""
        return errors.DamagedModel(
            f"version {version} of model {name!r} cannot be used: {reason}{remedy}"
        )


def _path(name: str, version: int) -> str:
    return f"{name}/v{version:06d}"


def _no_conditional_writes(url: str, reason: str) -> str:
    return (
        f"{url} cannot write a file only where there is none yet ({reason}), so two fits could "
        "take the same version: use a store that can, as disks, S3, Google Cloud Storage and Azure"
    )


def digest(manifest: Manifest) -> str:
    """Return the sha256 of a manifest without its own hash."""
    content = {key: value for key, value in manifest.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_digest(manifest: Manifest) -> None:
    """Compare a manifest with its hash, which those of format 1 do not have.

    Raises:
        errors.DamagedModel: The manifest is not what was written.
    """
    if manifest["format"] != 1 and manifest.get(DIGEST) != digest(manifest):
        raise errors.DamagedModel(f"its {MANIFEST} differs from its own {DIGEST}")


def validate_work_url(url: str) -> str:
    """Return the URL of a fit's work directory, if it is one that exists.

    Raises:
        errors.ModelNotFound: The URL is not a work directory's, or the directory does not exist.
    """
    parent, _, name = str(url).rstrip("/").rpartition("/")
    try:
        exists = WORK_NAME.fullmatch(name) and Files(parent).exists(name)
    except (ImportError, ValueError) as error:  # what fsspec raises for a URL that it cannot open
        raise errors.ModelNotFound(f"{url} cannot be opened: {error}") from error
    if not exists:
        raise errors.ModelNotFound(
            f"{url} is no directory of a fit that could not publish: errors.NotPublished has it"
        )
    return f"{parent}/{name}"


def remove_work(url: str) -> None:
    """Remove a fit's work directory, whose URL is from ``validate_work_url``."""
    parent, _, name = url.rpartition("/")
    Files(parent).remove(name)


def stamp(content: bytes) -> dict[str, Any]:
    """Return the size and the hash by which a manifest recognizes a file."""
    return _stamp_of([content])


def _stamp_of(blocks: Iterable[bytes]) -> dict[str, Any]:
    sha256, size = hashlib.sha256(), 0
    for block in blocks:
        sha256.update(block)
        size += len(block)
    return {"sha256": sha256.hexdigest(), "bytes": size}
