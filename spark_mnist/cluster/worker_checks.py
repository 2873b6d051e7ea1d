"""Whether the Python of Spark's workers has what ranks need. Runs on: driver.

The function that looks runs in Spark's tasks, where the library may be missing: it is pickled by
value and uses the standard library alone.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyspark
from packaging.requirements import Requirement
from packaging.version import Version
from pyspark.sql import SparkSession

from spark_mnist import errors
from spark_mnist._version import __version__
from spark_mnist.cluster import slots
from spark_mnist.core import requirements

logger = logging.getLogger(__name__)

SCORING = ("keras", "pyarrow", "numpy", "pandas", "fsspec", "packaging")
"""Packages that scoring imports, beside TensorFlow and this one."""
TRAINING = (*SCORING, "horovod", "petastorm")
"""Those that ranks import."""
REMEDY = (
    "install them there, or let PYSPARK_PYTHON name a Python that has them before the session is "
    "made"
)
LEAST_BYTES = 2560 << 20
"""Address space in which TensorFlow can start and train; with 2,000 MiB it aborts."""
LINGER_S = 0.2
"""Seconds for which a task keeps its slot, so that every executor gets one."""
WORKER_ERRORS = (
    (
        re.compile(r'Cannot run program "([^"]*)"'),
        "Spark's workers cannot start {0!r}, which PYSPARK_PYTHON names: set it to a Python 3 that "
        "all hosts have, before the session is made",
    ),
    (
        re.compile(r"different version\W+(\d+)\W+(\d+)\D+(\d+)\W+(\d+)"),
        "Spark's workers run Python {0}.{1} and the driver {2}.{3}: set PYSPARK_PYTHON to a Python "
        "of the driver's minor version, before the session is made",
    ),
    (
        re.compile(r"(ModuleNotFoundError|ImportError): ([^\n]*)"),
        "the Python of Spark's workers cannot import what it needs ({1}): " + REMEDY,
    ),
)
"""What Spark's errors say of a worker that cannot start, and what to say in place of it."""


@dataclass(frozen=True)
class Worker:
    """The Python of one of Spark's workers."""

    host: str
    executable: str
    python: str
    """Version, as 3.13.0."""
    packages: Mapping[str, str | None]
    """Version by package, ``unknown`` where its files do not tell, None where it is missing."""
    horovod_target: str | None
    """The TensorFlow for which Horovod was compiled."""
    address_space: int | None = None
    """Bytes that a worker may map, by ``spark.executor.pyspark.memory``; None without a limit."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the Python of Spark's workers on {self.host}, {self.executable}"


_checked: dict[tuple[str, ...], list[Worker]] = {}
"""What was found of a set of executors, which need not be asked twice."""


def check(spark: SparkSession, libraries: Sequence[str] = TRAINING) -> list[Worker]:
    """Look at the Python of every executor, unless the same ones were looked at before.

    Args:
        spark: The session.
        libraries: Packages that they need.

    Returns:
        One worker for each host and Python.

    Raises:
        errors.ClusterError: A worker cannot start, lacks a package, or has one that does not go
            with the driver's or with the others. The message names PYSPARK_PYTHON.
    """
    key = (spark.sparkContext.applicationId, *libraries, *slots.executors(spark))
    if key in _checked:
        return _checked[key]
    found = {(worker.host, worker.executable): worker for worker in _look(spark, libraries)}
    workers = [found[place] for place in sorted(found)]
    ranges = requirements.ranges()
    for worker in workers:
        if faults := [*_faults(worker, ranges)]:
            raise errors.ClusterError(f"{worker.name}, {'; '.join(faults)}")
    for difference in sorted({text for worker in workers for text in _differences(worker)}):
        logger.warning("%s", difference)
    _checked[key] = workers
    return workers


def _look(spark: SparkSession, libraries: Sequence[str]) -> Iterable[Worker]:
    """Run the probe in a task for each slot, at once; raises as ``check``."""
    probe = _probe((*libraries, *requirements.TENSORFLOW_PACKAGES), LINGER_S)
    tasks = max(1, slots.slots(spark))
    try:
        probes = spark.sparkContext.parallelize(range(tasks), tasks).mapPartitions(probe)
        rows = slots.in_rank_workers(probes).collect()
    except Exception as error:  # Java's or PySpark's, by release
        raise errors.ClusterError(_worker_error(error)) from error
    return [Worker(*row) for row in rows]


def _worker_error(error: Exception) -> str:
    """Say in one line why Spark's workers could not run Python."""
    text = str(error)
    for pattern, words in WORKER_ERRORS:
        if match := pattern.search(text):
            return words.format(*match.groups())
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"Spark's workers cannot run Python ({first.strip()}): look at PYSPARK_PYTHON"


def _probe(names: Iterable[str], linger: float) -> Any:
    """Return the function that tasks run, made of the standard library alone."""
    names = tuple(names)

    def probe(_: Any) -> Iterator[tuple[Any, ...]]:
        import importlib.util
        import json
        import platform
        import resource
        import socket
        import sys
        import time
        from importlib import metadata

        def version(name: str) -> str | None:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                there = importlib.util.find_spec(name.removesuffix("-cpu").replace("-", "_"))
                return "unknown" if there else None

        def target() -> str | None:
            spec = importlib.util.find_spec("horovod")
            places = list(spec.submodule_search_locations or []) if spec else []
            for place in places:
                try:
                    with open(f"{place}/metadata.json") as file:
                        found: str | None = json.load(file).get("tensorflow")
                        return found
                except OSError:
                    continue
            return None

        packages = {name: version(name) for name in names}
        try:
            packages["spark-mnist"] = importlib.import_module("spark_mnist._version").__version__
        except ImportError:
            packages["spark-mnist"] = None
        packages["pyspark"] = importlib.import_module("pyspark").__version__
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        time.sleep(linger)
        yield (
            socket.gethostname(), sys.executable, platform.python_version(), packages, target(),
            None if limit == resource.RLIM_INFINITY else limit,
        )  # fmt: skip

    return probe


def _faults(worker: Worker, ranges: Mapping[str, Requirement]) -> Iterator[str]:
    """Say what is wrong with a worker's packages."""
    packages = dict(worker.packages)
    tensorflow = next(
        filter(None, (packages.pop(n) for n in requirements.TENSORFLOW_PACKAGES)), None
    )
    packages["tensorflow"] = tensorflow
    if worker.address_space is not None and worker.address_space < LEAST_BYTES:
        yield (
            f"may use {worker.address_space >> 20:,} MiB, by spark.executor.pyspark.memory shared "
            f"by the executor's cores, and TensorFlow needs {LEAST_BYTES >> 20:,}: give it that "
            "for each core, or leave it out, before the session is made"
        )
    missing = sorted(name for name, version in packages.items() if version is None)
    if missing:
        yield f"lacks {', '.join(missing)}: {REMEDY}"
        return
    for name, version in packages.items():
        asked = ranges.get(name)
        if asked and version != "unknown" and not asked.specifier.contains(str(version), True):
            yield f"has {name} {version}, and {asked.specifier} works: {REMEDY}"
    if "horovod" in packages and tensorflow != "unknown":
        yield from requirements.horovod_faults(tensorflow, worker.horovod_target)
    if Version(str(packages["pyspark"])).release[:2] != Version(pyspark.__version__).release[:2]:
        yield f"has PySpark {packages['pyspark']}, and the driver {pyspark.__version__}: use one"
    if packages["spark-mnist"] != __version__:
        yield f"has spark-mnist {packages['spark-mnist']}, and the driver {__version__}: use one"


def _differences(worker: Worker) -> Iterator[str]:
    """Say in which releases a worker differs from the driver, where both may work."""
    here = {name: requirements.installed(name) for name in ("keras", "numpy", "pandas", "pyarrow")}
    here |= {"tensorflow": requirements.tensorflow_version(), "Python": platform.python_version()}
    there = {**worker.packages, "Python": worker.python}
    there["tensorflow"] = there["tensorflow"] or there["tensorflow-cpu"]
    for name, version in here.items():
        if version and there[name] not in (version, "unknown"):
            yield f"{worker.name}, has {name} {there[name]}, and the driver {version}"
