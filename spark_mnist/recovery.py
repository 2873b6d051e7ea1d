"""Checkpoints of a fit under way, one after each epoch: what all ranks go on from if one is lost.

They lie in the fit's work directory as versions of a store, so they are seen whole or not at all
and are checked when read. Rank 0 writes them, the driver reads them.
"""

from __future__ import annotations

import dataclasses
import logging

from spark_mnist import errors, plan
from spark_mnist import store as stores

logger = logging.getLogger(__name__)

KEPT = "kept/"
"""Before the names of the files of the epoch that would be published."""


def save(url: str, attempt: int, progress: plan.Progress) -> None:
    """Write a checkpoint and remove the one before.

    Args:
        url: The fit's work directory.
        attempt: Which start of the ranks this is. A rank that was taken for lost and still lives
            writes among those of its own attempt.
        progress: What to write, files included.
    """
    store, name = stores.Store(url), f"attempt-{attempt}"
    kept = {f"{KEPT}{file}": content for file, content in progress.kept.files.items()}
    state = dataclasses.asdict(dataclasses.replace(progress, files={}))
    state["kept"]["files"] = {}
    # Keys of a manifest's own that a state must not have: "format" and "files".
    number = store.publish(name, {**progress.files, **kept}, lambda _: {"progress": state})
    store.remove(name, [old for old in store.versions(name) if old < number])


def newest(url: str) -> plan.Progress | None:
    """Read the last whole checkpoint of the last attempt that has one."""
    store = stores.Store(url)
    for name in sorted(store.names(), key=lambda name: int(name.rpartition("-")[2]), reverse=True):
        for version in reversed(store.versions(name)):
            try:
                return _read(store, name, version)
            except errors.DamagedModel as error:
                logger.warning("a checkpoint of this fit is left out: %s", error)
    return None


def _read(store: stores.Store, name: str, version: int) -> plan.Progress:
    manifest, files = store.read(name, version)
    state = manifest["progress"]
    kept = {n.removeprefix(KEPT): c for n, c in files.items() if n.startswith(KEPT)}
    return plan.Progress(
        epoch=state["epoch"],
        history=tuple(plan.EpochRecord(**record) for record in state["history"]),
        read=tuple(tuple((t, v) for t, v in ranks) for ranks in state["read"]),
        kept=plan.Kept(**{**state["kept"], "files": kept}),
        files={n: c for n, c in files.items() if not n.startswith(KEPT)},
    )
