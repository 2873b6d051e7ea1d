"""Retries of operations that a file system refuses for a moment.

Runs on: driver, rank, Spark task.
"""

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
"""Delays before further tries, each shortened at random by up to a half."""
TRANSIENT_ERRNOS = {
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
TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses after which a later request may succeed."""
TRANSIENT_WORDS = (
    *("slowdown", "slow down", "serviceunavailable", "service unavailable", "internalerror"),
    *("requesttimeout", "timed out", "timeout", "throttl", "too many requests", "reduce your"),
    *("connection reset", "connection aborted", "connection refused", "connection was closed"),
    *("could not connect", "cannot connect", "temporarily", "disconnected"),
    *("incomplete", "payload"),
)
"""Words in the text of transient errors that have neither an errno nor a status."""
CLIENT_PACKAGES = ("aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")
"""Packages of store clients, whose errors are not always an OSError."""
PERMANENT_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
"""Errors that a later try would raise again."""

SelfT = TypeVar("SelfT")
P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def is_transient(error: BaseException) -> bool:
    """Return whether a later try may succeed after this error."""
    if isinstance(error, PERMANENT_ERRORS):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    is_storage_error = isinstance(error, OSError) or _is_client_error(error)
    if not is_storage_error:
        return False
    # The status of a client says more than the errno into which fsspec translates it.
    if (status := http_status(error)) is not None:
        return status in TRANSIENT_STATUSES
    cause = error.__cause__ or error.__context__
    number = getattr(error, "errno", None)
    if number is not None:
        return number in TRANSIENT_ERRNOS
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in TRANSIENT_WORDS) or (
        cause is not None and is_transient(cause)
    )


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that caused an error, if any."""
    cause = error.__cause__ or error.__context__
    holders = (error, getattr(error, "response", None), cause, getattr(cause, "response", None))
    return next((status for status in map(_status, holders) if status is not None), None)


def _is_client_error(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in CLIENT_PACKAGES


def _status(holder: object) -> int | None:
    """Return the HTTP status in an attribute of an error, or of its response."""
    code: Any
    if isinstance(holder, dict):
        code = holder.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        names = ("status", "status_code", "code")
        code = next((v for name in names if (v := getattr(holder, name, None)) is not None), None)
    try:
        status = int(code)
    except (TypeError, ValueError):  # None, or a code that is not a status
        return None
    return status if 100 <= status < 600 else None


def call(
    what: str, operation: Callable[[], ResultT], delays: Sequence[float] | None = None
) -> ResultT:
    """Run an operation, and try again after transient errors.

    Args:
        what: Name of the operation, for messages.
        operation: Function that may be called several times.
        delays: Seconds before each further try; ``DELAYS_S`` where None.
    """
    tries = iter(DELAYS_S if delays is None else delays)
    while True:
        try:
            return operation()
        except Exception as error:  # of any type, since store clients have their own
            wait(what, error, tries)


def wait(what: str, error: BaseException, tries: Iterator[float]) -> None:
    """Wait before the next try.

    Raises:
        Exception: The error, where it is not transient or no try is left; the error of a store
            client as an OSError.
    """
    delay = next(tries, None) if is_transient(error) else None
    if delay is None:
        if isinstance(error, OSError) or not _is_client_error(error):
            raise error
        raise OSError(f"{type(error).__name__}: {error}") from error
    logger.warning("%s failed for a moment and is tried again: %s", what, error)
    time.sleep(delay * random.uniform(0.5, 1.0))


def with_retries(
    operation: Callable[Concatenate[SelfT, P], ResultT],
) -> Callable[Concatenate[SelfT, P], ResultT]:
    """Decorate a method so that it tries again after transient errors."""

    @functools.wraps(operation)
    def wrapper(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        what = f"{operation.__name__} {args[0] if args else ''}"
        return call(what, lambda: operation(self, *args, **kwargs))

    return wrapper
