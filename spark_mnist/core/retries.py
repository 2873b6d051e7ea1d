"""Tries again what a file system refuses for a moment. Runs on: driver, rank, Spark task."""

from __future__ import annotations

import errno
import functools
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

DELAYS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits before further tries, each shortened at random by up to a half."""
TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOBUFS,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
STATUSES = {408, 425, 429, 500, 502, 503, 504}
"""Of HTTP, where a later request may succeed."""
WORDS = (
    *("slowdown", "slow down", "serviceunavailable", "service unavailable", "internalerror"),
    *("requesttimeout", "timed out", "timeout", "throttl", "too many requests", "reduce your"),
    *("connection reset", "connection aborted", "connection refused", "connection was closed"),
    *("could not connect", "cannot connect", "temporarily", "disconnected"),
    *("incomplete", "payload"),
)
"""Of errors that have neither a number nor a status."""
CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")
"""Packages of stores' clients, whose errors need be no OSError."""
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def is_transient(error: BaseException) -> bool:
    """Return whether a later try may succeed where this error was raised."""
    if isinstance(error, FINAL):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    of_store = isinstance(error, OSError) or _is_clients(error)
    if not of_store:
        return False
    # A client's own answer says more than the number into which fsspec translates it.
    if (status := http_status(error)) is not None:
        return status in STATUSES
    cause = error.__cause__ or error.__context__
    number = getattr(error, "errno", None)
    if number is not None:
        return number in TRANSIENT
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in WORDS) or (cause is not None and is_transient(cause))


def http_status(error: BaseException) -> int | None:
    """Return the status of HTTP by which an error came about, if it did so."""
    cause = error.__cause__ or error.__context__
    holders = (error, getattr(error, "response", None), cause, getattr(cause, "response", None))
    return next((status for status in map(_status, holders) if status is not None), None)


def _is_clients(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in CLIENTS


def _status(holder: object) -> int | None:
    """Return the status of HTTP that an error, or its response, has under one of its names."""
    code: Any
    if isinstance(holder, dict):
        code = holder.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        names = ("status", "status_code", "code")
        code = next((v for n in names if (v := getattr(holder, n, None)) is not None), None)
    try:
        status = int(code)
    except (TypeError, ValueError):  # None, or a code that is no status
        return None
    return status if 100 <= status < 600 else None


def call(what: str, operation: Callable[[], R], delays: Sequence[float] | None = None) -> R:
    """Carry out an operation, and try again where it is refused for a moment.

    Args:
        what: It is, for messages.
        operation: May be carried out several times.
        delays: Before further tries, in seconds; else ``DELAYS_S``.
    """
    tries = iter(DELAYS_S if delays is None else delays)
    while True:
        try:
            return operation()
        except Exception as error:  # of any type, as stores' clients have their own
            wait(what, error, tries)


def wait(what: str, error: BaseException, tries: Iterator[float]) -> None:
    """Wait before the next try.

    Raises:
        Exception: The error, where it is not transient or no try is left; that of a store's client
            as an OSError.
    """
    delay = next(tries, None) if is_transient(error) else None
    if delay is None:
        if isinstance(error, OSError) or not _is_clients(error):
            raise error
        raise OSError(f"{type(error).__name__}: {error}") from error
    logger.warning("%s failed for a moment and is tried again: %s", what, error)
    time.sleep(delay * random.uniform(0.5, 1.0))


def retried(operation: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method try again where it is refused for a moment."""

    @functools.wraps(operation)
    def with_retries(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        what = f"{operation.__name__} {args[0] if args else ''}"
        return call(what, lambda: operation(self, *args, **kwargs))

    return with_retries
