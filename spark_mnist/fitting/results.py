"""What ``fit`` returns and what is told of a saved model. Runs on the driver."""

from __future__ import annotations

import base64
import datetime
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyspark.sql import DataFrame

from spark_mnist import errors, plots
from spark_mnist.core import plan
from spark_mnist.data import row_counts
from spark_mnist.fitting import timing
from spark_mnist.store import manifests

SHOWN_EPOCHS = 20
"""Rows of the table that a notebook shows; the curve has all epochs."""


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns; a notebook shows it as table and curve."""

    model_name: str
    version: int
    """Number of the version that this fit published."""
    epochs: tuple[plan.EpochRecord, ...] = field(repr=False)
    """One record for each epoch of this fit."""
    history: DataFrame = field(repr=False)
    """The same as a table: ``epoch`` int, ``losses`` and ``metrics`` map<string,double>."""
    rows: row_counts.RowCounts = field(repr=False)
    """Where each row of the input went."""
    timing: timing.Timing = field(repr=False)
    """Where the time went."""

    def plot(self) -> plots.Figure:
        """Draw loss and accuracy by epoch; see ``plots.history``."""
        return plots.history(self.epochs)

    def _repr_html_(self) -> str:
        return _html(f"{self.model_name}, version {self.version}", self.epochs)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One version of a named model; a notebook shows it as table and curve."""

    name: str
    version: int
    parent: int | None
    """The version that this one was continued from, or is a copy of."""
    created: datetime.datetime
    epochs: int
    """Epochs of training so far, over all versions."""
    losses: Mapping[str, float]
    """Of the epoch that was kept."""
    metrics: Mapping[str, float]
    input: plan.InputSpec
    """Columns and classes."""
    network: plan.Network
    optimizer: plan.Optimizer
    ranks: int
    batch_size: int
    """Rows of one step on one rank."""
    seed: int
    rows: Mapping[str, Any]
    """Rows that trained and validated in the last fit; see ``row_counts.RowCounts``."""
    libraries: Mapping[str, str | None] = field(repr=False)
    """Versions that trained it."""
    bytes: int
    """Size of all files."""
    history: tuple[plan.EpochRecord, ...] = field(repr=False)
    """One record for each epoch of the last fit."""

    def plot(self) -> plots.Figure:
        """Draw loss and accuracy by epoch of the last fit; see ``plots.history``."""
        return plots.history(self.history)

    def _repr_html_(self) -> str:
        return _html(f"{self.name}, version {self.version}", self.history)


def info(manifest: Mapping[str, Any]) -> ModelInfo:
    """Read what a version says of itself.

    Raises:
        errors.DamagedModel: It does not say all that it should.
    """
    input_spec, network, optimizer = manifests.described(manifest)
    same = ("name", "version", "parent", "epochs", "ranks", "batch_size", "seed", "rows")
    try:
        history = tuple(plan.EpochRecord(**record) for record in manifest["history"])
        (kept,) = (record for record in history if record.epoch == manifest["epochs"])
        return ModelInfo(
            **{name: manifest[name] for name in (*same, "libraries")},
            created=datetime.datetime.fromisoformat(manifest["created"]),
            losses=kept.losses,
            metrics=kept.metrics,
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
    """A table of the last epochs, and beside it the curve where matplotlib can draw it."""
    shown = records[-SHOWN_EPOCHS:]
    means = [{**record.losses, **record.metrics} for record in shown]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("epoch", *means[0]))
    body = "".join(
        f"<tr><td>{record.epoch:d}</td>{''.join(f'<td>{v:.4f}</td>' for v in values.values())}</tr>"
        for record, values in zip(shown, means, strict=True)
    )
    table = f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"
    if not plots.available():
        return table
    png = base64.b64encode(plots.png(plots.history(records))).decode()
    picture = f'<img alt="loss and accuracy by epoch" src="data:image/png;base64,{png}">'
    return f'<div style="display: flex; align-items: center">{table}{picture}</div>'
