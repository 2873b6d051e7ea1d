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
    if faults:
        raise errors.VersionError(
            f"packages that spark_mnist does not work with: {'; '.join(faults)}; install those "
            "that its README locks"
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
