"""Exceptions of this library, one class for each problem that a user can act on.

Runs on: driver, rank, Spark task.

SparkMnistError
├── CommandError (ValueError)          the text of a command is not understood
├── OptionError (ValueError)           an option has a value that is not allowed
├── UnknownOption (TypeError)          no option has this name
├── NotADataFrame (TypeError)          the input is not a Spark DataFrame, or is a stream's
├── MissingColumn (KeyError)           the DataFrame lacks a column
├── UnreadableColumn (TypeError)       a column's type has no tensor form
├── ColumnTaken (ValueError)           the input has a column of a result's name
├── BadRows (ValueError)               rows that no network can learn from
├── TooFewRows (ValueError)            no row, or fewer rows than ranks
├── ModelNameError (ValueError)        a name that cannot be a model's
├── ModelNotFound (LookupError)        no model is saved under this name
├── DamagedModel (OSError)             a saved version differs from what was written
├── ModelMismatch (ValueError)         a model does not fit the rows, or the saved model
├── VersionError (ImportError)         an installed package is missing or outside its range
├── TooFewSlots (RuntimeError)         Spark cannot run that many ranks at once
├── ClusterError (RuntimeError)        a setting or a part of the cluster stands in the way
├── DatasetError (OSError)             a data set cannot be read or downloaded
└── TrainingError (RuntimeError)       the ranks failed
    ├── RankError                      one rank raised an exception
    ├── RanksLost                      ranks died, hung or did not start, too often
    ├── FitCancelled                   the job of the ranks was cancelled, or the fit interrupted
    ├── NotFinite                      the loss or a weight is not finite any more
    ├── ShardsLost                     a shard was deleted or damaged before it was read
    ├── NotPublished                   the model is trained, and the store did not take it
    ├── RowsLost                       a rank did not use each of its rows once an epoch
    └── RanksDiverged                  the ranks ended with different weights
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class SparkMnistError(Exception):
    """Base class of all exceptions of this library."""

    def __str__(self) -> str:  # KeyError would show its argument's repr
        return str(self.args[0]) if self.args else ""


class CommandError(SparkMnistError, ValueError):
    """The text of a command is not understood; the message shows the place with a caret."""


class OptionError(SparkMnistError, ValueError):
    """An option has a value that is not allowed."""


class UnknownOption(SparkMnistError, TypeError):
    """No option has this name."""


class NotADataFrame(SparkMnistError, TypeError):
    """The input is not a Spark DataFrame, or is the DataFrame of a stream, which has no end."""


class MissingColumn(SparkMnistError, KeyError):
    """The DataFrame lacks a column."""


class UnreadableColumn(SparkMnistError, TypeError):
    """A column's type has no tensor form."""


class ColumnTaken(SparkMnistError, ValueError):
    """The input has a column of a result's name."""


class BadRows(SparkMnistError, ValueError):
    """The input has rows that no network can learn from; ``counts`` has their number by reason."""

    def __init__(self, message: str, counts: Mapping[str, int] | None = None) -> None:
        super().__init__(message, counts)  # pickle needs both
        self.counts = dict(counts or {})


class TooFewRows(SparkMnistError, ValueError):
    """The DataFrame has no row, or fewer rows than ranks."""


class ModelNameError(SparkMnistError, ValueError):
    """The name cannot be a model's."""


class ModelNotFound(SparkMnistError, LookupError):
    """No model is saved under this name."""


class DamagedModel(SparkMnistError, OSError):
    """A saved version differs from what was written."""


class ModelMismatch(SparkMnistError, ValueError):
    """A model does not fit the rows, or is not the same as the saved model."""


class VersionError(SparkMnistError, ImportError):
    """An installed package is missing or outside the range that works."""


class TooFewSlots(SparkMnistError, RuntimeError):
    """Spark cannot run that many ranks at once."""


class ClusterError(SparkMnistError, RuntimeError):
    """A setting or a part of the cluster stands in the way of a fit."""


class DatasetError(SparkMnistError, OSError):
    """A data set cannot be read or downloaded."""


class TrainingError(SparkMnistError, RuntimeError):
    """The ranks failed."""


class RankError(TrainingError):
    """One rank raised an exception; ``rank`` and ``rank_traceback`` say which rank, and where."""

    def __init__(self, message: str, rank: int = 0, rank_traceback: str = "") -> None:
        super().__init__(message, rank, rank_traceback)  # pickle needs all
        self.rank = rank
        self.rank_traceback = rank_traceback
        self.add_note(f"Traceback of rank {rank}:\n{rank_traceback}")


class RanksLost(TrainingError):
    """Ranks died, hung or did not start, more often than restarts are allowed.

    ``free_slots`` says how many slots Spark had left where they were too few for all ranks.
    """

    def __init__(self, message: str, free_slots: int | None = None) -> None:
        super().__init__(message, free_slots)  # pickle needs both
        self.free_slots = free_slots


class FitCancelled(TrainingError):
    """The job of the ranks was cancelled in Spark, or the fit was interrupted."""


class NotFinite(TrainingError):
    """The loss or a weight is not finite any more."""


class ShardsLost(TrainingError):
    """A shard was deleted or damaged before a rank could read it."""


class NotPublished(TrainingError):
    """The model is trained, but the store did not accept it; ``work`` has it, for ``publish``."""

    def __init__(self, message: str, work: str = "") -> None:
        super().__init__(message, work)  # pickle needs both
        self.work = work


class RowsLost(TrainingError):
    """A rank did not use each row of its shard once in each epoch."""


class RanksDiverged(TrainingError):
    """The ranks ended with different weights."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the known word nearest to ``word``, or ``""``."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
