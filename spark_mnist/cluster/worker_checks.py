"""Checks of the Python of Spark's workers: its packages and memory. Runs on: driver.

The probe alone runs in Spark tasks, where this library may be missing: the probe is pickled by
value and uses only the standard library.
"""

from __future__ import annotations

import collections
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
from spark_mnist.core import host_names, requirements

logger = logging.getLogger(__name__)

SCORING = ("keras", "pyarrow", "numpy", "pandas", "fsspec", "packaging")
"""Packages that scoring imports, beside TensorFlow and this one."""
TRAINING = (*SCORING, "horovod", "petastorm")
"""Packages that ranks import."""
REMEDY = (
    "install them there, or let PYSPARK_PYTHON name a Python that has them before the session is "
    "made"
)
MIN_ADDRESS_SPACE_BYTES = 2560 << 20
"""Bytes of address space in which TensorFlow can start and train; with 2,000 MiB it aborts."""
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
"""Patterns of Spark's errors about workers that cannot start, each with our message for it."""


@dataclass(frozen=True)
class Worker:
    """The Python of one of Spark's workers."""

    host: str
    executable: str
    python: str
    """Version of Python, for example 3.13.0."""
    packages: Mapping[str, str | None]
    """Version by package: ``unknown`` for a package without metadata, None for a missing one."""
    horovod_target: str | None
    """Version of TensorFlow for which Horovod was compiled; None where for none."""
    address_space: int | None = None
    """Bytes of address space by ``spark.executor.pyspark.memory``; None without a limit."""
    address: str = ""
    """Address by which the host reaches the driver; empty where it is not known."""
    name_address: str | None = ""
    """Address that Gloo takes for the host's name; None where it finds none, empty if unknown."""
    keeps_interface: bool = False
    """Whether the names of hosts do not matter to this Horovod."""

    @property
    def name(self) -> str:
        """Name of the worker in messages."""
        return f"the Python of Spark's workers on {self.host}, {self.executable}"


_worker_cache: dict[tuple[str, ...], list[Worker]] = {}
"""Workers by application, packages and executors, so that no executor is probed twice."""


def check(spark: SparkSession, libraries: Sequence[str] = TRAINING) -> list[Worker]:
    """Check the Python of every executor, unless the same executors were checked before.

    Args:
        spark: The session.
        libraries: Packages that workers need.

    Returns:
        One worker for each host and Python.

    Raises:
        errors.ClusterError: A worker cannot start, lacks a package, or has a package that is
            incompatible with the driver or with other packages. The message names PYSPARK_PYTHON.
    """
    key = (spark.sparkContext.applicationId, *libraries, *slots.executors(spark))
    if key in _worker_cache:
        return _worker_cache[key]
    workers_by_python = {
        (worker.host, worker.address, worker.executable): worker
        for worker in _run_probes(spark, libraries)
    }
    workers = [workers_by_python[python] for python in sorted(workers_by_python)]
    ranges = requirements.ranges()
    for worker in workers:
        if faults := [*_faults(worker, ranges)]:
            raise errors.ClusterError(f"{worker.name}, {'; '.join(faults)}")
    for difference in sorted({text for worker in workers for text in _differences(worker)}):
        logger.warning("%s", difference)
    _worker_cache[key] = workers
    return workers


def check_names(workers: Sequence[Worker], ranks: int) -> None:
    """Check the names of hosts on which ranks may start.

    Args:
        workers: Result of ``check``.
        ranks: Number of ranks.

    Raises:
        errors.ClusterError: A name has no address, or one at which ranks of other hosts would not
            find this host.
    """
    if faults := [*_name_faults(workers, ranks)]:
        raise errors.ClusterError("; ".join(faults))


def _run_probes(spark: SparkSession, libraries: Sequence[str]) -> Iterable[Worker]:
    """Run the probe in as many tasks at the same time as there are slots.

    Raises:
        errors.ClusterError: A worker cannot start.
    """
    driver = spark.conf.get("spark.driver.host", None) or "127.0.0.1"
    probe = _probe((*libraries, *requirements.TENSORFLOW_PACKAGES), slots.PROBE_HOLD_S, driver)
    tasks = max(1, slots.slots(spark))
    try:
        probes = spark.sparkContext.parallelize(range(tasks), tasks).mapPartitions(probe)
        rows = slots.in_rank_workers(probes).collect()
    except Exception as error:  # Java's or PySpark's, by release
        raise errors.ClusterError(_worker_error(error)) from error
    return [Worker(*row) for row in rows]


def _worker_error(error: Exception) -> str:
    """Return one line that says why Spark's workers could not run Python."""
    text = str(error)
    for pattern, message in WORKER_ERRORS:
        if match := pattern.search(text):
            return message.format(*match.groups())
    first_line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"Spark's workers cannot run Python ({first_line.strip()}): look at PYSPARK_PYTHON"


def _probe(names: Iterable[str], linger_s: float, driver: str) -> Any:
    """Return the function that tasks run, which uses only the standard library, and ours if there.

    Args:
        names: Packages whose versions the function returns.
        linger_s: Seconds for which the task keeps its slot.
        driver: Host of the driver.
    """
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
                spec = importlib.util.find_spec(name.removesuffix("-cpu").replace("-", "_"))
                return "unknown" if spec else None

        def horovod_target() -> str | None:
            spec = importlib.util.find_spec("horovod")
            directories = list(spec.submodule_search_locations or []) if spec else []
            for directory in directories:
                try:
                    with open(f"{directory}/metadata.json") as file:
                        tensorflow: str | None = json.load(file).get("tensorflow")
                        return tensorflow
                except OSError:
                    continue
            return None

        packages = {name: version(name) for name in names}
        try:
            packages["spark-mnist"] = importlib.import_module("spark_mnist._version").__version__
        except ImportError:
            packages["spark-mnist"] = None
        network: tuple[str, str | None, bool] = "", "", False
        try:
            own = importlib.import_module("spark_mnist.core.host_names")
            network = own.address_towards(driver), own.name_address(), own.keeps_interface()
        except ImportError:  # told as a missing package, or as another version
            pass
        packages["pyspark"] = importlib.import_module("pyspark").__version__
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        time.sleep(linger_s)
        yield (
            socket.gethostname(), sys.executable, platform.python_version(), packages,
            horovod_target(), None if limit == resource.RLIM_INFINITY else limit, *network,
        )  # fmt: skip

    return probe


def _faults(worker: Worker, ranges: Mapping[str, Requirement]) -> Iterator[str]:
    """Describe each fault of a worker: too little memory, and wrong packages."""
    packages = dict(worker.packages)
    tensorflow = next(
        filter(None, (packages.pop(name) for name in requirements.TENSORFLOW_PACKAGES)), None
    )
    packages["tensorflow"] = tensorflow
    if worker.address_space is not None and worker.address_space < MIN_ADDRESS_SPACE_BYTES:
        yield (
            f"may use {worker.address_space >> 20:,} MiB, by spark.executor.pyspark.memory shared "
            f"by the executor's cores, and TensorFlow needs {MIN_ADDRESS_SPACE_BYTES >> 20:,}: "
            "give it that for each core, or leave it out, before the session is made"
        )
    missing_names = sorted(name for name, version in packages.items() if version is None)
    if missing_names:
        yield f"lacks {', '.join(missing_names)}: {REMEDY}"
        return
    for name, version in packages.items():
        requirement = ranges.get(name)
        if (
            requirement
            and version != "unknown"
            and not requirement.specifier.contains(str(version), True)
        ):
            yield f"has {name} {version}, and {requirement.specifier} works: {REMEDY}"
    if "horovod" in packages and tensorflow != "unknown":
        yield from requirements.horovod_faults(tensorflow, worker.horovod_target)
    if Version(str(packages["pyspark"])).release[:2] != Version(pyspark.__version__).release[:2]:
        yield f"has PySpark {packages['pyspark']}, and the driver {pyspark.__version__}: use one"
    if packages["spark-mnist"] != __version__:
        yield f"has spark-mnist {packages['spark-mnist']}, and the driver {__version__}: use one"


def _name_faults(workers: Sequence[Worker], ranks: int) -> Iterator[str]:
    """Describe the hosts whose names keep ranks from starting, or from reaching each other."""
    has_several_hosts = ranks > 1 and len({worker.address for worker in workers}) > 1
    workers = [worker for worker in workers if not worker.keeps_interface]
    places = {(worker.address, worker.name_address) for worker in workers}
    num_hosts = collections.Counter(name_address for _, name_address in places)
    for worker in workers:
        if worker.name_address is None:
            yield host_names.no_address(worker.host, worker.address or "127.0.0.1")
        elif (
            has_several_hosts
            and worker.name_address
            and (host_names.is_loopback(worker.name_address) or num_hosts[worker.name_address] > 1)
        ):
            yield (
                f"the name of host {worker.host} resolves to {worker.name_address} there, where "
                "the Horovod there would listen and no other host reaches it: "
                f"{host_names.remedy(worker.host, worker.address)}"
            )


def _differences(worker: Worker) -> Iterator[str]:
    """Describe the versions in which a worker differs from the driver, where both may work."""
    driver_versions = {
        name: requirements.installed(name) for name in ("keras", "numpy", "pandas", "pyarrow")
    }
    driver_versions |= {
        "tensorflow": requirements.tensorflow_version(),
        "Python": platform.python_version(),
    }
    worker_versions = {**worker.packages, "Python": worker.python}
    worker_versions["tensorflow"] = (
        worker_versions["tensorflow"] or worker_versions["tensorflow-cpu"]
    )
    for name, version in driver_versions.items():
        if version and worker_versions[name] not in (version, "unknown"):
            yield f"{worker.name}, has {name} {worker_versions[name]}, and the driver {version}"
