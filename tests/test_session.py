"""Slots, settings and the environment of ranks, on the session of the tests and on made-up ones."""

import os
import socket
from pathlib import Path

import pytest

import spark_mnist
from spark_mnist import errors
from spark_mnist.cluster import driver_port, environment, session, slots
from spark_mnist.launch import agent, rank_process


class Conf(dict):
    """Settings in place of a session's own, which cannot be changed while it runs."""

    def getAll(self):
        return list(self.items())


class Session:
    """A session with settings."""

    def __init__(self, **settings):
        self._settings = Conf({name.replace("_", "."): value for name, value in settings.items()})

    @property
    def sparkContext(self):
        return self

    def getConf(self):
        return self._settings


def test_slots_of_the_session(spark):
    assert slots.slots(spark) == slots.free_slots(spark) == 2
    assert slots.choose_num_ranks(spark, 1) == 1
    assert slots.choose_num_ranks(spark, None) == 2


def test_a_session_is_not_secure_by_default(spark):
    session.check_settings(spark, secure=False)
    with pytest.raises(
        errors.ClusterError, match=r"spark.authenticate=true and spark.network.crypto.enabled=true"
    ):
        session.check_settings(spark, secure=True)


def test_each_missing_setting_is_named():
    half = Session(spark_authenticate="true")
    with pytest.raises(errors.ClusterError, match=r"needs spark.network.crypto.enabled=true: set"):
        session.check_settings(half, secure=True)
    session.check_settings(
        Session(spark_authenticate="TRUE", spark_network_crypto_enabled="true"), secure=True
    )


def test_a_driver_that_cannot_listen_is_refused(spark):
    def listening(**settings):
        return Session(**{"spark_driver_host": "127.0.0.1", **settings})

    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(errors.ClusterError, match=rf"port {taken} of 127.0.0.1 \(Address alr"):
            driver_port.check_port(listening(), [taken])
        ports = [taken, taken]
        with pytest.raises(errors.ClusterError, match=f"a port of {taken} to {taken} of"):
            driver_port.check_port(listening(), ports)
    driver_port.check_port(listening(), [taken])
    with pytest.raises(errors.ClusterError, match=r"spark.driver.host=::1 has no IPv4 address"):
        driver_port.check_port(listening(spark_driver_host="::1"), [0])
    with pytest.raises(errors.ClusterError, match=r"spark.driver.bindAddress=\[::\] has no IPv4"):
        driver_port.check_port(listening(spark_driver_bindAddress="[::]"), [0])


def test_speculation_is_refused_by_name():
    with pytest.raises(errors.ClusterError, match=r"spark.speculation=true makes Spark start slow"):
        session.check_settings(Session(spark_speculation="true"), secure=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spark_dynamicAllocation_enabled": "true"}, "set spark.dynamicAllocation.minExecutors"),
        ({"spark_task_resource_gpu_amount": "1"}, "spark.task.resource.gpu.amount=1 of its GPUs"),
    ],
)
def test_too_few_slots_name_the_setting_that_limits_them(monkeypatch, settings, words):
    monkeypatch.setattr(slots, "slots", lambda _: 1)
    monkeypatch.setattr(slots, "free_slots", lambda _: 0)
    with pytest.raises(
        errors.TooFewSlots, match=rf"2 ranks must .* has 1 slots, 0 of them free.*{words}"
    ):
        slots.wait_for_slots(Session(**settings), 2, 0.1)


def test_a_rank_uses_the_interface_over_which_it_reaches_the_driver():
    assert agent._interface("127.0.0.1") == "lo"
    assert agent._interface("198.51.100.7") == ""  # no such interface: Gloo chooses


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("file:///models", {"PATH", "HOROVOD_RANK", "TF_CPP_MIN_LOG_LEVEL", "GIVEN", "LC_ALL"}),
        ("s3://bucket/models", {"PATH", "HOROVOD_RANK", "TF_CPP_MIN_LOG_LEVEL", "GIVEN", "LC_ALL",
                                "AWS_SECRET_ACCESS_KEY"}),
    ],
)  # fmt: skip
def test_ranks_keep_an_allow_list_of_their_environment(monkeypatch, url, kept):
    names = [
        *("PATH", "HOROVOD_RANK", "TF_CPP_MIN_LOG_LEVEL", "LC_ALL", "GIVEN", "GIVEN_TOO"),
        *("AWS_SECRET_ACCESS_KEY", "AZURE_TOKEN", "PGPASSWORD", "MY_PATH", "_HOROVOD_SECRET_KEY"),
        *("PYTHON_WORKER_FACTORY_SECRET", "PYSPARK_GATEWAY_SECRET"),
    ]
    monkeypatch.setattr(os, "environ", dict.fromkeys(names, "x"))
    whole = Session()
    whole._settings["spark.executorEnv.GIVEN"] = "x"
    with rank_process._environment(environment.pattern(whole, url), {"TF_CPP_MIN_LOG_LEVEL": "3"}):
        assert set(os.environ) == kept | {"TF_CPP_MIN_LOG_LEVEL"}
    assert set(os.environ) == set(names)


@pytest.mark.ranks
def test_a_users_function_does_not_see_what_is_nothing_to_do_with_training(digits, store):
    def tell():
        started_with = Path("/proc/self/environ").read_bytes().decode().split("\0")
        raise LookupError(" ".join([*os.environ, *started_with]))

    with pytest.raises(errors.RankError) as caught:
        spark_mnist.fit(digits.limit(50), "m", store=store, network=tell, num_proc=1, verbose=0)
    seen = str(caught.value).split()
    assert {"PATH", "HOROVOD_RANK", "PYTHONPATH"} <= set(seen)
    assert not [name for name in seen if "SECRET" in name or "UNRELATED_TOKEN" in name]


def test_a_gpu_is_not_shared():
    whole = Session(spark_task_resource_gpu_amount="1")
    session.check_settings(whole, secure=False)
    half = Session(spark_task_resource_gpu_amount="0.5")
    with pytest.raises(errors.ClusterError, match=r"spark.task.resource.gpu.amount=0.5 lets Spark"):
        session.check_settings(half, secure=False)


@pytest.mark.usefixtures("on_spark")
def test_options_are_spark_settings_too(spark, digits, tmp_path):
    store = str(tmp_path / "models")
    given = {"spark.mnist.store": store, "spark.mnist.num_proc": "7", "spark.mnist.epochs": "3"}
    for name, value in given.items():
        spark.conf.set(name, value)
    try:
        expected = {"store": store, "num_proc": "7", "epochs": "3", "launcher": "spark"}
        assert session.settings(spark) == expected
        with pytest.raises(errors.TooFewSlots, match="7 ranks must run"):
            spark_mnist.fit(digits, "m")
        found = spark_mnist.preflight(digits, num_proc=1)  # what a call says comes first
        assert found.ok
        assert store in str(found)
        spark.conf.set("spark.mnist.epochs", "3.5")
        with pytest.raises(errors.OptionError, match=r"setting spark.mnist.epochs: epochs must be"):
            spark_mnist.fit(digits, "m")
    finally:
        for name in given:
            spark.conf.unset(name)


def test_a_setting_that_is_none_is_refused(spark):
    spark.conf.set("spark.mnist.numproc", "2")
    try:
        with pytest.raises(
            errors.UnknownOption, match=r"spark.mnist.numproc: .* did you mean 'num_proc'"
        ):
            session.settings(spark)
    finally:
        spark.conf.unset("spark.mnist.numproc")


def test_spark_connect_is_refused():
    class Connected:
        __module__ = "pyspark.sql.connect.session"

    with pytest.raises(errors.ClusterError, match=r"Spark Connect's, .* Use classic compute"):
        session.settings(Connected())
