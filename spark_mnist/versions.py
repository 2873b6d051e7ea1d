"""Whether the installed packages are among those that work together.

The ranges are those of setup.cfg, read from the installed metadata: there is no second list.
"""

from __future__ import annotations

import functools
from importlib import metadata

from packaging.requirements import Requirement

from spark_mnist import errors


@functools.cache
def check() -> None:
    """Compare the installed packages with the ranges, once for a process.

    Raises:
        errors.VersionError: One is missing or outside its range; the message says which to install.
    """
    try:
        lines = metadata.requires("spark-mnist") or []
    except metadata.PackageNotFoundError:  # shipped as plain files: there is nothing to compare
        return
    faults = [fault for line in lines if (fault := _fault(Requirement(line)))]
    if not faults and not _has_tensorflow("horovod"):
        faults = ["horovod was built without TensorFlow, which its installer does not say"]
    if faults:
        raise errors.VersionError(
            f"spark_mnist cannot work with what is installed: {'; '.join(faults)}; its README "
            "says how to install what works"
        )


def _fault(wanted: Requirement) -> str | None:
    """What is wrong with one package, or None. Extras count where they are installed."""
    optional = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return None if optional else f"{wanted.name} is missing ({wanted.specifier})"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} {found} is installed, {wanted.specifier} works"


def _has_tensorflow(package: str) -> bool:
    """Whether a package's compiled part for TensorFlow is installed; imports neither."""
    files = metadata.files(package) or []
    return any("tensorflow/mpi_lib" in str(file) for file in files)
