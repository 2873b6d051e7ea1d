"""Whether the installed packages are among those that work together.

The ranges are those of setup.cfg, read from the installed metadata: there is no second list.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from spark_mnist import errors

TENSORFLOW = ("cpu", "gpu")
"""The extras that bring TensorFlow, by one package or another; a driver may do without."""


@functools.cache
def check() -> None:
    """Compare the installed packages with the ranges, once for a process.

    Raises:
        errors.VersionError: One is missing or outside its range; the message says which to install.
    """
    try:
        faults = [*_faults("")]
    except metadata.PackageNotFoundError:  # shipped as plain files: there is nothing to compare
        return
    faults += [fault for extra in TENSORFLOW for fault in _faults(extra, may_be_missing=True)]
    if not faults and not _has_tensorflow("horovod"):
        faults = ["horovod was built without TensorFlow, which its installer does not say"]
    if faults:
        raise errors.VersionError(
            f"spark_mnist cannot work with what is installed: {'; '.join(faults)}; its README "
            "says how to install what works"
        )


def check_extra(extra: str) -> None:
    """Compare the packages of an extra with their ranges.

    Raises:
        errors.VersionError: One is missing or outside its range.
    """
    try:
        faults = [*_faults(extra)]
    except metadata.PackageNotFoundError:
        return
    if faults:
        raise errors.VersionError(f"{'; '.join(faults)}: install spark-mnist[{extra}]")


def _faults(extra: str, *, may_be_missing: bool = False) -> Iterator[str]:
    """What is wrong with the packages that an extra adds; "" names those that are always needed."""
    for line in metadata.requires("spark-mnist") or []:
        wanted = Requirement(line)
        added = _applies(wanted, extra) and not (extra and _applies(wanted, ""))
        if added and (fault := _fault(wanted, may_be_missing)):
            yield fault


def _applies(wanted: Requirement, extra: str) -> bool:
    """Whether a package is wanted where an extra is."""
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _fault(wanted: Requirement, may_be_missing: bool) -> str | None:
    """What is wrong with one package, or None."""
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return None if may_be_missing else f"{wanted.name} is missing ({wanted.specifier})"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} {found} is installed, {wanted.specifier} works"


def _has_tensorflow(package: str) -> bool:
    """Whether a package's compiled part for TensorFlow is installed; imports neither."""
    files = metadata.files(package) or []
    return any("tensorflow/mpi_lib" in str(file) for file in files)
