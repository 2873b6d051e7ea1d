"""Check that the installed packages work together. Runs on: driver.

The ranges are those of setup.cfg and of the installed PySpark. They are read from the installed
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
"""Extras that bring TensorFlow, in different packages; a driver may do without TensorFlow."""
TENSORFLOW_PACKAGES = ("tensorflow", "tensorflow-cpu")

NUMPY_2_PYARROW = Version("26")
"""First version of pyarrow that does not work with numpy 1."""

PANDAS_WARNING = "PySpark does not yet fully support pandas"
"""Beginning of the warning that PySpark 4.3 gives for pandas 3 at each use.

The functions that this library uses work with pandas 3.
"""


def ignore_new_pandas() -> None:
    """Add a filter for PySpark's warning of pandas 3 to the filters of the process."""
    warnings.filterwarnings("ignore", PANDAS_WARNING, FutureWarning)


@functools.cache
def check() -> None:
    """Compare the installed packages with the ranges, once in each process.

    Raises:
        errors.VersionError: A package is missing, outside its range, or incompatible with another;
            the message says which to install.
    """
    try:
        requirements = [*_requirements("")]
    except metadata.PackageNotFoundError:  # shipped as plain files, without metadata to compare
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
        errors.VersionError: A package is missing or outside its range.
    """
    try:
        faults = [*_faults(_requirements(extra))]
    except metadata.PackageNotFoundError:
        return
    if faults:
        raise errors.VersionError(f"{'; '.join(faults)}; install spark-mnist[{extra}]")


def ranges() -> dict[str, Requirement]:
    """Return the range in setup.cfg of each package that ranks need, by name; {} where unknown."""
    try:
        requirements = [
            requirement
            for extra in ("", *TENSORFLOW_EXTRAS)
            for requirement in _requirements(extra)
        ]
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name: requirement for requirement in requirements}


def tensorflow_version() -> str | None:
    """Return the version of the installed TensorFlow, whichever package brought it."""
    return next(filter(None, map(installed, TENSORFLOW_PACKAGES)), None)


def built_for() -> str | None:
    """Return the version of TensorFlow for which Horovod was compiled; None where for none.

    Import neither of them. Where Horovod's files are not listed, return the installed version.
    """
    for file in metadata.files("horovod") or []:
        if str(file) == "horovod/metadata.json":
            return horovod_target(Path(str(file.locate())).read_text())
    return tensorflow_version()


def horovod_target(text: str) -> str | None:
    """Return the version of TensorFlow that Horovod's ``metadata.json`` names, if any."""
    build_info: dict[str, str] = json.loads(text)
    return build_info.get("tensorflow")


def _numpy_faults(pyarrow: str | None, numpy: str | None) -> Iterator[str]:
    """Describe why pyarrow cannot be imported with this numpy, which its metadata does not tell."""
    if pyarrow and numpy and Version(pyarrow) >= NUMPY_2_PYARROW and Version(numpy).major < 2:
        yield (
            f"pyarrow {pyarrow} needs numpy>=2 and {numpy} is installed, as TensorFlow up to 2.17 "
            f"needs it: install pyarrow<{NUMPY_2_PYARROW}"
        )


def horovod_faults(tensorflow: str | None, target: str | None) -> Iterator[str]:
    """Describe the fault of a Horovod that was compiled for another TensorFlow, or for none."""
    if target is None:
        yield "horovod was built without TensorFlow, which its installer does not say"
    elif tensorflow and Version(tensorflow).release[:2] != Version(target).release[:2]:
        yield (
            f"horovod was built for TensorFlow {target} and {tensorflow} is installed: build it "
            "again, with pip's --no-cache-dir"
        )


def _requirements(extra: str) -> Iterator[Requirement]:
    """Yield the requirements that an extra adds; the extra "" has those that always apply.

    Raises:
        metadata.PackageNotFoundError: This library is shipped as plain files.
    """
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        if _applies(requirement, extra) and not (extra and _applies(requirement, "")):
            yield requirement


def _applies(requirement: Requirement, extra: str) -> bool:
    """Return whether a requirement applies to an extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _faults(
    requirements: Iterator[Requirement] | list[Requirement], *, may_be_missing: bool = False
) -> Iterator[str]:
    """Describe the fault of each package that does not meet its requirement."""
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
    """Describe the faults of what a package needs for its own extras, as PySpark does."""
    for line in metadata.requires(requirement.name) or []:
        dependency = Requirement(line)
        applies = any(_applies(dependency, extra) for extra in requirement.extras)
        other_version = installed(dependency.name)
        if (
            applies
            and other_version
            and not dependency.specifier.contains(other_version, prereleases=True)
        ):
            yield (
                f"{requirement.name} {version} needs {dependency.name}{dependency.specifier} and "
                f"{other_version} is installed: change one of the two"
            )


def installed(name: str) -> str | None:
    """Return the version of a package, or None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
