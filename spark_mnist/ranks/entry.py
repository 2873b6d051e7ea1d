"""Where a rank begins. Runs on: rank.

The process is a child of a warm server, which has imported this module and with it TensorFlow,
Keras and Horovod; all that is a rank's own arrives after the fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection

from spark_mnist.core import channel, plan
from spark_mnist.ranks import warm_server

PR_SET_NAME = 15
"""Of Linux's ``prctl``."""
NAME = "mnist-rank-{}"
"""What ``ps`` and ``top`` call a rank; 15 characters at most."""


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Let imports find no package of that name, unless it is imported already."""
    present = name in sys.modules
    if not present:
        sys.modules[name] = None  # type: ignore[assignment]  # what the import system takes as absent
    try:
        yield
    finally:
        if not present:
            del sys.modules[name]


with _without("sklearn"):  # Keras imports it where it is installed: a fifth of its import
    from spark_mnist.ranks import trainer


def main(connection: Connection, output: Connection) -> None:
    """Wait for a slot and a plan, train, and send the report.

    Args:
        connection: To the agent: gives a ``plan.Slot`` and a pickled ``plan.TrainingPlan``, takes a
            pickled ``plan.RankReport``.
        output: Takes all that the process prints.
    """
    for number in warm_server.END_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    # A rank ends with its server, which ends with the agent.
    warm_server.end_with_parent(signal.SIGKILL)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    try:
        slot: plan.Slot = pickle.loads(connection.recv_bytes())
        content = connection.recv_bytes()
    except EOFError:  # the agent has gone
        return
    ctypes.CDLL(None).prctl(PR_SET_NAME, NAME.format(slot.rank).encode())
    os.environ.update(slot.environment)
    connection.send_bytes(pickle.dumps(_run(slot, content)))


def _run(slot: plan.Slot, content: bytes) -> plan.RankReport:
    try:
        training: plan.TrainingPlan = pickle.loads(content)
    except Exception as error:  # a function of the user's that cannot be imported here
        return plan.RankReport(rank=slot.rank, failure=_failure(error))
    with channel.HeartbeatClient(training.inbox, slot.rank, training.heartbeat_timeout) as outbox:
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries' releases, not the user's
        logging.captureWarnings(True)
        logging.getLogger().addHandler(channel.Warnings(outbox))
        return trainer.run(training, outbox, slot.gpus)


def _failure(error: Exception) -> plan.Failure:
    message = str(error)
    if isinstance(error, ImportError):
        message += "; send its module to the executors with --py-files or addPyFile"
    return plan.Failure(
        type=type(error).__name__,
        message=message,
        traceback=traceback.format_exc(),
        time=time.time(),
        collective=False,
    )
