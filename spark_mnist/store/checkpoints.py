"""Checkpoints of a running fit: its start, and the state from which ranks resume when one is lost.

They lie in the fit's work directory as versions of a store, so readers see them whole or not at all
and check them. Rank 0 writes and reads them; the driver writes the start and locates the newest.
Runs on: driver, rank.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.store import model_store

Value = TypeVar("Value")
logger = logging.getLogger(__name__)

START = "start"
"""Name, in the store of a work directory, of what a fit starts from."""
UNPUBLISHED = "unpublished"
"""Name, in that store, of what publishing needs besides the last checkpoint."""
WITHIN = "-step-"
"""Part of the names of checkpoints within an epoch."""
BEST_PREFIX = "best/"
"""Prefix of the names of the files of the epoch that would be published."""


def save(url: str, attempt: int, progress: plan.Progress) -> None:
    """Write a checkpoint and remove those before; within an epoch that of its start stays.

    Args:
        url: URL of the fit's work directory.
        attempt: Which start of the ranks this is. A rank that was taken for lost and still lives
            writes among the checkpoints of its own attempt.
        progress: Progress to write, files included.
    """
    store = model_store.Store(url)
    best = {f"{BEST_PREFIX}{file}": content for file, content in progress.best.files.items()}
    state = dataclasses.asdict(dataclasses.replace(progress, files={}))
    state["best"]["files"] = {}
    distinct_rows = [*dict.fromkeys(progress.rows_by_epoch)]
    state["rows_by_epoch"] = {
        "distinct": distinct_rows,
        "epochs": [*map(distinct_rows.index, progress.rows_by_epoch)],
    }
    name = f"{_attempt_prefix(attempt)}{_place(progress)}"
    start = f"{_attempt_prefix(attempt)}{_place(dataclasses.replace(progress, step=0))}"
    # The state is not at the manifest's top level, which has a key "files" of its own.
    store.publish(
        name,
        {**progress.files, **best},
        lambda _: {"progress": state},
    )
    try:
        for previous in store.names():
            is_older = _attempt_prefix(attempt) < previous < name and previous != start
            if is_older and (versions := store.versions(previous)):
                store.remove(previous, versions, forget=True)
    except OSError as error:  # the new one is written, and all are removed when the fit ends
        logger.warning("the checkpoint before could not be removed: %s", error)


def save_start(url: str, files: Mapping[str, bytes | model_store.StoredFile]) -> None:
    """Write what a fit starts from, if anything: a saved model's checkpoint.

    Only the driver calls this function.
    """
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
    """Write what publishing needs besides the last checkpoint, in case publishing fails.

    Only the driver calls this function.

    Args:
        url: URL of the fit's work directory.
        manifest: Manifest of the version.
        logs: Files of the version that are in no checkpoint.
    """
    model_store.Store(url).publish(UNPUBLISHED, logs, lambda _: {"manifest": dict(manifest)})


def read_unpublished(url: str) -> tuple[Mapping[str, Any], Mapping[str, model_store.StoredFile]]:
    """Read what ``save_unpublished`` wrote, and the files of the checkpoint.

    Only the driver calls this function.

    Raises:
        errors.ModelNotFound: ``save_unpublished`` wrote nothing there.
        errors.DamagedModel: The checkpoint is gone.
    """
    store = model_store.Store(url)
    version = store.resolve_version(UNPUBLISHED)
    manifest = store.manifest(UNPUBLISHED, version)["manifest"]
    checkpoint = locate(url)
    if checkpoint is None or checkpoint[0].best.epoch != manifest["epochs"]:
        raise errors.DamagedModel(f"the last checkpoint of the fit is no longer in {url}")
    return manifest, {**checkpoint[1], **store.references(UNPUBLISHED, version)}


def read(url: str, progress: plan.Progress) -> plan.Progress | None:
    """Read the checkpoint of an epoch and a step, of the last attempt that has it.

    Only rank 0 calls this function.

    Args:
        url: URL of the fit's work directory.
        progress: Progress that ``locate`` returned.
    """
    return _newest(url, _read, lambda name: name.endswith(_place(progress)))


def locate(
    url: str, ranks: int = 0
) -> tuple[plan.Progress, Mapping[str, model_store.StoredFile]] | None:
    """Find the last whole checkpoint of the last attempt that has one.

    Only the driver calls this function.

    Args:
        url: URL of the fit's work directory.
        ranks: Number of ranks that go on from there. Checkpoints within an epoch are left out where
            another number of ranks took its steps.

    Returns:
        The progress without contents, and the files that would be published.
    """
    return _newest(
        url, _locate, lambda name: WITHIN not in name or name.endswith(_ranks_suffix(ranks))
    )


def _newest(
    url: str,
    load: Callable[[model_store.Store, str, int], Value],
    is_wanted: Callable[[str], bool],
) -> Value | None:
    store = model_store.Store(url)
    names = filter(is_wanted, set(store.names()) - {START, UNPUBLISHED})
    for name in sorted(names, reverse=True):
        try:
            return load(store, name, store.resolve_version(name))
        except (errors.DamagedModel, errors.ModelNotFound) as error:
            logger.warning("a checkpoint of this fit is left out: %s", error)
    return None


def _attempt_prefix(attempt: int) -> str:
    return f"attempt-{attempt:06d}-"


def _place(progress: plan.Progress) -> str:
    """Return the end of a checkpoint's name; names sort as the numbers do."""
    epoch = f"epoch-{progress.epoch:09d}"
    if not progress.step:
        return epoch
    return f"{epoch}{WITHIN}{progress.step:09d}{_ranks_suffix(progress.ranks)}"


def _ranks_suffix(ranks: int) -> str:
    return f"-of-{ranks:06d}"


def _read(store: model_store.Store, name: str, version: int) -> plan.Progress:
    manifest, files = store.read(name, version)
    progress = _parse_progress(manifest)
    best = dataclasses.replace(progress.best, files=_best_files(files))
    files = {file: content for file, content in files.items() if not file.startswith(BEST_PREFIX)}
    return dataclasses.replace(progress, best=best, files=files)


def _locate(
    store: model_store.Store, name: str, version: int
) -> tuple[plan.Progress, Mapping[str, model_store.StoredFile]]:
    return _parse_progress(store.manifest(name, version)), _best_files(
        store.references(name, version)
    )


def _best_files(files: Mapping[str, Value]) -> dict[str, Value]:
    """Return the files of the epoch that would be published, by their names in a version."""
    return {
        name.removeprefix(BEST_PREFIX): file
        for name, file in files.items()
        if name.startswith(BEST_PREFIX)
    }


def _parse_progress(manifest: model_store.Manifest) -> plan.Progress:
    state = manifest["progress"]
    # The JSON has each distinct tuple of row counts once, however many epochs are alike.
    distinct_rows = [
        tuple((train, validation) for train, validation in ranks)
        for ranks in state["rows_by_epoch"]["distinct"]
    ]
    return plan.Progress(
        epoch=state["epoch"],
        step=state["step"],
        ranks=state["ranks"],
        history=tuple(plan.EpochRecord(**record) for record in state["history"]),
        rows_by_epoch=tuple(distinct_rows[index] for index in state["rows_by_epoch"]["epochs"]),
        best=plan.BestEpoch(**state["best"]),
        stopped=state["stopped"],
        rate_factor=state["rate_factor"],
        not_finite=state["not_finite"],
    )
