"""Errors about workers' Pythons that cannot run ranks, each in a session of its own."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import spark_mnist
from spark_mnist import errors
from spark_mnist.cluster import worker_checks
from spark_mnist.core import host_names, requirements
from tests.conftest import PROGRAMS

pytestmark = pytest.mark.ranks

BASE_PYTHON = getattr(sys, "_base_executable")  # noqa: B009
"""The Python of which this environment is one."""


def bare_python(directory):
    """The Python of this environment without its packages."""
    program = directory / "bare-python"
    program.write_text(f'#!/bin/sh\nexec {BASE_PYTHON} -S -E "$@"\n')
    # -E hides PYTHONPATH, by which a worker finds PySpark.
    program.write_text(f'#!/bin/sh\nexec {BASE_PYTHON} -S "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def told(tmp_path_factory, root):
    """Return the errors of fit, predict and doctor, of three sessions that start together."""
    home = tmp_path_factory.mktemp("workers")
    memory = "--conf spark.executor.pyspark.memory=2g pyspark-shell"
    settings = {
        "memory": {"PYSPARK_PYTHON": sys.executable, "PYSPARK_SUBMIT_ARGS": memory},
        "bare": {"PYSPARK_PYTHON": str(bare_python(home))},
        "absent": {"PYSPARK_PYTHON": "/no/such/python"},
    }
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    programs = {
        case: subprocess.Popen(
            [sys.executable, PROGRAMS / "wrong_workers.py", home / "models", root],
            env={**inherited, **added}, cwd=home, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for case, added in settings.items()
    }  # fmt: skip
    results = {case: program.communicate(timeout=300) for case, program in programs.items()}
    for case, program in programs.items():
        assert program.returncode == 0, results[case][1]
    assert not (home / "models").exists()
    return {case: json.loads(output.splitlines()[-1]) for case, (output, _) in results.items()}


def test_too_little_memory_for_tensorflow_is_one_line(told):
    (fit, predict), checks = told["memory"]
    for kind, message in (fit, predict):
        assert kind == "ClusterError"
        assert "may use 2,048 MiB, by spark.executor.pyspark.memory" in message
    assert {name: ok for name, ok, _ in checks}["workers"] is False


def test_a_python_without_the_library_is_one_line(told):
    (fit, predict), checks = told["bare"]
    assert fit[0] == predict[0] == "ClusterError"
    for message in (fit[1], predict[1]):
        assert "\n" not in message
        assert "PYSPARK_PYTHON" in message
        assert BASE_PYTHON in message
        for name in ("spark-mnist", "tensorflow", "keras", "pyarrow"):
            assert name in message
    assert "horovod" in fit[1]
    assert "horovod" not in predict[1]  # which does without
    assert [check[1] for check in checks] == [True, True, True, False, True, False, False]
    assert [checks[3][0], checks[3][2]] == ["workers", fit[1]]


def test_a_python_that_is_not_there_is_one_line(told):
    (fit, predict), _ = told["absent"]
    assert fit == predict
    assert fit[1] == (
        "Spark's workers cannot start '/no/such/python', which PYSPARK_PYTHON names: set it to a "
        "Python 3 that all hosts have, before the session is made"
    )


MISMATCHES = [
    "[PYTHON_VERSION_MISMATCH] Python in worker has different version: 3.11 than that in driver: "
    "3.13, PySpark cannot run with different minor versions.",
    "[PYTHON_VERSION_MISMATCH] Python in worker has different version (3, 11) than that in driver "
    "3.13, PySpark cannot run with different minor versions.",
]


@pytest.mark.parametrize("text", MISMATCHES)
def test_a_python_of_another_minor_version_is_named(text):
    message = worker_checks._worker_error(Exception(f"Job aborted\n{text}\nat org.apache"))
    assert message == (
        "Spark's workers run Python 3.11 and the driver 3.13: set PYSPARK_PYTHON to a Python of "
        "the driver's minor version, before the session is made"
    )


def worker(**packages):
    here = {name: requirements.installed(name) for name in worker_checks.TRAINING}
    here |= {
        name: requirements.installed(name) for name in ("tensorflow", "tensorflow-cpu", "pyspark")
    }
    own = worker_checks.__version__
    target = packages.pop("target", requirements.built_for())
    return worker_checks.Worker(
        "h", "/py", "3.12.1", {**here, "spark-mnist": own, **packages}, target
    )


def test_this_environment_has_no_faults(spark):
    assert [*worker_checks._faults(worker(), requirements.ranges())] == []
    (found,) = worker_checks.check(spark)
    assert found.executable == sys.executable
    assert worker_checks.check(spark) is worker_checks.check(spark)  # looked at once


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ({"keras": None, "numpy": None}, "lacks keras, numpy: install them there"),
        ({"pyarrow": "13.0.0"}, "has pyarrow 13.0.0, and "),
        ({"pyspark": "3.3.1"}, "has PySpark 3.3.1, and the driver "),
        ({"spark-mnist": "0.0.1"}, "has spark-mnist 0.0.1, and the driver "),
        ({"target": None}, "horovod was built without TensorFlow"),
        ({"target": "2.15.0"}, "horovod was built for TensorFlow 2.15.0 and "),
    ],
)
def test_faults_are_named(packages, message):
    assert any(
        fault.startswith(message)
        for fault in worker_checks._faults(worker(**packages), requirements.ranges())
    )


def test_differences_that_may_work_are_told_once(spark, monkeypatch, caplog):
    other = worker(keras="3.13.9")
    monkeypatch.setattr(worker_checks, "_run_probes", lambda *_: [other, other])
    monkeypatch.setattr(worker_checks, "_worker_cache", {})
    assert worker_checks.check(spark) == [other]
    keras = requirements.installed("keras")
    assert [r.message for r in caplog.records if "keras" in r.message] == [
        f"the Python of Spark's workers on h, /py, has keras 3.13.9, and the driver {keras}"
    ]


def on(*places):
    """Workers of hosts that are reached at the first address, and whose name has the second."""
    return [dataclasses.replace(worker(), address=a, name_address=b) for a, b in places]


@pytest.mark.parametrize(
    ("places", "ranks", "message"),
    [
        (
            [("10.0.0.1", None)],
            1,
            "h does not resolve .*: let its /etc/hosts say '10.0.0.1 h', or compile",
        ),
        ([("", None)], 2, "h does not resolve .* say '127.0.0.1 h', or compile"),
        (
            [("10.0.0.1", "127.0.1.1"), ("10.0.0.2", "10.0.0.2")],
            2,
            "resolves to 127.0.1.1 there, .*: let its /etc/hosts say '10.0.0.1 h', or compile",
        ),
        ([("10.0.0.1", "::1"), ("10.0.0.2", "10.0.0.2")], 2, "resolves to ::1 there"),
        ([("10.0.0.1", "172.17.0.1"), ("10.0.0.2", "172.17.0.1")], 2, "to 172.17.0.1 there"),
        ([("10.0.0.1", "127.0.1.1"), ("10.0.0.2", "127.0.1.1")], 1, None),
        ([("10.0.0.1", "127.0.1.1"), ("10.0.0.1", "127.0.1.1")], 2, None),
        ([("10.0.0.1", "192.168.0.1"), ("10.0.0.2", "fe80::2%eth0")], 2, None),
        ([("", ""), ("10.0.0.2", "10.0.0.2")], 2, None),
    ],
)
def test_names_by_which_ranks_cannot_start_or_meet(places, ranks, message):
    if message is None:
        worker_checks.check_names(on(*places), ranks)
        return
    with pytest.raises(errors.ClusterError, match=message):
        worker_checks.check_names(on(*places), ranks)
    kept = [dataclasses.replace(worker, keeps_interface=True) for worker in on(*places)]
    worker_checks.check_names(kept, ranks)


def test_horovod_keeps_to_the_interface_as_it_is_compiled_here(spark):
    (found,) = worker_checks.check(spark)
    assert found.keeps_interface


def test_a_host_without_an_address_of_its_own_is_refused(monkeypatch, digits):
    assert host_names.name_address()
    assert host_names.address_towards("127.0.0.1") == "127.0.0.1"
    monkeypatch.setattr(host_names.socket, "gethostname", lambda: "no-such-host.invalid")
    assert host_names.name_address() is None
    host_names.check("lo")
    monkeypatch.setattr(host_names, "KEEPS_INTERFACE", b"no such method in Horovod's library")
    assert not host_names.keeps_interface()
    words = "the name of host no-such-host.invalid does not resolve .* '127.0.0.1 no-such-host"
    with pytest.raises(errors.ClusterError, match=words):
        spark_mnist.fit(digits, "m", launcher="in-process", verbose=0)


def test_an_error_that_nobody_knows_is_its_first_line():
    message = worker_checks._worker_error(Exception("\n Job aborted: no idea\n\tat org.apache"))
    assert (
        message
        == "Spark's workers cannot run Python (Job aborted: no idea): look at PYSPARK_PYTHON"
    )
    assert issubclass(errors.ClusterError, errors.SparkMnistError)
