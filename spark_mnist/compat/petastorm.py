"""Petastorm 0.13 on current pyarrow, numpy and Python. Runs on: driver, rank.

Petastorm imports names that pyarrow 15, numpy 2 and Python 3.12 have dropped. Petastorm's modules
are executed with an ``__import__`` of their own, which returns views of these libraries: everything
in them, and the dropped names in their present form. All other code sees the libraries unchanged.
Of pyarrow 14 only the list of files is replaced: pyarrow's own list refuses the filesystem that
opens files on S3.

When a release of Petastorm works without a name, delete the name's line in ``_dropped_names``; when
a release works without all of them, delete this module, and let its clients import Petastorm
themselves.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
import threading
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib import abc, machinery
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.arrow import HadoopFileSystem
from fsspec.implementations.local import LocalFileSystem
from packaging.version import Version

PACKAGE = "petastorm"

_INSTALLATION_LOCK = threading.Lock()


def module(name: str = PACKAGE) -> Any:
    """Import Petastorm, or one of its modules."""
    with _INSTALLATION_LOCK:
        _install()
    return importlib.import_module(name)


class DatasetPiece:
    """A Parquet file or one of its row groups, as pyarrow had it until version 14.

    Args:
        path: Path of the file.
        open_file_func: Function that opens a path for reading.
        row_group: Number of the row group in the file; None for the whole file.
        partition_keys: Partition keys of the file's directory; there are none here.
    """

    def __init__(
        self,
        path: str,
        open_file_func: Any = open,
        row_group: int | None = None,
        partition_keys: Sequence[Any] = (),
    ) -> None:
        self.path, self.row_group, self.partition_keys = path, row_group, partition_keys
        self._open = open_file_func

    def get_metadata(self) -> pq.FileMetaData:
        """Read the file's footer."""
        with self._open(self.path, "rb") as file:
            return pq.read_metadata(file)

    def read(self, columns: Iterable[str], partitions: object = None) -> pa.Table:
        """Read columns of the row group, or of all row groups, in the order of their names."""
        with self._open(self.path, "rb") as file:
            parquet = pq.ParquetFile(file)
            if self.row_group is None:
                return parquet.read(columns=sorted(columns))
            return parquet.read_row_group(self.row_group, columns=sorted(columns))


class Dataset:
    """A list of Parquet files, as pyarrow had it until version 14.

    Args:
        path_or_paths: Files; not directories, which Petastorm never gets here.
        filesystem: Filesystem that opens the files.
        **_: Options of Petastorm that a list of files does not need.
    """

    partitions = metadata = common_metadata = None

    def __init__(self, path_or_paths: str | Sequence[str], filesystem: Any, **_: Any) -> None:
        self.fs, self.paths = filesystem, path_or_paths
        paths = [path_or_paths] if isinstance(path_or_paths, str) else path_or_paths
        self.pieces = [DatasetPiece(path, filesystem.open) for path in paths]


class HdfsClient:
    """Interface with the calls that Petastorm makes to HDFS.

    Petastorm's client for several name nodes is a subclass, which replaces each method that it
    finds here by one that passes the call on to a client that ``connect_hdfs`` returned. So none of
    these runs.
    """

    def open(self, path: str, mode: str = "rb") -> Any:
        """Open a file."""
        raise NotImplementedError

    def exists(self, path: str) -> bool:
        """Return whether there is a file or directory."""
        raise NotImplementedError

    def delete(self, path: str, recursive: bool = False) -> None:
        """Delete a file or directory."""
        raise NotImplementedError


def connect_hdfs(host: str, port: int, user: str | None = None) -> HadoopFileSystem:
    """Connect to a name node of HDFS."""
    return HadoopFileSystem(host, port, user=user)


def _dropped_names() -> dict[str, dict[str, Any]]:
    """Return all names that Petastorm needs and newer libraries lack, by module."""
    return {
        "distutils.version": {"LooseVersion": Version},
        "numpy": {"in1d": np.isin, "string_": np.bytes_, "unicode_": np.str_},
        "pyarrow": {"LocalFileSystem": LocalFileSystem, "localfs": LocalFileSystem()},
        "pyarrow.filesystem": {"LocalFileSystem": LocalFileSystem},
        "pyarrow.hdfs": {"HadoopFileSystem": HdfsClient, "connect": connect_hdfs},
        "pyarrow.lib": {"ArrowIOError": OSError},
        "pyarrow.parquet": {"ParquetDataset": Dataset, "ParquetDatasetPiece": DatasetPiece},
    }


def _missing_names() -> dict[str, dict[str, Any]]:
    """Return the names of ``_dropped_names`` that the libraries lack, or that do not work."""
    names = _dropped_names()
    if sys.version_info < (3, 12):
        del names["distutils.version"]
    if hasattr(pq, "ParquetDatasetPiece"):  # pyarrow 14, which has all names
        names = {
            name: members
            for name, members in names.items()
            if "pyarrow" not in name or name == "pyarrow.parquet"
        }
    numpy = names["numpy"]
    names["numpy"] = {key: value for key, value in numpy.items() if not hasattr(np, key)}
    return {name: members for name, members in names.items() if members}


def _module_or_none(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _view(name: str, members: Mapping[str, Any]) -> types.ModuleType:
    """Return a module with some members of its own, and all other members of the library's."""
    view = types.ModuleType(name)
    if name.partition(".")[0] != "distutils" and (library := _module_or_none(name)):
        view.__dict__["__getattr__"] = functools.partial(getattr, library)
    view.__dict__.update(members)
    return view


def _views(missing: Mapping[str, Mapping[str, Any]]) -> dict[str, types.ModuleType]:
    """Return views of the modules that lack names, and of the packages that contain them."""
    packages: dict[str, dict[str, Any]] = {name.partition(".")[0]: {} for name in missing}
    views = {name: _view(name, members) for name, members in {**packages, **missing}.items()}
    for name, view in views.items():
        package, _, member = name.partition(".")
        if member:
            setattr(views[package], member, view)
    return views


class _Loader(abc.Loader):
    """Loader that executes a module of Petastorm's with an ``__import__`` of its own.

    Args:
        loader: Loader that does everything else.
        views: Modules that this ``__import__`` finds before all others.
    """

    def __init__(self, loader: Any, views: Mapping[str, types.ModuleType]) -> None:
        self._loader, self._views = loader, views

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: machinery.ModuleSpec) -> types.ModuleType | None:
        """Leave the module to the usual loader."""
        new_module: types.ModuleType | None = self._loader.create_module(spec)
        return new_module

    def exec_module(self, module: types.ModuleType) -> None:
        """Execute the module's code; the module's functions import in the same way later."""
        module_builtins = {**vars(builtins), "__import__": self._import}
        module.__dict__["__builtins__"] = module_builtins
        self._loader.exec_module(module)

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        module_name = name if fromlist else name.partition(".")[0]
        if level == 0 and module_name in self._views:
            return self._views[module_name]
        return builtins.__import__(name, globals, locals, fromlist or (), level)


class _Finder(abc.MetaPathFinder):
    """Finder that finds Petastorm's modules in their usual place, and gives them ``_Loader``."""

    def __init__(self, views: Mapping[str, types.ModuleType]) -> None:
        self._views = views

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> machinery.ModuleSpec | None:
        """Return the usual spec with another loader, for Petastorm alone."""
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader, self._views)
        return spec


@functools.cache
def _install() -> None:
    """Make Petastorm find the names that it needs, once for a process."""
    missing = _missing_names()
    if not missing:
        return
    # Modules that an earlier, failed import of Petastorm has loaded do not have the views.
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(_views(missing)))
