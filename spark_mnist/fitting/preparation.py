"""All that must hold before a rank starts, found out step by step. Runs on the driver.

``fit`` takes the steps and stops at the first that fails; ``preflight`` and ``mymnist doctor`` take
as many as they can and tell of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cloudpickle
from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.cluster import driver_port, environment, session, slots, task, worker_checks
from spark_mnist.core import plan, requirements
from spark_mnist.data import feature_columns, labels, profile, shard_writer
from spark_mnist.fitting import training_start
from spark_mnist.launch import rank_process
from spark_mnist.options import value_types
from spark_mnist.store import location, model_store
from spark_mnist.store.filesystem import Files

logger = logging.getLogger(__name__)

TOKEN = "token"
LINGER = 0.2
"""Seconds for which a probing task keeps its slot, so that every executor gets one."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    ok: bool
    detail: str
    """What was found, or what is wrong and what to do."""


@dataclass(frozen=True)
class Preflight:
    """What ``preflight`` found; a notebook shows it as a table."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether a fit could start."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        return "\n".join(
            f"{'ok  ' if check.ok else 'FAIL'} {check.name:{width}} {check.detail}"
            for check in self.checks
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class Preparation:
    """What a fit knows before it begins to write.

    Args:
        spark: The session.
        df: The input; without it nothing of the rows is looked at.
        name: Of the model.
        fit_options: The options.
    """

    def __init__(
        self, spark: SparkSession, df: DataFrame | None, name: str, fit_options: options.FitOptions
    ) -> None:
        self._spark, self._df, self._name, self._fit_options = spark, df, name, fit_options
        self._start: training_start.TrainingStart | None = None
        self._census: profile.RowProfile | None = None
        self._warms_up = self._waits = False
        self.ranks = 0
        """How many will train."""
        self.before: list[int] = []
        """Versions that the model has already."""

    @property
    def checks(self) -> tuple[tuple[str, Callable[[], str]], ...]:
        """Each check's name, and the function that makes it and tells what it found."""
        rows = [("rows", self._look_at_rows)] if self._df is not None else []
        return (
            ("packages", self._check_packages),
            ("settings", self._check_settings),
            ("slots", self._find_slots),
            ("workers", self._check_workers),
            ("model", self._find_model),
            ("store", self._try_store),
            *rows,
        )

    def check(self) -> None:
        """Make all checks, and let executors import meanwhile what ranks need.

        Raises:
            errors.SparkMnistError: The first of them that failed.
        """
        self._warms_up = self._fit_options.launcher == options.SPARK
        self._waits = True
        for _, look in self.checks:
            look()

    @property
    def start(self) -> training_start.TrainingStart:
        """What the fit starts from."""
        assert self._start is not None
        return self._start

    @property
    def counted(self) -> profile.RowProfile:
        """The rows."""
        assert self._census is not None
        return self._census

    @functools.cached_property
    def store(self) -> model_store.Store:
        """Where the model will be."""
        return location.open_store(self._fit_options.store, self._spark)

    @functools.cached_property
    def shard_store(self) -> model_store.Store:
        """Where the shards lie: Petastorm's cache directory where one is set."""
        directory = shard_writer.cache_directory(self._spark)
        return model_store.Store(directory) if directory else self.store

    def _check_packages(self) -> str:
        requirements.check()
        return "all in their ranges"

    def _check_settings(self) -> str:
        session.check_settings(self._spark, secure=self._fit_options.secure)
        driver_port.check_port(self._spark, value_types.ports(self._fit_options.port) or (0,))
        return f"Spark {self._spark.version} on {self._spark.sparkContext.master}"

    def _find_slots(self) -> str:
        if self._fit_options.launcher == options.IN_PROCESS:
            self.ranks = 1
            return "1 rank, in this process"
        self.ranks = slots.ranks(self._spark, self._fit_options.num_proc)
        return f"{slots.free_slots(self._spark)} free, for {self.ranks} ranks"

    def _check_workers(self) -> str:
        workers = worker_checks.check(self._spark)
        places = {f"Python {worker.python} on {worker.host}" for worker in workers}
        return f"{', '.join(sorted(places))}; all that ranks need is there"

    def _find_model(self) -> str:
        with _clear(self.store):
            self.before = self.store.versions(self._name)
        self._start = training_start.load(self.store, self._name, self._fit_options)
        _check_travels(self._start.model_fn)
        before = f"version {self.start.version}" if self.start.version else "nothing"
        return f"{self.start.network.name}, starting from {before}"

    def _try_store(self) -> str:
        shard_writer.check_url(self.shard_store.url)
        shard_writer.check_writable(self._spark, self.shard_store.url)
        with _clear(self.store), self.store.work(self._name) as url:
            self.store.check_claims(self._name, url)
        with _clear(self.shard_store), self.shard_store.work(self._name) as url:
            hosts = _round_trip(self._spark, url, warm=self._warms_up)
        return f"{self.store.url}; written and read on {', '.join(hosts)}"

    def _look_at_rows(self) -> str:
        assert self._df is not None
        df, fit_options = self._df, self._fit_options
        input_spec = self._input_spec(df)
        self._start = self.start.for_rows(input_spec)
        counted = self._census = self._counted(df, input_spec)
        training = counted.training(fit_options.train_validation_ratio)
        if fit_options.num_proc is None:  # a rank that cannot fill a batch would only cost
            self.ranks = max(1, min(self.ranks, training // fit_options.batch_size))
            if self._waits and fit_options.launcher == options.SPARK:
                slots.wait_for_slots(self._spark, self.ranks, slots.BUSY_TIMEOUT)
        shard_writer.check_enough(counted, self.ranks, fit_options.train_validation_ratio)
        if fit_options.batch_size > max(training // self.ranks, options.FitOptions.batch_size):
            logger.warning(
                "batch_size=%d is more than the %d training rows of a rank: an epoch is one step",
                *(fit_options.batch_size, training // self.ranks),
            )
        left = f", {counted.given - counted.rows} left out" if counted.dropped else ""
        return f"{counted.given} rows{left}: {training} train, {self.ranks} ranks"

    def _input_spec(self, df: DataFrame) -> plan.InputSpec:
        """Return what is read of the rows."""
        fit_options, input_spec = self._fit_options, self.start.input_spec
        if self.start.version and input_spec:
            return input_spec
        if input_spec is None:
            label = fit_options.label or plan.InputSpec.label
            others = (label, fit_options.validation_indicator)
            names = feature_columns.expand(
                df.columns, value_types.columns(fit_options.features), others
            )
            return labels.discover(df, names, label)
        others = (input_spec.label, fit_options.validation_indicator)
        names = feature_columns.expand(df.columns, input_spec.features, others)
        if not fit_options.features:
            names = feature_columns.pixel_columns(df, input_spec, others) or names
        training_start.check_pixels(self.start.network.name, names)
        return feature_columns.with_text(df, dataclasses.replace(input_spec, features=names))

    def _counted(self, df: DataFrame, input_spec: plan.InputSpec) -> profile.RowProfile:
        """Check the rows. Where none is what a saved model reads, they are another model's."""
        try:
            return profile.profile_rows(
                df,
                input_spec,
                self._fit_options.mode,
                validation_indicator=self._fit_options.validation_indicator,
                seed=self.start.seed,
                standardized=self.start.standardize,
            )
        except errors.BadRows as error:
            if self.start.version is None or sum(error.counts.values()) < df.count():
                raise
            raise errors.ModelMismatch(
                f"version {self.start.version} was trained on rows of {input_spec.width} numbers "
                f"in {', '.join(input_spec.features)}, with the classes "
                f"{', '.join(input_spec.class_names)} in {input_spec.label}, and these are "
                f"others: {error}"
            ) from None


def preflight(
    spark: SparkSession, df: DataFrame | None, name: str, fit_options: options.FitOptions
) -> Preflight:
    """Make all checks that can be made; see ``api.preflight``."""
    preparation = Preparation(spark, df, model_store.validate_name(name), fit_options)
    checks: list[Check] = []
    for title, step in preparation.checks:
        failed = {check.name for check in checks if not check.ok}
        if (title == "rows" and failed) or (title == "store" and "workers" in failed):
            checks.append(Check(title, False, "not looked at, since a fit could not start"))
            continue
        try:
            checks.append(Check(title, True, step()))
        except errors.SparkMnistError as error:
            checks.append(Check(title, False, str(error)))
        except Exception as error:  # one check that fails must not hide what the others find
            checks.append(Check(title, False, f"{type(error).__name__}: {error}"))
    return Preflight(tuple(checks))


def _check_travels(model_fn: plan.ModelFn | None) -> None:
    """Refuse a function that cannot be sent to the ranks.

    Raises:
        errors.OptionError: It holds what lives on the driver alone.
    """
    try:
        cloudpickle.dumps(model_fn)
    except Exception as error:  # of any type, as what it holds raises it
        raise errors.OptionError(
            f"network= cannot be sent to the ranks ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}): the function must not hold a session, a "
            "DataFrame, a lock or an open file"
        ) from error


@contextlib.contextmanager
def _clear(store: model_store.Store) -> Iterator[None]:
    """Say what to do where a file system refuses."""
    try:
        yield
    except errors.SparkMnistError:  # a damaged model's is an OSError, too
        raise
    except OSError as error:
        raise errors.ClusterError(
            f"the driver cannot read and write in {store.url} ({error}): give store= a path or URL "
            "in which it can"
        ) from error


def _round_trip(spark: SparkSession, url: str, *, warm: bool) -> list[str]:
    """Let every slot read a token that the driver wrote, and write it back.

    Args:
        spark: The session.
        url: A directory of this fit.
        warm: Whether each slot's Python worker also starts the server that forks ranks.

    Returns:
        The hosts that did, with the GPUs that Spark gave their tasks.

    Raises:
        errors.ClusterError: An executor does not see what the driver wrote, or the other way.
    """
    token = secrets.token_hex(16)
    files = Files(url)
    files.write(TOKEN, token.encode())
    tasks = slots.slots(spark)
    inherited, added = environment.pattern(spark, url), environment.settings()

    def echo(index: int, _: Any) -> Iterator[tuple[int, str, str]]:
        found = ""
        try:
            here = Files(url)
            content = here.read(TOKEN)
            here.write(f"echo-{index}", content[::-1])
        except Exception as error:  # whatever its file system raises is to be told
            found = f"{type(error).__name__}: {error}"
        if warm:
            rank_process.warm(inherited, added)
        time.sleep(LINGER)
        yield index, task.place(), found

    echoes = spark.sparkContext.range(0, tasks, numSlices=tasks).mapPartitionsWithIndex(echo)
    answers = slots.in_rank_workers(echoes).collect()
    for index, host, found in answers:
        if not found and (
            not files.exist(f"echo-{index}") or files.read(f"echo-{index}").decode() != token[::-1]
        ):
            found = "what it wrote does not reach the driver"
        if found:
            raise errors.ClusterError(
                f"the executor on {host} cannot use {url} as the driver does ({found}): shards lie "
                "there, so give store= a directory or URL that driver and executors share, or set "
                f"{shard_writer.CACHE_DIR} to one"
            )
    return sorted({host for _, host, _ in answers})
