"""Results of ``fit``, and descriptions of saved models. Runs on: driver."""

from __future__ import annotations

import base64
import datetime
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyspark.sql import DataFrame

from spark_mnist import errors, plots
from spark_mnist.core import plan, renames
from spark_mnist.data import row_counts
from spark_mnist.fitting import timing
from spark_mnist.store import manifests

HISTORY = "epoch int, losses map<string,double>, metrics map<string,double>"
"""Schema of the table that ``fit`` returns as a DataFrame."""
MAX_TABLE_EPOCHS = 20
"""Most rows of the table that a notebook shows; the curve has all epochs."""


@dataclass(frozen=True)
class FitResult:
    """Result of ``fit``; a notebook shows it as table and curve."""

    model_name: str
    version: int
    """Number of the version that this fit published."""
    records: tuple[plan.EpochRecord, ...] = field(repr=False)
    """One record for each epoch of this fit."""
    history: DataFrame = field(repr=False)
    """The same records as a table: ``epoch`` int, ``losses`` and ``metrics`` map<string,double>."""
    rows: row_counts.RowCounts = field(repr=False)
    """Counts of the input's rows by use: training, validation, dropped."""
    timing: timing.Timing = field(repr=False)
    """Seconds of each part of the fit, and a hint that would make the next fit faster."""

    def plot(self) -> plots.Figure:
        """Draw loss and accuracy by epoch; see ``plots.history``."""
        return plots.history(self.records)

    @property
    def epochs(self) -> tuple[plan.EpochRecord, ...]:
        """Former name of ``records``; deprecated."""
        renames.warn("FitResult.epochs", "records")
        return self.records

    def _repr_html_(self) -> str:
        return _html(f"{self.model_name}, version {self.version}", self.records)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One version of a named model; a notebook shows it as table and curve."""

    name: str
    """Name of the model."""
    version: int
    """Number of the version, from 1."""
    parent: int | None
    """The version from which this one was trained on, or of which it is a copy."""
    created: datetime.datetime
    """When the version was published, in UTC."""
    num_epochs: int
    """Epochs of training so far, over this version and those before it."""
    losses: Mapping[str, float]
    """Losses of the epoch whose weights the version has."""
    metrics: Mapping[str, float]
    """Metrics of the same epoch."""
    input: plan.InputSpec
    """Columns and classes."""
    network: plan.Network
    optimizer: plan.Optimizer
    ranks: int
    """Number of ranks that trained it."""
    batch_size: int
    """Rows of one step on one rank."""
    seed: int
    """Seed of everything random in the fit."""
    rows: Mapping[str, Any]
    """Rows that trained and validated in the last fit; see ``row_counts.RowCounts``."""
    libraries: Mapping[str, str | None] = field(repr=False)
    """Versions of the libraries that trained it."""
    bytes: int
    """Size of all files of the version."""
    history: tuple[plan.EpochRecord, ...] = field(repr=False)
    """One record for each epoch of the last fit."""

    def plot(self) -> plots.Figure:
        """Draw loss and accuracy by epoch of the last fit; see ``plots.history``."""
        return plots.history(self.history)

    @property
    def epochs(self) -> int:
        """Former name of ``num_epochs``; deprecated."""
        renames.warn("ModelInfo.epochs", "num_epochs")
        return self.num_epochs

    def _repr_html_(self) -> str:
        return _html(f"{self.name}, version {self.version}", self.history)


def info(manifest: Mapping[str, Any]) -> ModelInfo:
    """Read the description of a version from its manifest.

    Raises:
        errors.DamagedModel: The manifest is incomplete or has wrong values.
    """
    input_spec, network, optimizer = manifests.parse(manifest)
    copied_keys = ("name", "version", "parent", "ranks", "batch_size", "seed", "rows")
    try:
        history = tuple(plan.EpochRecord(**record) for record in manifest["history"])
        (best_record,) = (record for record in history if record.epoch == manifest["epochs"])
        return ModelInfo(
            **{name: manifest[name] for name in (*copied_keys, "libraries")},
            num_epochs=manifest["epochs"],
            created=datetime.datetime.fromisoformat(manifest["created"]),
            losses=best_record.losses,
            metrics=best_record.metrics,
            input=input_spec,
            network=network,
            optimizer=optimizer,
            bytes=sum(stamp["bytes"] for stamp in manifest["files"].values()),
            history=history,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise errors.DamagedModel(
            f"a version of model {manifest.get('name')!r} cannot be described: {error!r}"
        ) from None


def _html(title: str, records: Sequence[plan.EpochRecord]) -> str:
    """Return a table of the last epochs, with the curve beside it where matplotlib can draw."""
    last_records = records[-MAX_TABLE_EPOCHS:]
    means = [{**record.losses, **record.metrics} for record in last_records]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("epoch", *means[0]))
    body = "".join(
        f"<tr><td>{record.epoch:d}</td>{''.join(f'<td>{v:.4f}</td>' for v in values.values())}</tr>"
        for record, values in zip(last_records, means, strict=True)
    )
    table = f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"
    if not plots.available():
        return table
    png = base64.b64encode(plots.png(plots.history(records))).decode()
    picture = f'<img alt="loss and accuracy by epoch" src="data:image/png;base64,{png}">'
    return f'<div style="display: flex; align-items: center">{table}{picture}</div>'
