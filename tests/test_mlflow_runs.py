"""Fits in a real tracking store of MLflow, in a file of SQLite."""

import threading

import keras
import mlflow
import numpy as np
import pytest

import spark_mnist
from spark_mnist import errors
from spark_mnist.core import requirements

OPTIONS = {"epochs": 2, "batch_size": 16, "network": "softmax", "verbose": 0}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    home = tmp_path_factory.mktemp("tracking")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{home}/mlflow.db")
    yield home
    mlflow.set_tracking_uri(before)


@pytest.fixture
def tracked(request, tracking, monkeypatch):
    """An experiment of this test's own; gives its runs, oldest first."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    name = request.node.name
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment(name, artifact_location=f"file://{tracking}/{name}")
    )
    return lambda: mlflow.search_runs(output_format="list", order_by=["start_time ASC"])


def model_of(run):
    (logged,) = mlflow.search_logged_models(
        filter_string=f"source_run_id = '{run.info.run_id}'", output_format="list"
    )
    return logged.model_uri


def test_a_fit_that_asks_for_it(digits, store, tracked):
    fit = spark_mnist.fit(digits, "m", mlflow=True, store=store, **OPTIONS)
    (run,) = tracked()
    assert (run.info.status, run.info.run_name) == ("FINISHED", "m v1")
    assert run.data.params["epochs"] == "2"
    assert run.data.params["learning_rate"] == "0.001"
    assert run.data.tags["spark_mnist.store"] == f"file://{store}"
    client = mlflow.MlflowClient()
    for name in ("loss", "val_accuracy"):
        steps = client.get_metric_history(run.info.run_id, name)
        expected = [{**r.losses, **r.metrics}[name] for r in fit.records]
        assert [(m.step, m.value) for m in steps] == list(enumerate(expected, 1))


def test_the_model_that_is_logged_predicts_as_ours(digits, store, tracked):
    spark_mnist.fit(digits, "m", mlflow=True, store=store, **OPTIONS)
    loaded = mlflow.pyfunc.load_model(model_of(tracked()[0]))
    (taken,), (given,) = loaded.metadata.signature.inputs, loaded.metadata.signature.outputs
    assert (taken.shape, given.shape) == ((-1, 784), (-1, 10))
    rows = digits.limit(50)
    predicted = spark_mnist.predict(rows, "m", store=store).select("image", "prediction").collect()
    images = np.array([np.frombuffer(row.image, "uint8") for row in predicted], "float32") / 255
    classes = np.asarray(loaded.predict(images)).argmax(1)
    assert classes.tolist() == [row.prediction.index(1) for row in predicted]


def test_the_logged_model_has_the_outputs_of_its_tasks(spark, store, tracked):
    def network():
        rows = keras.Input((2,), name="sizes")
        hidden = keras.layers.Dense(4)(rows)
        outputs = {"price": keras.layers.Dense(1)(hidden), "cheap": keras.layers.Dense(1)(hidden)}
        return keras.Model({"sizes": rows}, outputs)

    rows = spark.range(80).selectExpr(
        "sin(id) AS a", "cos(id) AS b", "1000 + 10 * sin(id) AS price", "sin(id) < 0 AS cheap"
    )
    spark_mnist.fit(
        rows, "m", features={"sizes": ["a", "b"]}, label={"price": "price", "cheap": "cheap"},
        task={"price": "regression", "cheap": "binary"}, standardize_label=True, network=network,
        callbacks=list, epochs=1, batch_size=8, verbose=0, mlflow=True, store=store,
    )  # fmt: skip
    (run,) = tracked()
    logged = mlflow.pyfunc.load_model(model_of(run))
    assert logged.metadata.signature.inputs.input_names() == ["sizes"]
    assert sorted(logged.metadata.signature.outputs.input_names()) == ["cheap", "price"]
    table = spark_mnist.predict(rows, "m", probabilities=True, store=store).toPandas()
    found = logged.predict({"sizes": table[["a", "b"]].to_numpy("float32")})
    np.testing.assert_allclose(found["price"][:, 0], table["prediction_price"], rtol=1e-5)
    expected = np.stack(table["probability_cheap"])[:, 1]
    np.testing.assert_allclose(found["cheap"][:, 0], expected, atol=1e-5)


def test_an_active_run_takes_the_first_fit_and_each_further_below_it(digits, store, tracked):
    with mlflow.start_run(run_name="mine"):
        spark_mnist.fit(digits, "m", store=store, **OPTIONS)
        spark_mnist.fit(digits, "m", store=store, continuous=True, **{**OPTIONS, "epochs": 1})
        spark_mnist.fit(digits, "m", mlflow=False, store=store, **OPTIONS)
        assert mlflow.active_run().info.run_name == "mine"
    spark_mnist.fit(digits, "m", store=store, **OPTIONS)
    mine, below = tracked()
    assert [run.data.tags["spark_mnist.version"] for run in (mine, below)] == ["1", "2"]
    assert below.data.tags["mlflow.parentRunId"] == mine.info.run_id
    (metric,) = mlflow.MlflowClient().get_metric_history(below.info.run_id, "loss")
    assert metric.step == 3  # the third epoch of the model's life


def test_what_mlflow_refuses_is_told_and_the_version_stays(
    digits, store, tracked, monkeypatch, caplog
):
    def refuse(*_, **__):
        raise mlflow.MlflowException("no room")

    monkeypatch.setattr(mlflow.tensorflow, "log_model", refuse)
    fit = spark_mnist.fit(digits, "m", mlflow=True, store=store, **OPTIONS)
    assert spark_mnist.describe("m", store=store).version == fit.version
    assert "version 1 of model 'm' is published, but MLflow did not take all" in caplog.text
    assert "no room" in caplog.text


def test_without_mlflow_asking_for_it_is_an_error_before_any_work(digits, store, monkeypatch):
    real = requirements.metadata.version

    def version(name):
        if name == "mlflow-skinny":
            raise requirements.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(requirements.metadata, "version", version)
    message = r"mlflow=true needs MLflow: mlflow-skinny is missing .* install spark-mnist\[mlflow\]"
    with pytest.raises(errors.VersionError, match=message):
        spark_mnist.fit(digits, "m", mlflow=True, store=store, **OPTIONS)
    assert spark_mnist.models(store) == []


def test_a_fit_in_a_thread_is_logged_below_the_run_of_another(digits, store, tracked):
    with mlflow.start_run(run_name="search") as active:
        thread = threading.Thread(
            target=lambda: spark_mnist.fit(digits, "m", store=store, **OPTIONS)
        )
        thread.start()
        thread.join(120)
    search, fit = tracked()
    assert fit.data.tags["mlflow.parentRunId"] == active.info.run_id == search.info.run_id
    assert (fit.info.run_name, fit.info.status) == ("m v1", "FINISHED")
    assert "val_accuracy" in fit.data.metrics
