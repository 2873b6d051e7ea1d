"""Whether the installed packages are among those that work together. Runs on: driver.

The ranges are those of setup.cfg, and of the PySpark that is there, read from the installed
metadata: there is no second list.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from spark_mnist import errors

PACKAGE = "spark-mnist"
TENSORFLOW_EXTRAS = ("cpu", "gpu")
"""The extras that bring TensorFlow, by one package or another; a driver may do without."""
TENSORFLOW_PACKAGES = ("tensorflow", "tensorflow-cpu")

NUMPY_2_PYARROW = Version("26")
"""The first pyarrow that does not work with numpy 1."""

NEW_PANDAS = "PySpark does not yet fully support pandas"
"""How PySpark 4.3 warns of pandas 3 at each use; what is used of it here works."""


def ignore_new_pandas() -> None:
    """Add a filter for that warning to those of the process."""
    warnings.filterwarnings("ignore", NEW_PANDAS, FutureWarning)


@functools.cache
def check() -> None:
    """Compare the installed packages with the ranges, once for a process.

    Raises:
        errors.VersionError: One is missing, outside its range, or does not go with another; the
            message says which to install.
    """
    try:
        requirements = [*_requirements("")]
    except metadata.PackageNotFoundError:  # shipped as plain files: there is nothing to compare
        return
    faults = [*_faults(requirements)]
    for extra in TENSORFLOW_EXTRAS:
        faults += _faults(_requirements(extra), may_be_missing=True)
    if not faults:
        faults = [*_numpy_faults(installed("pyarrow"), installed("numpy"))]
    if not faults:
        faults = [*horovod_faults(tensorflow_version(), built_for())]
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
        faults = [*_faults(_requirements(extra))]
    except metadata.PackageNotFoundError:
        return
    if faults:
        raise errors.VersionError(f"{'; '.join(faults)}; install spark-mnist[{extra}]")


def ranges() -> dict[str, Requirement]:
    """Return what setup.cfg asks of each package that ranks need, by name; {} where unknown."""
    try:
        found = [line for extra in ("", *TENSORFLOW_EXTRAS) for line in _requirements(extra)]
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name: requirement for requirement in found}


def tensorflow_version() -> str | None:
    """Return the version of the installed TensorFlow, whichever package brought it."""
    return next(filter(None, map(installed, TENSORFLOW_PACKAGES)), None)


def built_for() -> str | None:
    """Return the TensorFlow for which the installed Horovod was compiled; None for no TensorFlow.

    Imports neither. Where Horovod's files are not listed, it is taken to fit.
    """
    for file in metadata.files("horovod") or []:
        if str(file) == "horovod/metadata.json":
            return horovod_target(Path(str(file.locate())).read_text())
    return tensorflow_version()


def horovod_target(text: str) -> str | None:
    """Return the TensorFlow that Horovod's ``metadata.json`` names, if any."""
    found: dict[str, str] = json.loads(text)
    return found.get("tensorflow")


def _numpy_faults(pyarrow: str | None, numpy: str | None) -> Iterator[str]:
    """Say what is wrong where pyarrow cannot be imported, which its metadata does not tell."""
    if pyarrow and numpy and Version(pyarrow) >= NUMPY_2_PYARROW and Version(numpy).major < 2:
        yield (
            f"pyarrow {pyarrow} needs numpy>=2 and {numpy} is installed, as TensorFlow up to 2.17 "
            f"needs it: install pyarrow<{NUMPY_2_PYARROW}"
        )


def horovod_faults(tensorflow: str | None, target: str | None) -> Iterator[str]:
    """Say what is wrong where Horovod was compiled for another TensorFlow, or for none."""
    if target is None:
        yield "horovod was built without TensorFlow, which its installer does not say"
    elif tensorflow and Version(tensorflow).release[:2] != Version(target).release[:2]:
        yield (
            f"horovod was built for TensorFlow {target} and {tensorflow} is installed: build it "
            "again, with pip's --no-cache-dir"
        )


def _requirements(extra: str) -> Iterator[Requirement]:
    """Yield what an extra adds; "" names what is always needed.

    Raises:
        metadata.PackageNotFoundError: The package itself is shipped as plain files.
    """
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        if _applies(requirement, extra) and not (extra and _applies(requirement, "")):
            yield requirement


def _applies(requirement: Requirement, extra: str) -> bool:
    """Return whether a package is needed where an extra is."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _faults(
    requirements: Iterator[Requirement] | list[Requirement], *, may_be_missing: bool = False
) -> Iterator[str]:
    """Say what is wrong with each package that is not as it is needed."""
    for requirement in requirements:
        version = installed(requirement.name)
        if version is None:
            if not may_be_missing:
                yield f"{requirement.name} is missing ({requirement.specifier})"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is installed, {requirement.specifier} works"
        else:
            yield from _pair_faults(requirement, version)


def _pair_faults(requirement: Requirement, version: str) -> Iterator[str]:
    """Say what does not go with a package that is needed with extras of its own, as PySpark is."""
    for line in metadata.requires(requirement.name) or []:
        needed = Requirement(line)
        wanted = any(_applies(needed, extra) for extra in requirement.extras)
        found = installed(needed.name)
        if wanted and found and not needed.specifier.contains(found, prereleases=True):
            yield (
                f"{requirement.name} {version} needs {needed.name}{needed.specifier} and "
                f"{found} is installed: change one of the two"
            )


def installed(name: str) -> str | None:
    """Return the version of a package, or None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
