"""Files below one root, on any file system that fsspec opens.

All paths are relative to the root. Readers see a written file whole or not at all.
Runs on: driver, rank, Spark task.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator

import fsspec
from fsspec.implementations.local import LocalFileSystem

from spark_mnist.core import retries

logger = logging.getLogger(__name__)

COPY_BLOCK_BYTES = 8 << 20
"""Bytes of a file that are in memory at once while it is copied."""
OBJECT_STORE_PROTOCOLS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
"""Protocols of stores without directories, in which a file appears only when it is whole."""


def _mount_path(url: str) -> str:
    """Return ``dbfs:/path`` as the path at which Databricks mounts it on every host."""
    if not url.startswith("dbfs:/"):
        return url
    path = f"/{url.removeprefix('dbfs:').lstrip('/')}"
    return path if path.startswith("/Volumes/") else f"/dbfs{path}"


class Files:
    """The files below a root.

    Args:
        url: A path, or any URL that fsspec opens.
    """

    def __init__(self, url: str) -> None:
        # Otherwise s3fs would keep each listing for as long as the process lives.
        self._fs, self._root = fsspec.core.url_to_fs(_mount_path(url), use_listings_cache=False)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._is_object_store = not OBJECT_STORE_PROTOCOLS.isdisjoint(_protocols(self._fs))
        self.url: str = f"file://{self._root}" if self._is_local else url.rstrip("/")
        """Root with its scheme, as executors can use it."""

    @retries.with_retries
    def entries(self, path: str = "") -> list[str]:
        """Return the names in a directory, sorted; none where there is no directory."""
        try:
            paths = self._fs.ls(self._full_path(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(os.path.basename(entry.rstrip("/")) for entry in paths)

    @retries.with_retries
    def exists(self, path: str) -> bool:
        """Return whether there is a file or directory."""
        return bool(self._fs.exists(self._full_path(path)))

    @retries.with_retries
    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        content: bytes = self._fs.cat_file(self._full_path(path))
        return content

    def blocks(self, path: str) -> Iterator[bytes]:
        """Yield the content of a file in blocks."""
        offset, delays = 0, iter(retries.DELAYS_S)
        while True:
            try:
                with self._fs.open(self._full_path(path), "rb") as file:
                    file.seek(offset)
                    while block := file.read(COPY_BLOCK_BYTES):
                        offset, delays = offset + len(block), iter(retries.DELAYS_S)
                        yield block
                return
            except GeneratorExit:
                raise
            except Exception as error:  # of any type, as stores' clients have their own
                retries.wait(f"read {path}", error, delays)

    @retries.with_retries
    def write(self, path: str, content: bytes) -> None:
        """Write a file that readers see whole or not at all, as object stores do by themselves."""
        if self._is_local:
            self._write_locally(self._full_path(path), [content])
        else:
            self._write_elsewhere(self._full_path(path), content)

    @retries.with_retries
    def write_blocks(self, path: str, blocks: Callable[[], Iterable[bytes]]) -> None:
        """Write a file as ``write`` does, from blocks that need not be in memory at once.

        Args:
            path: Path of the file.
            blocks: Function that returns the content; another try calls it again.
        """
        if self._is_local:
            self._write_locally(self._full_path(path), blocks())
        else:
            self._write_blocks_elsewhere(self._full_path(path), blocks())

    def _write_locally(self, full_path: str, blocks: Iterable[bytes]) -> None:
        os.makedirs(os.path.dirname(full_path), exist_ok=True)
        with open(f"{full_path}.tmp", "wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{full_path}.tmp", full_path)
        with contextlib.suppress(OSError):  # some file systems cannot sync or open a directory
            directory = os.open(os.path.dirname(full_path), os.O_RDONLY)
            try:
                os.fsync(directory)  # otherwise a power cut may undo the rename
            finally:
                os.close(directory)

    def _write_elsewhere(self, full_path: str, content: bytes) -> None:
        if self._is_object_store:
            self._fs.pipe_file(full_path, content)
            return
        self._fs.makedirs(os.path.dirname(full_path), exist_ok=True)
        self._fs.pipe_file(f"{full_path}.tmp", content)
        self._move_into_place(full_path)

    def _write_blocks_elsewhere(self, full_path: str, blocks: Iterable[bytes]) -> None:
        temporary = full_path if self._is_object_store else f"{full_path}.tmp"
        if not self._is_object_store:
            self._fs.makedirs(os.path.dirname(full_path), exist_ok=True)
        with self._fs.open(temporary, "wb") as file:
            for block in blocks:
                file.write(block)
        if not self._is_object_store:
            self._move_into_place(full_path)

    def _move_into_place(self, full_path: str) -> None:
        """Move the temporary file beside a path to that path."""
        try:
            self._fs.mv(f"{full_path}.tmp", full_path)
        except OSError:
            if not (self._fs.exists(full_path) and self._fs.exists(f"{full_path}.tmp")):
                raise
            self._fs.rm_file(full_path)  # HDFS does not move a file onto another
            self._fs.mv(f"{full_path}.tmp", full_path)

    def create_exclusive(self, path: str, marker: str, content: bytes) -> None:
        """Make a directory with a file in it, which only one of several writers can do.

        HDFS and similar file systems do not guarantee that: they first look and then write.

        Raises:
            FileExistsError: Another writer was first.
        """
        full_path = self._full_path(path)
        if not self._is_local:
            self._create_marker(full_path, f"{full_path}/{marker}", content)
            return
        self._make_directory(full_path, 0o777)
        try:
            self.write(f"{path}/{marker}", content)
        except BaseException:
            self.remove(path)
            raise

    def _create_marker(self, full_path: str, marker: str, content: bytes) -> None:
        delays = iter(retries.DELAYS_S)
        is_retry = False
        while True:
            try:
                if not self._is_object_store:
                    self._fs.makedirs(full_path, exist_ok=True)
                self._fs.pipe_file(marker, content, mode="create")
                return
            except FileExistsError:
                read_marker = functools.partial(self._fs.cat_file, marker)
                if is_retry and retries.call(f"read {marker}", read_marker) == content:
                    return  # the try before wrote it, and its answer got lost
                raise
            except Exception as error:  # of any type, as stores' clients have their own
                retries.wait(f"write {marker}", error, delays)
                is_retry = True

    @retries.with_retries
    def make_private(self, path: str) -> None:
        """Make a directory that, on local disks, only its owner can read."""
        if self._is_local:
            self._make_directory(self._full_path(path), 0o700)
        elif not self._is_object_store:
            self._fs.makedirs(self._full_path(path), exist_ok=True)

    def _make_directory(self, full_path: str, mode: int) -> None:
        """Make a local directory that does not exist yet, and the directories above it."""
        for _ in range(100):
            os.makedirs(os.path.dirname(full_path), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process removed the empty one
                os.mkdir(full_path, mode)
                return
        raise FileNotFoundError(f"{os.path.dirname(full_path)} is removed again and again")

    def remove_file(self, path: str) -> None:
        """Remove a file.

        Raises:
            OSError: The file cannot be removed.
        """
        is_retry = False
        delays = iter(retries.DELAYS_S)
        while True:
            try:
                self._fs.rm_file(self._full_path(path))
                return
            except FileNotFoundError:
                if is_retry:  # the try before removed it, and its answer got lost
                    return
                raise
            except Exception as error:  # of any type, as stores' clients have their own
                retries.wait(f"remove {path}", error, delays)
                is_retry = True

    def remove(self, path: str) -> None:
        """Remove a file, or a directory with all that is in it; warn where that fails."""
        try:
            self._remove(path)
        except FileNotFoundError:
            pass  # a store without directories has no empty ones
        except OSError as error:
            logger.warning("%s could not be removed: %s", self._full_path(path), error)

    @retries.with_retries
    def _remove(self, path: str) -> None:
        self._fs.rm(self._full_path(path), recursive=True)

    def remove_empty(self, path: str) -> None:
        """Remove a local directory if it is empty; elsewhere removal may include content."""
        if self._is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self._full_path(path))

    def age(self, path: str) -> float | None:
        """Return the seconds since a file, or one in a directory, was written; None if unknown."""
        try:
            newest = self._last_modified(path)
        except (OSError, NotImplementedError, KeyError):
            # OSError: nothing is there, or another process removed it meanwhile.
            # NotImplementedError: the file system has no times. KeyError: it has no time for what
            # is not a file, such as S3's prefixes. What has no age is not removed as abandoned.
            return None
        age: float = (datetime.datetime.now(newest.tzinfo) - newest).total_seconds()
        return age

    @retries.with_retries
    def _last_modified(self, path: str) -> datetime.datetime:
        files = self._fs.find(self._full_path(path)) or [self._full_path(path)]
        newest: datetime.datetime = max(self._fs.modified(file) for file in files)
        return newest

    def target(self, path: str) -> str | None:
        """Return where a path leads if it, or an entry of it, is a link out of the root."""
        if not self._is_local:
            return None
        root = f"{os.path.realpath(self._root)}{os.sep}"
        paths = [
            self._full_path(path),
            *(self._full_path(f"{path}/{entry}") for entry in self.entries(path)),
        ]
        targets = map(os.path.realpath, paths)
        return next((target for target in targets if not target.startswith(root)), None)

    def _full_path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else str(self._root)


def _protocols(fs: fsspec.AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
