"""Every error a user can meet, one leaf for each thing that he can act on.

SparkMnistError
├── CommandError (ValueError)          the text of a command is not understood
├── OptionError (ValueError)           an option has a value that is not allowed
├── UnknownOption (TypeError)          there is no option of that name
├── NotADataFrame (TypeError)          the input is no Spark DataFrame, or one of a stream
├── MissingColumn (KeyError)           the DataFrame lacks a column
├── UnreadableColumn (TypeError)       a column's type has no tensor form
├── ColumnTaken (ValueError)           the input has a column of a result's name
├── BadRows (ValueError)               rows that no network can learn from
├── TooFewRows (ValueError)            not a row, or not one for each rank
├── ModelNameError (ValueError)        a name that cannot be a model's
├── ModelNotFound (LookupError)        nothing is saved under that name
├── DamagedModel (OSError)             a saved version is not what was written
├── ModelMismatch (ValueError)         a model does not go with these rows, or with the saved one
├── VersionError (ImportError)         an installed package is missing or outside its range
├── TooFewSlots (RuntimeError)         Spark cannot run that many ranks at once
├── ClusterError (RuntimeError)        a setting or a part of the cluster stands in the way
├── DatasetError (OSError)             a data set cannot be read or downloaded
└── TrainingError (RuntimeError)       the ranks failed
    ├── RankError                      one rank raised: which one, what, and where
    ├── RanksLost                      ranks went away or hung, again and again
    ├── FitCancelled                   somebody cancelled the job of the ranks in Spark
    ├── NotFinite                      the loss, or a weight, is no number any more
    ├── ShardsLost                     a shard was deleted or damaged before it was read
    ├── NotPublished                   the model is trained, and the store did not take it
    ├── RowsLost                       a rank did not use each of its rows once an epoch
    └── RanksDiverged                  the ranks ended with different weights
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class SparkMnistError(Exception):
    """Base of all errors of this library."""

    def __str__(self) -> str:  # KeyError would show its argument's repr
        return str(self.args[0]) if self.args else ""


class CommandError(SparkMnistError, ValueError):
    """The text of a command is not understood; shows it with a caret."""


class OptionError(SparkMnistError, ValueError):
    """An option has a value that is not allowed."""


class UnknownOption(SparkMnistError, TypeError):
    """There is no option of that name."""


class NotADataFrame(SparkMnistError, TypeError):
    """The input is no Spark DataFrame, or one of a stream, which has no end."""


class MissingColumn(SparkMnistError, KeyError):
    """The DataFrame lacks a column."""


class UnreadableColumn(SparkMnistError, TypeError):
    """A column's type has no tensor form."""


class ColumnTaken(SparkMnistError, ValueError):
    """The input has a column of a result's name."""


class BadRows(SparkMnistError, ValueError):
    """Rows that no network can learn from. ``counts`` has their number by reason."""

    def __init__(self, message: str, counts: Mapping[str, int] | None = None) -> None:
        super().__init__(message, counts)  # both, for pickle
        self.counts = dict(counts or {})


class TooFewRows(SparkMnistError, ValueError):
    """The DataFrame has no row, or not one for each rank."""


class ModelNameError(SparkMnistError, ValueError):
    """The name cannot be a model's."""


class ModelNotFound(SparkMnistError, LookupError):
    """Nothing is saved under that name."""


class DamagedModel(SparkMnistError, OSError):
    """A saved version is not what was written."""


class ModelMismatch(SparkMnistError, ValueError):
    """A model does not go with the rows, or with the saved one that it should be."""


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
    """One rank raised. ``rank`` and ``rank_traceback`` say which and where."""

    def __init__(self, message: str, rank: int = 0, rank_traceback: str = "") -> None:
        super().__init__(message, rank, rank_traceback)  # all, for pickle
        self.rank = rank
        self.rank_traceback = rank_traceback
        self.add_note(f"Traceback of rank {rank}:\n{rank_traceback}")


class RanksLost(TrainingError):
    """Ranks went away or hung, and as often again as they may start again."""


class FitCancelled(TrainingError):
    """Somebody cancelled the job of the ranks in Spark."""


class NotFinite(TrainingError):
    """The loss, or a weight, is no number any more."""


class ShardsLost(TrainingError):
    """A shard was deleted or damaged before a rank could read it."""


class NotPublished(TrainingError):
    """The model is trained and the store did not take it: ``work`` has it, for ``publish``."""

    def __init__(self, message: str, work: str = "") -> None:
        super().__init__(message, work)  # both, for pickle
        self.work = work


class RowsLost(TrainingError):
    """A rank did not use each row of its shard once in each epoch."""


class RanksDiverged(TrainingError):
    """The ranks ended with different weights."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word nearest to this one, or ``""``."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
