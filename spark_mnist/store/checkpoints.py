"""Checkpoints of a fit under way: what it starts from, what all ranks go on from if one is lost.

They lie in the fit's work directory as versions of a store, so they are seen whole or not at all
and are checked when read. Rank 0 writes them, the driver reads them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.store import model_store

T = TypeVar("T")
logger = logging.getLogger(__name__)

START = "start"
"""The name of what a fit starts from."""
UNPUBLISHED = "unpublished"
"""The name of what publishing needs beside the last checkpoint."""
BEST = "best/"
"""Before the names of the files of the epoch that would be published."""


def save(url: str, attempt: int, progress: plan.Progress) -> None:
    """Write a checkpoint and remove the one before.

    Args:
        url: The fit's work directory.
        attempt: Which start of the ranks this is. A rank that was taken for lost and still lives
            writes among those of its own attempt.
        progress: What to write, files included.
    """
    store = model_store.Store(url)
    best = {f"{BEST}{file}": content for file, content in progress.best.files.items()}
    state = dataclasses.asdict(dataclasses.replace(progress, files={}))
    state["best"]["files"] = {}
    distinct = [*dict.fromkeys(progress.read)]
    state["read"] = {"distinct": distinct, "epochs": [*map(distinct.index, progress.read)]}
    # Not at the manifest's top level, which has a key "files" of its own.
    store.publish(
        _name(attempt, progress.epoch), {**progress.files, **best}, lambda _: {"progress": state}
    )
    before = _name(attempt, progress.epoch - 1)
    try:
        if versions := store.versions(before):
            store.remove(before, versions, forget=True)
    except OSError as error:  # the new one is written, and all go when the fit ends
        logger.warning("the checkpoint before could not be removed: %s", error)


def save_start(url: str, files: Mapping[str, bytes | model_store.StoredFile]) -> None:
    """Write what a fit starts from, if anything: a saved model's checkpoint. On the driver."""
    store = model_store.Store(url)
    if files and START not in store.names():
        store.publish(START, files, lambda _: {})


def read_start(url: str) -> Mapping[str, bytes]:
    """Read what ``save_start`` wrote."""
    store = model_store.Store(url)
    return store.read(START, store.resolve_version(START))[1]


def save_unpublished(
    url: str, manifest: Mapping[str, Any], logs: Mapping[str, bytes | model_store.StoredFile]
) -> None:
    """Write what publishing needs beside the last checkpoint, should it fail. On the driver.

    Args:
        url: The fit's work directory.
        manifest: Of the version.
        logs: The version's files that are in no checkpoint.
    """
    model_store.Store(url).publish(UNPUBLISHED, logs, lambda _: {"manifest": dict(manifest)})


def read_unpublished(url: str) -> tuple[Mapping[str, Any], Mapping[str, model_store.StoredFile]]:
    """Read what ``save_unpublished`` wrote, and the files of the checkpoint. On the driver.

    Raises:
        errors.ModelNotFound: There is nothing.
        errors.DamagedModel: The checkpoint is gone.
    """
    store = model_store.Store(url)
    version = store.resolve_version(UNPUBLISHED)
    manifest = store.manifest(UNPUBLISHED, version)["manifest"]
    checkpoint = locate(url)
    if checkpoint is None or checkpoint[0].best.epoch != manifest["epochs"]:
        raise errors.DamagedModel(f"the last checkpoint of the fit is not in {url} any more")
    return manifest, {**checkpoint[1], **store.stored(UNPUBLISHED, version)}


def newest(url: str) -> plan.Progress | None:
    """Read the last whole checkpoint of the last attempt that has one. On rank 0."""
    return _newest(url, _read)


def locate(url: str) -> tuple[plan.Progress, Mapping[str, model_store.StoredFile]] | None:
    """Find the same checkpoint, and leave its files where they are. On the driver.

    Returns:
        How far it is, without contents, and the files that would be published.
    """
    return _newest(url, _locate)


def _newest(url: str, look: Callable[[model_store.Store, str, int], T]) -> T | None:
    store = model_store.Store(url)
    for name in sorted(set(store.names()) - {START, UNPUBLISHED}, reverse=True):
        try:
            return look(store, name, store.resolve_version(name))
        except (errors.DamagedModel, errors.ModelNotFound) as error:
            logger.warning("a checkpoint of this fit is left out: %s", error)
    return None


def _name(attempt: int, epoch: int) -> str:
    """A name that sorts as the numbers do."""
    return f"attempt-{attempt:06d}-epoch-{epoch:09d}"


def _read(store: model_store.Store, name: str, version: int) -> plan.Progress:
    manifest, files = store.read(name, version)
    progress = _described(manifest)
    best = dataclasses.replace(progress.best, files=_published(files))
    files = {file: content for file, content in files.items() if not file.startswith(BEST)}
    return dataclasses.replace(progress, best=best, files=files)


def _locate(
    store: model_store.Store, name: str, version: int
) -> tuple[plan.Progress, Mapping[str, model_store.StoredFile]]:
    return _described(store.manifest(name, version)), _published(store.stored(name, version))


def _published(files: Mapping[str, T]) -> dict[str, T]:
    """Return the files of the epoch that would be published, by their names in a version."""
    return {n.removeprefix(BEST): file for n, file in files.items() if n.startswith(BEST)}


def _described(manifest: model_store.Manifest) -> plan.Progress:
    state = manifest["progress"]
    # As JSON has it: each distinct row of the receipt once, however many epochs are alike.
    distinct = [tuple((t, v) for t, v in ranks) for ranks in state["read"]["distinct"]]
    return plan.Progress(
        epoch=state["epoch"],
        history=tuple(plan.EpochRecord(**record) for record in state["history"]),
        read=tuple(distinct[index] for index in state["read"]["epochs"]),
        best=plan.BestEpoch(**state["best"]),
        not_finite=state["not_finite"],
    )
