"""Results of the checks before a rank starts."""

import pytest
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import errors
from spark_mnist.data import shard_writer
from spark_mnist.fitting import preparation

pytestmark = pytest.mark.usefixtures("on_spark")


def found(preflight):
    return {check.name: (check.ok, check.detail) for check in preflight.checks}


def test_all_is_well(digits, store, tmp_path):
    told = spark_mnist.preflight(digits, "m", num_proc=2, store=store)
    assert told.ok
    checks = found(told)
    assert list(checks) == [*("packages", "settings", "slots", "workers", "model", "store", "rows")]
    assert checks["slots"][1] == "2 free, for 2 ranks"
    assert checks["model"][1] == "mlp, starting from nothing"
    assert checks["store"][1].startswith(f"file://{store}; written and read on ")
    assert checks["rows"][1] == "256 rows: 205 train, 2 ranks"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert str(told).startswith("ok   packages ")
    assert "<pre>ok   packages" in told._repr_html_()


def test_each_fault_is_told_and_the_rest_is_looked_at_all_the_same(digits, store):
    told = spark_mnist.preflight(digits, num_proc=5, secure=True, continuous=True, store=store)
    checks = found(told)
    assert not told.ok
    assert [name for name, (ok, _) in checks.items() if not ok] == [
        *("settings", "slots", "model", "rows")
    ]
    assert "secure=true needs spark.authenticate" in checks["settings"][1]
    assert "5 ranks must run" in checks["slots"][1]
    assert "no model 'preflight'" in checks["model"][1]
    assert checks["rows"][1] == "not looked at, since a fit could not start"
    assert "FAIL settings" in str(told)


def test_rows_are_scanned(digits, store):
    bad = digits.withColumn("label", F.when(F.col("label") != 3, F.col("label")))
    checks = found(spark_mnist.preflight(bad, store=store))
    assert not checks["rows"][0]
    assert "rows cannot be used" in checks["rows"][1]
    dropping = found(spark_mnist.preflight(bad, store=store, mode="DROPMALFORMED"))
    assert dropping["rows"][0]
    assert "left out" in dropping["rows"][1]


def test_without_rows_the_rest_is_looked_at(spark, store):
    told = spark_mnist.preflight(store=store)
    assert told.ok
    assert "rows" not in found(told)


def test_a_store_that_spark_cannot_write_to_is_told(digits):
    checks = found(spark_mnist.preflight(digits, store="memory://preflight"))
    assert not checks["store"][0]
    assert "Spark cannot write shards to memory://preflight" in checks["store"][1]
    assert (
        f"set {shard_writer.CACHE_DIR} to a directory that all executors share"
        in checks["store"][1]
    )


def test_a_store_that_executors_do_not_share_is_told(spark):
    with pytest.raises(errors.ClusterError, match="that driver and executors share"):
        preparation._round_trip(spark, "memory://preflight", warm=False)


def test_a_wrong_echo_is_noticed(spark, monkeypatch, tmp_path):
    real = preparation.Files.read
    monkeypatch.setattr(
        preparation.Files, "read", lambda self, path: real(self, path) + b"x" * ("echo" in path)
    )
    with pytest.raises(errors.ClusterError, match="what it wrote does not reach the driver"):
        preparation._round_trip(spark, f"file://{tmp_path}", warm=True)


def test_options_are_checked_as_for_fit(digits):
    with pytest.raises(errors.UnknownOption, match="did you mean 'epochs'"):
        spark_mnist.preflight(digits, epoch=3)


def test_the_command_gives_a_table(spark, digits, store):
    table = spark_mnist.command(f"mymnist doctor num_proc=2 store={store}", digits)
    assert table.dtypes == [("check", "string"), ("ok", "boolean"), ("detail", "string")]
    assert table.where("ok").count() == 7
    assert spark_mnist.command(f"doctor store={store}").count() == 6
