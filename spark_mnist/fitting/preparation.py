"""Checks of everything that must hold before a rank starts. Runs on: driver.

``fit`` runs the checks in order and stops at the first that fails. ``preflight`` and ``mymnist
doctor`` run as many as they can and report each result.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import html
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.cluster import driver_port, environment, session, slots, task, worker_checks
from spark_mnist.core import host_names, plan, requirements
from spark_mnist.data import column_names, feature_columns, labels, profile, shard_writer, targets
from spark_mnist.fitting import training_start
from spark_mnist.launch import rank_process
from spark_mnist.networks import callbacks
from spark_mnist.options import value_types
from spark_mnist.store import location, model_store
from spark_mnist.store.filesystem import Files

logger = logging.getLogger(__name__)

PROBE_FILE = "token"
"""Name of the file with the token that the driver writes and each probing task reads."""
_shared_stores: set[tuple[str, ...]] = set()
"""Stores that executors were seen to share, by application, URL and executors."""


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    """What was checked."""
    ok: bool
    """Whether a fit could start, as far as this check tells."""
    detail: str
    """Facts that the check established, or the fault and its remedy."""


@dataclass(frozen=True)
class Preflight:
    """Results of all checks of ``preflight``; a notebook shows them as a table."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Return whether a fit could start."""
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
    """Checks of one fit before it writes shards, and the values that the checks establish.

    Args:
        spark: The session.
        df: The input; without it the rows are not checked.
        name: Name of the model.
        fit_options: The options.
    """

    def __init__(
        self, spark: SparkSession, df: DataFrame | None, name: str, fit_options: options.FitOptions
    ) -> None:
        self._spark, self._df, self._name, self._fit_options = spark, df, name, fit_options
        self._start: training_start.TrainingStart | None = None
        self._row_profile: profile.RowProfile | None = None
        self._input_spec: plan.InputSpec | None = None
        self._is_for_fit = False
        self.ranks = 0
        """Number of ranks that will train."""
        self.earlier_versions: list[int] = []
        """Versions of the model that were published before this fit."""
        self.class_weight: str | dict[int, float] = {}
        """Factors of the training rows' losses by class; {} where all are 1."""

    @property
    def checks(self) -> tuple[tuple[str, Callable[[], str]], ...]:
        """Return each check's name and its function, which returns the facts that it found out."""
        rows = [("rows", self._check_rows)] if self._df is not None else []
        return (
            ("packages", self._check_packages),
            ("settings", self._check_settings),
            ("slots", self._check_slots),
            ("workers", self._check_workers),
            ("model", self._check_model),
            ("store", self._check_store),
            *rows,
        )

    def check(self) -> None:
        """Run all checks, and let executors import meanwhile the libraries that ranks need.

        Raises:
            errors.SparkMnistError: Error of the first check that failed.
        """
        self._is_for_fit = True
        for _, run_check in self.checks:
            run_check()

    @property
    def start(self) -> training_start.TrainingStart:
        """Return the state from which training starts; the checks ``model`` and ``rows`` set it."""
        assert self._start is not None
        return self._start

    @property
    def input_spec(self) -> plan.InputSpec:
        """Return what the network reads of a row; the check ``rows`` sets it."""
        assert self._input_spec is not None
        return self._input_spec

    @property
    def row_profile(self) -> profile.RowProfile:
        """Return the profile of the rows; the check ``rows`` sets it."""
        assert self._row_profile is not None
        return self._row_profile

    @functools.cached_property
    def store(self) -> model_store.Store:
        """Return the store in which the model is published."""
        return location.open_store(self._fit_options.store, self._spark)

    @functools.cached_property
    def shard_store(self) -> model_store.Store:
        """Return the store of the shards: Petastorm's cache directory where one is set."""
        directory = shard_writer.cache_directory(self._spark)
        return model_store.Store(directory) if directory else self.store

    def _check_packages(self) -> str:
        requirements.check()
        return "all in their ranges"

    def _check_settings(self) -> str:
        session.check_settings(self._spark, secure=self._fit_options.secure)
        driver_port.check_port(self._spark, value_types.ports(self._fit_options.port) or (0,))
        return f"Spark {self._spark.version} on {self._spark.sparkContext.master}"

    def _check_slots(self) -> str:
        if self._fit_options.launcher == options.IN_PROCESS:
            host_names.check(host_names.loopback())
            self.ranks = 1
            return "1 rank, in this process"
        self.ranks = slots.choose_num_ranks(self._spark, self._fit_options.num_proc)
        return f"{slots.free_slots(self._spark)} free, for {self.ranks} ranks"

    def _check_workers(self) -> str:
        workers = worker_checks.check(self._spark)
        if self._fit_options.launcher == options.SPARK:
            worker_checks.check_names(workers, self.ranks)
        environments = {f"Python {worker.python} on {worker.host}" for worker in workers}
        return f"{', '.join(sorted(environments))}; all that ranks need is there"

    def _check_model(self) -> str:
        with _explain_os_errors(self.store):
            self.earlier_versions = self.store.versions(self._name)
        self._start = training_start.load(self.store, self._name, self._fit_options)
        _check_functions(self._start, self._fit_options)
        if self._fit_options.callbacks:
            callbacks.make(self._fit_options.callbacks)
        origin = f"version {self.start.version}" if self.start.version else "nothing"
        return f"{self.start.network.name}, starting from {origin}"

    def _check_store(self) -> str:
        shard_writer.check_url(self.shard_store.url)
        shard_writer.check_writable(self._spark, self.shard_store.url)
        with _explain_os_errors(self.store), self.store.work(self._name) as url:
            self.store.check_claims(self._name, url)
        with _explain_os_errors(self.shard_store), self.shard_store.work(self._name) as url:
            if self._is_for_fit:
                self._check_executors(url)
                return f"{self.store.url}; executors share it"
            hosts = _round_trip(self._spark, url, warm=False)
        return f"{self.store.url}; written and read on {', '.join(hosts)}"

    def _check_executors(self, url: str) -> None:
        """Check once that the same executors share the store, and start the servers of ranks."""
        warm = self._fit_options.launcher == options.SPARK
        context = self._spark.sparkContext
        key = (context.applicationId, self.shard_store.url, *slots.executors(self._spark))
        if key not in _shared_stores:
            _round_trip(self._spark, url, warm=warm)
            _shared_stores.add(key)
        elif warm:
            _warm_servers(self._spark, url)

    def _check_rows(self) -> str:
        assert self._df is not None
        df, fit_options = self._df, self._fit_options
        input_spec, outputs = self._resolve_input_spec(df), self._resolve_outputs(df)
        if not self.start.version:
            input_spec = _with_labels(input_spec, outputs)
        self._start = self.start.for_rows(input_spec, outputs)
        input_spec = self._input_spec = self.start.input_spec or input_spec
        row_profile = self._row_profile = self._profile_rows(df, input_spec, outputs)
        self.class_weight = _class_weight(fit_options.class_weight, outputs)
        training_rows = row_profile.num_training_rows(fit_options.train_validation_ratio)
        if fit_options.num_proc is None:  # a rank that cannot fill a batch only adds cost
            self.ranks = max(1, min(self.ranks, training_rows // fit_options.batch_size))
            if self._is_for_fit and fit_options.launcher == options.SPARK:
                slots.wait_for_slots(self._spark, self.ranks, slots.BUSY_TIMEOUT_S)
        shard_writer.check_row_count(row_profile, self.ranks, fit_options.train_validation_ratio)
        if fit_options.batch_size > max(training_rows // self.ranks, options.FitOptions.batch_size):
            logger.warning(
                "batch_size=%d is more than the %d training rows of a rank: an epoch is one step",
                *(fit_options.batch_size, training_rows // self.ranks),
            )
        note = (
            f", {row_profile.num_input_rows - row_profile.rows} left out"
            if row_profile.dropped
            else ""
        )
        return f"{row_profile.num_input_rows} rows{note}: {training_rows} train, {self.ranks} ranks"

    def _resolve_input_spec(self, df: DataFrame) -> plan.InputSpec:
        """Return the specification of the input: the saved model's, or one found from the rows."""
        fit_options, input_spec = self._fit_options, self.start.input_spec
        if self.start.version and input_spec:
            return input_spec
        other_columns = (
            *(output.label for output in self.start.network.outputs),
            *(fit_options.validation_indicator, fit_options.sample_weight),
        )
        if isinstance(fit_options.features, Mapping):
            inputs = []
            for name, columns in fit_options.features.items():
                features = column_names.expand(
                    df.columns, value_types.columns(columns), other_columns
                )
                spec = labels.discover_features(df, features)
                inputs.append(
                    plan.Input(name=name, features=features, pixels=spec.pixels, width=spec.width)
                )
            return plan.InputSpec(
                features=tuple(column for each in inputs for column in each.features),
                pixels=False,
                width=sum(each.width for each in inputs),
                inputs=tuple(inputs),
            )
        if input_spec is None:
            features = column_names.expand(
                df.columns, value_types.columns(fit_options.features), other_columns
            )
            _check_features(features, self.start.network.outputs)
            return labels.discover_features(df, features)
        features = column_names.expand(df.columns, input_spec.features, other_columns)
        if not fit_options.features:
            features = column_names.pixel_columns(df, input_spec, other_columns) or features
        training_start.check_pixels(self.start.network.name, features)
        return feature_columns.detect_text_pixels(
            df, dataclasses.replace(input_spec, features=features)
        )

    def _resolve_outputs(self, df: DataFrame) -> tuple[plan.Output, ...]:
        """Return the outputs: the saved model's, or those asked for, as the rows have them."""
        outputs, input_spec = self.start.network.outputs, self.start.input_spec
        if self.start.version:
            return outputs
        return tuple(
            dataclasses.replace(output, size=input_spec.classes)
            if input_spec and output.task == plan.CLASSIFICATION  # digits
            else targets.discover(df, output)
            for output in outputs
        )

    def _profile_rows(
        self, df: DataFrame, input_spec: plan.InputSpec, outputs: Sequence[plan.Output]
    ) -> profile.RowProfile:
        """Check and count the rows.

        Raises:
            errors.BadRows: Rows cannot be used.
            errors.ModelMismatch: No row is what the saved model reads: the rows are for another.
        """
        try:
            return profile.profile_rows(
                df,
                input_spec,
                self._fit_options.mode,
                validation_indicator=self._fit_options.validation_indicator,
                seed=self.start.seed,
                standardized=self.start.standardize,
                outputs=outputs,
                sample_weight=self._fit_options.sample_weight,
            )
        except errors.BadRows as error:
            if self.start.version is None or sum(error.counts.values()) < df.count():
                raise
            raise errors.ModelMismatch(
                f"version {self.start.version} was trained on rows of {input_spec.width} numbers "
                f"in {', '.join(input_spec.features)}, with "
                f"{'; '.join(map(_labels_text, outputs))}, and these are others: {error}"
            ) from None


def _labels_text(output: plan.Output) -> str:
    """Return what an output has learned, as text."""
    if output.task == plan.REGRESSION:
        return f"{output.size} numbers in {output.label}"
    noun = "labels" if output.task == plan.MULTILABEL else "classes"
    return f"the {noun} {', '.join(output.class_names)} in {output.label}"


def _with_labels(input_spec: plan.InputSpec, outputs: Sequence[plan.Output]) -> plan.InputSpec:
    """Return the specification with label, classes and names, as all outputs have them."""
    first = outputs[0]
    return dataclasses.replace(
        input_spec,
        label=first.label,
        classes=sum(output.size for output in outputs),
        names=first.names if len(outputs) == 1 else (),
    )


def _check_features(features: Sequence[str], outputs: Sequence[plan.Output]) -> None:
    """Refuse features that are named twice, and warn of a class among them.

    Raises:
        errors.OptionError: A column is named twice.
    """
    for name, count in collections.Counter(features).items():
        if count > 1:
            raise errors.OptionError(f"features= names {name!r} {count} times")
    for output in outputs:
        if output.label in features and output.task != plan.REGRESSION:
            logger.warning("the label %s is among the features, which then tell it", output.label)


def _class_weight(option: Any, outputs: Sequence[plan.Output]) -> str | dict[int, float]:
    """Return the option with the classes by number; {} where it is not given.

    Raises:
        errors.OptionError: There is no one output that learns classes, or no such class.
    """
    if not option:
        return {}
    if len(outputs) != 1 or outputs[0].task not in plan.CLASS_TASKS:
        raise errors.OptionError(
            "class_weight is for one output that learns classes; weigh rows by a column, "
            "sample_weight="
        )
    if option == plan.BALANCED:
        return plan.BALANCED
    names = outputs[0].class_names
    weights: dict[int, float] = {}
    for key, weight in option.items():
        # Labels may be booleans, or whole numbers as floats.
        is_number = isinstance(key, bool | int | float) and float(key).is_integer()
        name = str(int(key)) if is_number else str(key)
        if name not in names:
            raise errors.OptionError(
                f"class_weight names the class {key!r}, and the classes are {', '.join(names)}"
            )
        if names.index(name) in weights:
            raise errors.OptionError(f"class_weight names the class {name} twice")
        weights[names.index(name)] = float(weight)
    if len(weights) == len(names) and not any(weights.values()):
        raise errors.OptionError("class_weight is 0 for all classes: nothing would be learned")
    return weights


def preflight(
    spark: SparkSession, df: DataFrame | None, name: str, fit_options: options.FitOptions
) -> Preflight:
    """Run all checks that can be run; see ``api.preflight``."""
    preparation = Preparation(spark, df, model_store.validate_name(name), fit_options)
    checks: list[Check] = []
    for title, run_check in preparation.checks:
        failures = {check.name for check in checks if not check.ok}
        if (title == "rows" and failures) or (title == "store" and "workers" in failures):
            checks.append(Check(title, False, "not looked at, since a fit could not start"))
            continue
        try:
            checks.append(Check(title, True, run_check()))
        except errors.SparkMnistError as error:
            checks.append(Check(title, False, str(error)))
        except Exception as error:  # a check that fails must not hide the results of the others
            checks.append(Check(title, False, f"{type(error).__name__}: {error}"))
    return Preflight(tuple(checks))


def _check_functions(start: training_start.TrainingStart, fit_options: options.FitOptions) -> None:
    """Refuse functions that cannot be sent to the ranks.

    Raises:
        errors.OptionError: A function holds an object that only the driver can have.
    """
    functions = {
        "network": start.model_fn,
        "loss": start.losses,
        "metrics": start.metrics,
        "optimizer": start.optimizer_fn,
        "callbacks": fit_options.callbacks,
    }
    for option, function in functions.items():
        _check_picklable(option, function)


def _check_picklable(option: str, function: Any) -> None:
    try:
        cloudpickle.dumps(function)
    except Exception as error:  # of any type: the objects that the function holds raise it
        raise errors.OptionError(
            f"{option}= cannot be sent to the ranks ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}): the function must not hold a session, a "
            "DataFrame, a lock or an open file"
        ) from error


@contextlib.contextmanager
def _explain_os_errors(store: model_store.Store) -> Iterator[None]:
    """Turn an ``OSError`` of the store's file system into an error that names the remedy.

    Raises:
        errors.ClusterError: The driver cannot read and write in the store.
    """
    try:
        yield
    except errors.SparkMnistError:  # errors.DamagedModel is an OSError, too
        raise
    except OSError as error:
        raise errors.ClusterError(
            f"the driver cannot read and write in {store.url} ({error}): give store= a path or URL "
            "in which it can"
        ) from error


def _warm_servers(spark: SparkSession, url: str) -> None:
    """Let the Python worker of every slot start the server that forks ranks, where none runs."""
    tasks = slots.slots(spark)
    pattern, variables = environment.pattern(spark, url), environment.settings()
    indices = spark.sparkContext.range(0, tasks, numSlices=tasks)
    slots.in_rank_workers(indices.map(lambda _: rank_process.warm(pattern, variables))).collect()


def _round_trip(spark: SparkSession, url: str, *, warm: bool) -> list[str]:
    """Let every slot read a token that the driver wrote, and write it back.

    Args:
        spark: The session.
        url: A directory of this fit.
        warm: Whether each slot's Python worker also starts the server that forks ranks.

    Returns:
        The hosts of the tasks, with the GPUs that Spark gave the tasks.

    Raises:
        errors.ClusterError: An executor does not see the driver's file, or the driver does not see
            an executor's.
    """
    token = secrets.token_hex(16)
    files = Files(url)
    files.write(PROBE_FILE, token.encode())
    tasks = slots.slots(spark)
    pattern, variables = environment.pattern(spark, url), environment.settings()

    def echo(index: int, _: Any) -> Iterator[tuple[int, str, str]]:
        fault = ""
        try:
            task_files = Files(url)
            content = task_files.read(PROBE_FILE)
            task_files.write(f"echo-{index}", content[::-1])
        except Exception as error:  # of any type: the driver reports each file system's errors
            fault = f"{type(error).__name__}: {error}"
        if warm:
            rank_process.warm(pattern, variables)
        time.sleep(slots.PROBE_HOLD_S)
        yield index, task.place(), fault

    echoes = spark.sparkContext.range(0, tasks, numSlices=tasks).mapPartitionsWithIndex(echo)
    answers = slots.in_rank_workers(echoes).collect()
    for index, host, fault in answers:
        if not fault and (
            not files.exists(f"echo-{index}") or files.read(f"echo-{index}").decode() != token[::-1]
        ):
            fault = "what it wrote does not reach the driver"
        if fault:
            raise errors.ClusterError(
                f"the executor on {host} cannot use {url} as the driver does ({fault}): shards lie "
                "there, so give store= a directory or URL that driver and executors share, or set "
                f"{shard_writer.CACHE_DIR} to one"
            )
    return sorted({host for _, host, _ in answers})
