"""Entry point of a rank. Runs on: rank.

The process is a child of a warm server, which has imported this module and with it TensorFlow,
Keras and Horovod; everything specific to a rank arrives after the fork.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import signal
import time
import traceback
import warnings
from multiprocessing.connection import Connection

from spark_mnist.core import channel, keras_extras, plan, processes

PR_SET_NAME = 15
"""Option of Linux's ``prctl`` that sets the name of a process."""
PROCESS_NAME = "mnist-rank-{}"
"""Name of a rank in ``ps`` and ``top``; 15 characters at most."""


with keras_extras.hidden():
    from spark_mnist.ranks import trainer


def main(connection: Connection, output: Connection) -> None:
    """Wait for a slot and a plan, train, and send the report.

    Args:
        connection: Connection to the agent: gives a ``plan.Slot`` and a pickled
            ``plan.TrainingPlan``, takes a pickled ``plan.RankReport``.
        output: Connection that takes everything that the process prints.
    """
    for signal_number in processes.END_SIGNALS:
        signal.signal(signal_number, signal.SIG_DFL)
    # A rank ends with its server, which ends with the agent.
    processes.end_with_parent(signal.SIGKILL)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    try:
        slot: plan.Slot = pickle.loads(connection.recv_bytes())
        pickled_plan = connection.recv_bytes()
    except EOFError:  # the agent has gone
        return
    ctypes.CDLL(None).prctl(PR_SET_NAME, PROCESS_NAME.format(slot.rank).encode())
    os.environ.update(slot.environment)
    connection.send_bytes(pickle.dumps(_run(slot, pickled_plan)))


def _run(slot: plan.Slot, pickled_plan: bytes) -> plan.RankReport:
    try:
        training: plan.TrainingPlan = pickle.loads(pickled_plan)
    except Exception as error:  # a function of the user's that cannot be imported here
        return _unpickling_failure(slot.rank, error)
    with channel.HeartbeatClient(
        training.driver_address, slot.rank, training.heartbeat_timeout
    ) as heartbeat:
        warnings.simplefilter("ignore", FutureWarning)  # from the libraries, not from user code
        logging.captureWarnings(True)
        logging.getLogger().addHandler(channel.WarningHandler(heartbeat))
        return trainer.run(training, heartbeat, slot.gpus)


def _unpickling_failure(rank: int, error: Exception) -> plan.RankFailure:
    message = str(error)
    if isinstance(error, ImportError):
        message += "; send its module to the executors with --py-files or addPyFile"
    return plan.RankFailure(
        rank=rank,
        type=type(error).__name__,
        message=message,
        traceback=traceback.format_exc(),
        time=time.time(),
        collective=False,
    )
