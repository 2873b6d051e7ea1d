"""Signals that find the driver in the middle of what it does with Spark."""

import os
import random
import signal
import sys
import threading
import time

import pytest

from spark_mnist import errors
from spark_mnist.cluster import signals

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers(spark):
    """Those of a Python process that made a session, put back in the end."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)


def later(seconds, number):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def unwound(function):
    with signals.interruptible():
        function()
        time.sleep(5)
    pytest.fail("the signal was lost")


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_a_long_job_and_the_session_works_on(spark, handlers, number, ends):
    def work():
        later(1.0, number)
        spark.sparkContext.parallelize([0, 1], 2).foreach(lambda _: time.sleep(120))

    begun = time.monotonic()
    with pytest.raises(ends) as ended:
        unwound(work)
    assert getattr(ended.value, "code", 143) == 143
    assert time.monotonic() - begun < 60
    assert spark.range(7).count() == 7


def test_a_signal_between_calls_of_the_jvm_is_never_lost(spark, handlers):
    choice = random.Random(1)

    def work():
        later(choice.uniform(0, 0.05), signal.SIGINT)
        for _ in range(1000):
            assert spark.range(3).select("id").schema.names == ["id"]

    for _ in range(40):
        with pytest.raises(KeyboardInterrupt):
            unwound(work)
        assert spark.range(3).select("id").schema.names == ["id"]


def test_cleaning_up_is_not_interrupted(handlers):
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt):
        unwound(work)
    assert cleaned


def test_an_error_that_was_there_before_does_not_protect_from_signals(handlers):
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(KeyboardInterrupt):
            unwound(lambda: os.kill(os.getpid(), signal.SIGINT))


def test_other_errors_and_ends_are_as_they_were(handlers):
    with pytest.raises(ValueError, match="as it was"), signals.interruptible():
        raise ValueError("as it was")
    with pytest.raises(SystemExit) as ended, signals.interruptible():
        sys.exit(3)
    assert ended.value.code == 3
    with signals.interruptible():
        pass


def test_a_handler_of_the_caller_stays(handlers):
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    with signals.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert came == [1]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_cross_validator_in_a_thread_may_fit_its_best_model_last(spark):
    """There its own ``_fit`` calls ours: nobody else waits."""
    scope = {"__name__": signals.TUNING_MODULE, "check": signals.check}
    exec("def _fit():\n    check()\n\ndef task():\n    check()", scope)
    found = []
    for function in (scope["_fit"], scope["task"]):

        def run(function=function):
            try:
                found.append(function())
            except errors.FitCancelled as error:
                found.append(type(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found == [None, errors.FitCancelled]
