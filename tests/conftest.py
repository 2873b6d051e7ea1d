"""One Spark session for all tests: real, local, two slots. Its workers run this Python."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyspark
import pytest

os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Spark's classes come from an archive where make has made one, and JVMs of programs end before
# optimized code would pay.
os.environ.setdefault(
    "SPARK_SUBMIT_OPTS",
    f"-Xlog:disable -XX:SharedArchiveFile={sys.prefix}/spark-classes.jsa "
    "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC "
    "-Dspark.executor.extraJavaOptions=-XX:TieredStopAtLevel=1",
)
os.environ["UNRELATED_TOKEN"] = "ranks must not see it"

from pyspark.sql import DataFrame, SparkSession

from spark_mnist.core import plan

REPOSITORY = Path(__file__).parent.parent
LAUNCHER = "spark.mnist.launcher"
PROGRAMS = REPOSITORY / "tests" / "programs"
"""Folder of the programs that tests run in a process of their own."""
os.environ["PYTHONPATH"] = os.pathsep.join(  # Spark's workers, which run elsewhere, find the tests
    [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
)
COLUMNS = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
FLOWERS = {
    "features": COLUMNS, "label": "species", "network": "dnn", "hidden": "10,20,10",
    "epochs": 60, "batch_size": 16, "learning_rate": 0.003, "verbose": 0,
}  # fmt: skip
"""Columns of the iris, and options that learn them."""
CACHES = re.compile(
    r"^!! (build|dist)/|__pycache__|\.(pytest|mypy|ruff)_cache|\.hypothesis|\.coverage|\.venv|\.cache|egg-info"
)
"""Ignored paths that tools write, not tests."""


class CaseCounter:
    """Counter of cases, where one test runs many of them."""

    full = False
    """Whether to run all cases, not only the quick ones."""
    counts: ClassVar[dict[str, tuple[int, int]]] = {}
    """Numbers of cases that ran and that passed, by description."""

    def __init__(self, what: str) -> None:
        self._what = what

    def add(self, passed: bool = True) -> None:
        tried, good = self.counts.get(self._what, (0, 0))
        self.counts[self._what] = (tried + 1, good + passed)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the slow tests, and all cases of each")


def pytest_configure(config: pytest.Config) -> None:
    CaseCounter.full = config.getoption("--all")
    for marker in (
        "slow: run with --all only, as make faults does",
        "ranks: starts ranks, or programs with sessions of their own",
        "spark: on the session of the tests, ranks in this process; set by itself",
        "unit: without a JVM; set by itself",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("ranks"):
            item.add_marker("spark" if "spark" in getattr(item, "fixturenames", ()) else "unit")
    if not CaseCounter.full:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def checkout_status() -> str:
    """Return git's status of the checkout with ignored files; empty outside of a repository."""
    status = ["git", "status", "--porcelain", "--ignored", "--untracked-files=all"]
    done = subprocess.run(status, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return "\n".join(sorted(line for line in lines if not CACHES.search(line)))


@pytest.fixture(scope="session", autouse=True)
def the_checkout_stays_as_it_is() -> Iterator[None]:
    """No test, and nothing that the README shows, writes into the checkout."""
    before = checkout_status()
    yield
    assert checkout_status() == before


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    options = os.environ["SPARK_SUBMIT_OPTS"]
    os.environ["SPARK_SUBMIT_OPTS"] = options.partition(" -XX:Tiered")[0]  # it lives long
    with contextlib.chdir(tmp_path_factory.mktemp("jvm")):  # where Spark puts relative paths
        session = _session(tmp_path_factory)
    os.environ["SPARK_SUBMIT_OPTS"] = options
    yield session
    session.stop()


def _session(tmp_path_factory: pytest.TempPathFactory) -> SparkSession:
    session = (
        SparkSession.builder.master("local[2]")
        .appName("spark_mnist tests")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
        .config(LAUNCHER, "in-process")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    return session


@contextlib.contextmanager
def _ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let fits start ranks where the test, or its module, is marked so."""
    if not request.node.get_closest_marker("ranks"):
        yield
        return
    session = request.getfixturevalue("spark")
    before = session.conf.get(LAUNCHER)
    session.conf.set(LAUNCHER, "spark")
    yield
    session.conf.set(LAUNCHER, before)


@pytest.fixture
def on_spark(spark: SparkSession) -> Iterator[None]:
    """Let fits check what they would check for ranks; no rank is started."""
    before = spark.conf.get(LAUNCHER)
    spark.conf.set(LAUNCHER, "spark")
    yield
    spark.conf.set(LAUNCHER, before)


@pytest.fixture(scope="module", autouse=True)
def ranks_of_module(request: pytest.FixtureRequest) -> Iterator[None]:
    with _ranks(request) if _uses_session(request) else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def ranks_of_test(request: pytest.FixtureRequest) -> Iterator[None]:
    with _ranks(request) if "spark" in request.fixturenames else contextlib.nullcontext():
        yield


def _uses_session(request: pytest.FixtureRequest) -> bool:
    """Return whether any test of a module uses the session of the tests."""
    items = [item for item in request.session.items if item.path == request.node.path]
    return any("spark" in getattr(item, "fixturenames", ()) for item in items)


@pytest.fixture(scope="session")
def digits(spark: SparkSession) -> DataFrame:
    """256 real digits, in an order that says nothing about their labels."""
    from spark_mnist import datasets

    return datasets.digits(spark, "train").limit(256).repartition(3).cache()


@pytest.fixture(scope="session")
def held_out(spark: SparkSession) -> DataFrame:
    """364 real digits that no test trains on."""
    from spark_mnist import datasets

    return datasets.digits(spark, "test").repartition(3).cache()


@pytest.fixture(scope="session")
def root(digits: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with one model, ``m``, that was trained to read digits."""
    import spark_mnist

    url = str(tmp_path_factory.mktemp("models"))
    options = {"launcher": "in-process", "store": url, "verbose": 0}
    spark_mnist.fit(digits, "m", epochs=15, batch_size=16, **options)
    return url


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "models")


def spark_home(path: Path) -> Path:
    """Make a SPARK_HOME: local-cluster writes its executors' files there."""
    path.mkdir()
    for part in ("bin", "jars", "sbin", "python"):
        (path / part).symlink_to(Path(pyspark.__file__).parent / part)
    return path


def arrays(store: str, name: str, version: int, file: str = "weights.npz") -> list[np.ndarray]:
    """The arrays of a published version, straight from its file."""
    path = Path(store) / name / f"v{version:06d}" / file
    with np.load(path, allow_pickle=False) as saved:
        return [saved[key] for key in sorted(saved.files, key=int)]


def manifest(store: str, name: str, version: int = 1) -> dict[str, Any]:
    """Read the manifest of a version."""
    path = Path(store) / name / f"v{version:06d}" / "manifest.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def custom_model() -> Any:
    """Return a model with a layer class of the user's own."""
    import keras
    from keras import layers

    class Scale(layers.Layer):
        def build(self, shape: Any) -> None:
            self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

        def call(self, x: Any) -> Any:
            return x * self.factor

    return keras.Sequential([keras.Input((784,)), Scale(), layers.Dense(10)])


def read_shard(shards: plan.Shards, *, rank: int, ranks: int) -> Any:
    """Read the rows of a rank into memory."""
    from spark_mnist.ranks import batches

    shard = batches.read(shards, rank=rank, ranks=ranks, memory=1 << 30)
    assert isinstance(shard, batches.InMemory)
    return shard


def rank_success(progress: plan.Progress, rank: int = 0) -> plan.RankSuccess:
    """Return the report of a rank that trained to the end of a fit."""
    times = plan.RankTimes(
        attempt=0, epochs=1, train=1.0, input=0.0, allreduce=0.0, validate=0.0, memory=1
    )
    network = plan.Network(name="mlp", inputs=784, classes=10, hidden=(128, 32))
    return plan.RankSuccess(rank=rank, progress=progress, network=network, times=times)
