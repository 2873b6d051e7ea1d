"""Files below one root, on any file system that fsspec opens. Runs on the driver and on rank 0.

All paths are relative to the root. What is written is seen whole or not at all.
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

BLOCK_BYTES = 8 << 20
"""Bytes of a file that are in memory at once while it is copied."""
PUT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
"""Protocols of stores without directories, on which a file is seen when it is whole."""


def _mounted(url: str) -> str:
    """``dbfs:/path`` as the path at which Databricks mounts it on every host."""
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
        # s3fs would keep what it once listed for as long as the process lives.
        self._fs, self._root = fsspec.core.url_to_fs(_mounted(url), use_listings_cache=False)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._flat = not PUT.isdisjoint(_protocols(self._fs))
        self.url: str = f"file://{self._root}" if self._local else url.rstrip("/")
        """The root with its scheme, as executors can use it."""

    @retries.retried
    def entries(self, path: str = "") -> list[str]:
        """Names in a directory, sorted; none where there is no directory."""
        try:
            listed = self._fs.ls(self._at(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(os.path.basename(entry.rstrip("/")) for entry in listed)

    @retries.retried
    def exist(self, path: str) -> bool:
        """Whether there is a file or directory."""
        return bool(self._fs.exists(self._at(path)))

    @retries.retried
    def read(self, path: str) -> bytes:
        """The content of a file."""
        content: bytes = self._fs.cat_file(self._at(path))
        return content

    def blocks(self, path: str) -> Iterator[bytes]:
        """Yield the content of a file in blocks."""
        done, tries = 0, iter(retries.DELAYS_S)
        while True:
            try:
                with self._fs.open(self._at(path), "rb") as file:
                    file.seek(done)
                    while block := file.read(BLOCK_BYTES):
                        done, tries = done + len(block), iter(retries.DELAYS_S)
                        yield block
                return
            except GeneratorExit:
                raise
            except Exception as error:  # of any type, as stores' clients have their own
                retries.wait(f"read {path}", error, tries)

    @retries.retried
    def write(self, path: str, content: bytes) -> None:
        """Write a file that is seen whole or not at all, as object stores do by themselves."""
        if self._local:
            self._write_locally(self._at(path), [content])
        else:
            self._write_elsewhere(self._at(path), content)

    @retries.retried
    def write_blocks(self, path: str, blocks: Callable[[], Iterable[bytes]]) -> None:
        """Write a file as ``write`` does, of blocks that need not be in memory at once.

        Args:
            path: Of the file.
            blocks: Gives its content; called again for another try.
        """
        if self._local:
            self._write_locally(self._at(path), blocks())
        else:
            self._write_blocks_elsewhere(self._at(path), blocks())

    def _write_locally(self, at: str, blocks: Iterable[bytes]) -> None:
        os.makedirs(os.path.dirname(at), exist_ok=True)
        with open(f"{at}.tmp", "wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{at}.tmp", at)
        with contextlib.suppress(OSError):  # some file systems cannot, or open no directory
            directory = os.open(os.path.dirname(at), os.O_RDONLY)
            try:
                os.fsync(directory)  # else a power cut may undo the rename
            finally:
                os.close(directory)

    def _write_elsewhere(self, at: str, content: bytes) -> None:
        if self._flat:
            self._fs.pipe_file(at, content)
            return
        self._fs.makedirs(os.path.dirname(at), exist_ok=True)
        self._fs.pipe_file(f"{at}.tmp", content)
        self._replace(at)

    def _write_blocks_elsewhere(self, at: str, blocks: Iterable[bytes]) -> None:
        temporary = at if self._flat else f"{at}.tmp"
        if not self._flat:
            self._fs.makedirs(os.path.dirname(at), exist_ok=True)
        with self._fs.open(temporary, "wb") as file:
            for block in blocks:
                file.write(block)
        if not self._flat:
            self._replace(at)

    def _replace(self, at: str) -> None:
        """Put what was written beside a file in its place."""
        try:
            self._fs.mv(f"{at}.tmp", at)
        except OSError:
            if not (self._fs.exists(at) and self._fs.exists(f"{at}.tmp")):
                raise
            self._fs.rm_file(at)  # HDFS moves nothing onto a file
            self._fs.mv(f"{at}.tmp", at)

    def create_exclusive(self, path: str, marker: str, content: bytes) -> None:
        """Make a directory with a file in it, which only one of several writers can do.

        HDFS and the like do not promise the latter: they first look and then write.

        Raises:
            FileExistsError: Another took it.
        """
        at = self._at(path)
        if not self._local:
            self._create_elsewhere(at, f"{at}/{marker}", content)
            return
        self._make(at, 0o777)
        try:
            self.write(f"{path}/{marker}", content)
        except BaseException:
            self.remove(path)
            raise

    def _create_elsewhere(self, at: str, marker: str, content: bytes) -> None:
        tries = iter(retries.DELAYS_S)
        again = False
        while True:
            try:
                if not self._flat:
                    self._fs.makedirs(at, exist_ok=True)
                self._fs.pipe_file(marker, content, mode="create")
                return
            except FileExistsError:
                read = functools.partial(self._fs.cat_file, marker)
                if again and retries.call(f"read {marker}", read) == content:
                    return  # the try before, whose answer got lost
                raise
            except Exception as error:  # of any type, as stores' clients have their own
                retries.wait(f"write {marker}", error, tries)
                again = True

    @retries.retried
    def make_private(self, path: str) -> None:
        """Make a directory that, on local disks, its owner alone can read."""
        if self._local:
            self._make(self._at(path), 0o700)
        elif not self._flat:
            self._fs.makedirs(self._at(path), exist_ok=True)

    def _make(self, at: str, mode: int) -> None:
        """Make a local directory that is not there yet, and those above it."""
        for _ in range(100):
            os.makedirs(os.path.dirname(at), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another has just removed the empty one
                os.mkdir(at, mode)
                return
        raise FileNotFoundError(f"{os.path.dirname(at)} is removed again and again")

    def remove_file(self, path: str) -> None:
        """Remove a file.

        Raises:
            OSError: It cannot be.
        """
        again = False
        tries = iter(retries.DELAYS_S)
        while True:
            try:
                self._fs.rm_file(self._at(path))
                return
            except FileNotFoundError:
                if again:  # the try before removed it, and its answer got lost
                    return
                raise
            except Exception as error:  # of any type, as stores' clients have their own
                retries.wait(f"remove {path}", error, tries)
                again = True

    def remove(self, path: str) -> None:
        """Remove a file, or a directory with all that is in it; warn where it cannot be."""
        try:
            self._remove(path)
        except FileNotFoundError:
            pass  # a store without directories keeps none that is empty
        except OSError as error:
            logger.warning("%s could not be removed: %s", self._at(path), error)

    @retries.retried
    def _remove(self, path: str) -> None:
        self._fs.rm(self._at(path), recursive=True)

    def remove_empty(self, path: str) -> None:
        """Remove a local directory if nothing is in it; elsewhere "remove" may mean with all."""
        if self._local:
            with contextlib.suppress(OSError):
                os.rmdir(self._at(path))

    def age(self, path: str) -> float | None:
        """Seconds since a file, or one in a directory, was written; None if it has no time."""
        try:
            newest = self._newest(path)
        except (OSError, NotImplementedError, KeyError):
            # OSError: nothing is there, or another removed it meanwhile. NotImplementedError: the
            # file system has no times. KeyError: it has none for what is no file, as S3's prefixes.
            # Without an age nothing is taken for left behind, so nothing is removed.
            return None
        age: float = (datetime.datetime.now(newest.tzinfo) - newest).total_seconds()
        return age

    @retries.retried
    def _newest(self, path: str) -> datetime.datetime:
        files = self._fs.find(self._at(path)) or [self._at(path)]
        newest: datetime.datetime = max(self._fs.modified(file) for file in files)
        return newest

    def target(self, path: str) -> str | None:
        """Where a path leads if it is a link, or holds one, that leads out of the root."""
        if not self._local:
            return None
        root = f"{os.path.realpath(self._root)}{os.sep}"
        below = [self._at(path), *(self._at(f"{path}/{entry}") for entry in self.entries(path))]
        targets = map(os.path.realpath, below)
        return next((target for target in targets if not target.startswith(root)), None)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else str(self._root)


def _protocols(fs: fsspec.AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
