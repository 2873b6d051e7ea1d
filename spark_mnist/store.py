"""Where named models live: each path of a model, how a version comes to be. Runs on the driver.

    <store>/<model_name>/v000001/          a published version, never changed again
                         manifest.json     written last: no manifest, no version
                         weights.npz, optimizer.npz
                         logs/             what TensorBoard shows
    <store>/<model_name>/.work-<uuid>/     what an unfinished fit needs, removed at its end

A version's number is claimed first, by an operation that only one of several writers can win (on
local disks and on object stores with conditional writes); then its files are written, and last the
manifest, in one step. So a reader sees whole versions only, two fits on one name both keep their
work, and a fit that is killed leaves the version before untouched.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from spark_mnist import errors

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
CLAIM = ".claim"
"""What takes a version's number on a store without directories."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"v(\d{6,})")
FILE = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
"""A file's name below its version; it cannot lead out of it."""

Manifest = Mapping[str, Any]


def checked_name(name: str) -> str:
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


class Store:
    """The models under one root.

    Args:
        url: A path, or any URL that fsspec opens.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self.url: str = f"file://{self._root}" if self._local else url.rstrip("/")
        """The root with its scheme, as executors can use it."""

    def names(self) -> list[str]:
        """Names that have at least one version, sorted."""
        return [
            name
            for name in self._entries(self._root)
            if NAME.fullmatch(name) and self.versions(name)
        ]

    def versions(self, name: str) -> list[int]:
        """Numbers of a model's published versions, ascending."""
        return [
            n for n in self._numbers(name) if self._fs.exists(f"{self._path(name, n)}/{MANIFEST}")
        ]

    def newest(self, name: str, version: int | None = None) -> int:
        """The number of the newest version, or the given one if it is there.

        Raises:
            errors.ModelNotFound: It is not; the message names what is.
        """
        versions = self.versions(checked_name(name))
        if not versions:
            known = ", ".join(self.names()) or "none yet; fit one first"
            hint = errors.did_you_mean(name, self.names())
            raise errors.ModelNotFound(f"no model {name!r} in {self.url}: there is {known}{hint}")
        if version is not None and version not in versions:
            raise errors.ModelNotFound(f"model {name!r} has no version {version}, only {versions}")
        return versions[-1] if version is None else version

    def manifest(self, name: str, version: int) -> Manifest:
        """Read what a version says of itself.

        Raises:
            errors.DamagedModel: It cannot be understood.
        """
        try:
            manifest: Manifest = json.loads(
                self._fs.cat_file(f"{self._path(name, version)}/{MANIFEST}")
            )
            known = manifest["format"]
            if known == FORMAT:
                manifest["files"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"its {MANIFEST} is not readable ({error!r})"
            raise self._damaged(name, version, why) from None
        if known != FORMAT:
            why = f"it has format {known!r}; this release reads {FORMAT}"
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
            stamp = manifest["files"].get(file)
            if not FILE.fullmatch(file):
                raise self._damaged(name, version, f"{file!r} is no file of a version")
            try:
                content = self._fs.cat_file(f"{self._path(name, version)}/{file}")
            except FileNotFoundError:
                raise self._damaged(name, version, f"{file} is missing") from None
            if _stamp(content) != stamp:
                raise self._damaged(name, version, f"{file} differs from its sha256 in {MANIFEST}")
            files[file] = content
        return manifest, files

    def publish(
        self, name: str, files: Mapping[str, bytes], describe: Callable[[int], dict[str, Any]]
    ) -> int:
        """Write a new version, all of it or nothing that a reader would see.

        Args:
            name: The model.
            files: Contents by file name.
            describe: The manifest for a version number, as JSON values.

        Returns:
            The number of the version.
        """
        version = self._claim(checked_name(name))
        path = self._path(name, version)
        for file, content in files.items():
            self._write(f"{path}/{file}", content)
        stamps = {file: _stamp(content) for file, content in files.items()}
        manifest = {"format": FORMAT, **describe(version), "files": stamps}
        self._write(f"{path}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
        return version

    def remove(self, name: str, versions: Collection[int]) -> None:
        """Delete versions: of each its manifest first, so that no reader sees a part of it.

        Their numbers stay taken while the model has other versions, so that none is used twice.
        What a fit under way has in the model's folder stays, too.
        """
        for version in versions:
            path = self._path(checked_name(name), version)
            self._fs.rm(f"{path}/{MANIFEST}")
            for entry in self._entries(path):
                if entry != CLAIM:
                    self._fs.rm(f"{path}/{entry}", recursive=True)
        if self.versions(name):
            return
        # Not beyond: a number may have been taken by a fit that is about to write.
        for version in range(1, max(versions) + 1):
            with contextlib.suppress(OSError):  # not empty, or without a claim
                self._fs.rm(f"{self._path(name, version)}/{CLAIM}")
            with contextlib.suppress(OSError):
                self._fs.rmdir(self._path(name, version))
        with contextlib.suppress(OSError):
            self._fs.rmdir(f"{self._root}/{name}")

    @contextlib.contextmanager
    def work(self, name: str) -> Iterator[str]:
        """A fresh directory for one fit, as a URL; removed at the end, whatever happens."""
        path = f"{self._root}/{checked_name(name)}/.work-{uuid.uuid4().hex}"
        self._fs.makedirs(path)
        try:
            yield f"{self.url}{path.removeprefix(self._root)}"
        finally:
            try:
                self._fs.rm(path, recursive=True)
            except FileNotFoundError:
                pass  # a store without directories keeps none that is empty
            except OSError as error:
                logger.warning("%s could not be removed: %s", path, error)
            with contextlib.suppress(OSError):  # not empty: the model has versions
                self._fs.rmdir(f"{self._root}/{name}")

    def _claim(self, name: str) -> int:
        """Take the next free version number; of several writers, each gets one of its own."""
        for version in itertools.count(max(self._numbers(name), default=0) + 1):
            path = self._path(name, version)
            try:
                if self._local:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    os.mkdir(path)
                else:
                    self._fs.pipe_file(f"{path}/{CLAIM}", b"", mode="create")
            except FileExistsError:
                continue
            return version
        raise AssertionError("unreachable: the count has no end")

    def _write(self, path: str, content: bytes) -> None:
        """Write a file that is seen whole or not at all, as object stores do by themselves."""
        if not self._local:
            self._fs.pipe_file(path, content)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)

    def _numbers(self, name: str) -> list[int]:
        """Version numbers that are taken, published or not."""
        found = (VERSION.fullmatch(entry) for entry in self._entries(f"{self._root}/{name}"))
        return sorted(int(match[1]) for match in found if match)

    def _entries(self, path: str) -> list[str]:
        try:
            listed = self._fs.ls(path, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(os.path.basename(entry.rstrip("/")) for entry in listed)

    def _path(self, name: str, version: int) -> str:
        return f"{self._root}/{name}/v{version:06d}"

    def _damaged(self, name: str, version: int, why: str) -> errors.DamagedModel:
        others = [v for v in self.versions(name) if v < version]
        remedy = f"; version={others[-1]} is the one before" if others else ""
        return errors.DamagedModel(
            f"version {version} of model {name!r} cannot be used: {why}{remedy}"
        )


def _stamp(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
