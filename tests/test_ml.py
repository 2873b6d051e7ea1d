"""The stages of Spark ML: in a pipeline, under cross-validation, saved and loaded."""

from typing import Any

import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import (
    BinaryClassificationEvaluator,
    MulticlassClassificationEvaluator,
    RegressionEvaluator,
)
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import errors, schedules
from spark_mnist.ml import (
    MnistClassifier,
    MnistClassifierModel,
    MnistRegressor,
    MnistRegressorModel,
)
from spark_mnist.ml.params import OPTIONS

MEASURES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def estimator(store):
    return MnistClassifier(
        store=store, modelName="digits", epochs=4, batchSize=16, verbose=0, seed=1
    )


@pytest.fixture(scope="module")
def model(estimator, digits):
    return estimator.fit(digits)


def classes(df):
    return [int(row["prediction"]) for row in df.select("prediction").collect()]


def test_its_model_is_the_version_that_fit_published(model, digits, store):
    found = spark_mnist.predict(digits, "digits", store=store, interpret=True)
    assert classes(model.transform(digits)) == [row["interpreted"] for row in found.collect()]
    assert (model.info.name, model.info.version, model.info.num_epochs) == ("digits", 1, 4)


def test_what_it_adds_is_what_evaluators_take(model, digits):
    found = model.transform(digits)
    added = ["rawPrediction", "probability", "prediction"]
    assert found.columns == [*digits.columns, *added]
    kinds = [type(found.schema[name].dataType) for name in added[:2]]
    assert kinds == [VectorUDT, VectorUDT]
    assert found.schema["prediction"].dataType.simpleString() == "double"
    for row in found.limit(20).collect():
        raw, probability = row["rawPrediction"].toArray(), row["probability"].toArray()
        assert probability.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(np.exp(raw), probability, rtol=1e-5)
        assert np.argmax(raw) == np.argmax(probability) == row["prediction"]
    assert MulticlassClassificationEvaluator(metricName="accuracy").evaluate(found) > 0.7
    assert MulticlassClassificationEvaluator(metricName="logLoss").evaluate(found) < 2


def test_a_column_is_never_overwritten(model, digits):
    taken = digits.withColumn("Probability", F.lit(1))
    with pytest.raises(errors.ColumnTaken, match="'probability' already"):
        model.transform(taken)
    renamed = model.copy().setProbabilityCol("p").setRawPredictionCol("")
    assert renamed.transform(taken).columns == [*taken.columns, "p", "prediction"]


def test_a_row_that_cannot_be_used(model, digits):
    bad = digits.limit(3).select(F.when(F.lit(False), F.col("image")).alias("image"), "label")
    with pytest.raises(Exception, match="a row to predict has no image"):
        model.transform(bad).collect()
    found = model.copy().setMode("DROPMALFORMED").transform(bad).collect()
    assert [(row["probability"], row["prediction"]) for row in found] == [(None, None)] * 3


def test_in_a_pipeline_saved_and_loaded(spark, tmp_path, store):
    iris = spark_mnist.datasets.iris(spark, "train")
    test = spark_mnist.datasets.iris(spark, "test")
    stages = [
        VectorAssembler(inputCols=MEASURES, outputCol="features"),
        MnistClassifier(featuresCol="features", modelName="iris", store=store)
        .setNumProc(1)
        .setBatchSize(16)
        .setEpochs(60)
        .setVerbose(0),
    ]
    pipeline = Pipeline(stages=stages)
    pipeline.write().overwrite().save(f"file://{tmp_path}/pipeline")
    again = Pipeline.load(f"file://{tmp_path}/pipeline").getStages()[1]
    assert again.extractParamMap() == {
        again.getParam(param.name): value for param, value in stages[1].extractParamMap().items()
    }
    fitted = pipeline.fit(iris)
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy")
    assert accuracy.evaluate(fitted.transform(test)) >= 0.9
    fitted.write().overwrite().save(f"file://{tmp_path}/model")
    fitted.write().overwrite().save(f"file://{tmp_path}/model")
    spark_mnist.delete("iris", store=store)
    loaded = PipelineModel.load(f"file://{tmp_path}/model")
    assert classes(loaded.transform(test)) == classes(fitted.transform(test))
    loaded_model: Any = loaded.stages[1]
    fitted_model: Any = fitted.stages[1]
    assert loaded_model.info == fitted_model.info
    assert loaded.stages[1].uid == fitted.stages[1].uid


def test_a_damaged_save_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "_weights", b"others")
    model.save(f"file://{tmp_path}/model")
    with pytest.raises(errors.DamagedModel, match=r"weights.npz differs from its sha256"):
        MnistClassifierModel.load(f"file://{tmp_path}/model")


def test_under_cross_validation(estimator, digits):
    small = estimator.copy().setModelName("crossed").setNumProc(1).setEpochs(8)
    grid = ParamGridBuilder().addGrid(small.learningRate, [1e-6, 0.01]).build()
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy")
    found: Any = CrossValidator(
        estimator=small, estimatorParamMaps=grid, evaluator=accuracy, numFolds=2, seed=1
    ).fit(digits)
    assert found.avgMetrics[0] < 0.5 < found.avgMetrics[1]
    assert found.bestModel.getLearningRate() == 0.01


def test_a_column_says_which_rows_validate(estimator, digits, store):
    rows = digits.withColumn("held_out", F.xxhash64("image") % 3 == 0)
    count = rows.where("held_out").count()
    params = {
        "validationIndicatorCol": "held_out",
        "modelName": "held_out",
        "epochs": 1,
        "numProc": 1,
    }
    info = estimator.copy().setParams(**params).fit(rows).info
    assert info.rows["validation"] == count
    assert info.rows["train"] == rows.count() - count


def test_every_option_is_a_param():
    names = {param.name for param in MnistClassifier().params}
    assert set(OPTIONS) <= names
    for name in names:
        title = name[0].upper() + name[1:]
        assert callable(getattr(MnistClassifier, f"get{title}"))
        assert callable(getattr(MnistClassifier, f"set{title}"))
    assert "rows of one step" in MnistClassifier().explainParam("batchSize")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"epoch": 1}, errors.UnknownOption, "no Param 'epoch'.*did you mean 'epochs'"),
        ({"epochs": 0}, TypeError, "epochs must be int >= 1, not 0"),
        ({"batchSize": 2.5}, TypeError, "batch_size must be int >= 1, not 2.5"),
        ({"network": "mpl"}, TypeError, "network must be mlp"),
    ],
)
def test_wrong_params(params, error, message):
    with pytest.raises(error, match=message):
        MnistClassifier(**params)


def network():
    import keras

    return keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])


def test_the_model_of_a_users_function_is_saved(digits, tmp_path):
    stage = MnistClassifier(network=network, epochs=1, verbose=0, store=str(tmp_path / "models"))
    fitted = stage.fit(digits)
    fitted.write().overwrite().save(str(tmp_path / "saved"))
    loaded = MnistClassifierModel.load(str(tmp_path / "saved"))
    assert classes(loaded.transform(digits)) == classes(fitted.transform(digits))


def test_a_users_model_trains_on_and_is_applied(digits, tmp_path):
    stage = MnistClassifier(network=network(), epochs=1, verbose=0, store=str(tmp_path / "models"))
    assert stage.fit(digits).transform(digits).select("prediction").distinct().count() > 1


def test_what_is_not_set_has_fits_default():
    stage = MnistClassifier()
    assert (stage.getBatchSize(), stage.getMode(), stage.getSeed()) == (32, "FAILFAST", 0)
    assert "default: 32" in stage.explainParam("batchSize")
    assert stage.option_values() == {}


def test_a_table_whose_column_is_called_image():
    given = MnistClassifier(featuresCol="image", network="dnn").option_values()
    assert given == {"features": "image", "network": "dnn"}
    assert "features" not in MnistClassifier(featuresCol="image").option_values()


@pytest.mark.ranks
def test_two_ranks(estimator, digits, tmp_path):
    pair = estimator.copy().setStore(str(tmp_path)).setNumProc(2).setEpochs(2)
    model = pair.fit(digits)
    assert model.info.ranks == 2
    assert model.transform(digits).where("prediction IS NOT NULL").count() == 256


def test_options_of_python_and_of_the_session(model, digits, spark):
    classifier = MnistClassifier(hidden=(20, 10), lrSchedule=schedules.Cosine(20), cache=1 << 20)
    options = classifier.option_values()
    assert (options["hidden"], options["lr_schedule"]) == ("20,10", "cosine:20")
    assert options["cache"] == 1 << 20
    bad = digits.limit(2).withColumn("image", F.expr("substring(image, 2)"))
    spark.conf.set("spark.mnist.mode", "DROPMALFORMED")
    try:
        predicted = model.transform(bad)
        assert predicted.where("prediction IS NULL").count() == 2
    finally:
        spark.conf.unset("spark.mnist.mode")


@pytest.fixture(scope="module")
def numbers(spark):
    rows = [
        (float(i % 7), float(i % 5), float(i % 7 - 2 * (i % 5)), i % 2, 1.0 + i % 3)
        for i in range(140)
    ]
    return spark.createDataFrame(rows, "a double, b double, y double, z int, w double").cache()


def assembled(numbers):
    return VectorAssembler(inputCols=["a", "b"], outputCol="x").transform(numbers)


def test_a_regressor_under_cross_validation(numbers, store, tmp_path):
    regressor = MnistRegressor(
        featuresCol="x", labelCol="y", weightCol="w", network="dnn", store=store, batchSize=16,
        epochs=3, verbose=0, standardizeLabel=True,
    )  # fmt: skip
    grid = ParamGridBuilder().addGrid(regressor.learningRate, [1e-6, 0.02]).build()
    evaluator = RegressionEvaluator(labelCol="y", metricName="rmse")
    tuner = CrossValidator(
        estimator=regressor, estimatorParamMaps=grid, evaluator=evaluator, numFolds=2, seed=1
    )
    tuned = tuner.fit(assembled(numbers))
    assert tuned.avgMetrics[1] < tuned.avgMetrics[0]
    best: Any = tuned.bestModel
    best.save(str(tmp_path / "saved"))
    loaded = MnistRegressorModel.load(str(tmp_path / "saved"))
    assert type(loaded) is MnistRegressorModel
    rows = assembled(numbers)
    found = loaded.transform(rows)
    assert found.schema["prediction"].dataType.simpleString() == "double"
    assert evaluator.evaluate(found) == evaluator.evaluate(tuned.transform(rows))


def test_thresholds_and_weights_of_two_classes(numbers, store):
    classifier = MnistClassifier(
        featuresCol="x", labelCol="z", weightCol="w", task="binary", network="dnn", store=store,
        batchSize=16, epochs=1, verbose=0, modelName="two",
    )  # fmt: skip
    model = classifier.fit(assembled(numbers))
    found = model.transform(assembled(numbers))
    area = BinaryClassificationEvaluator(labelCol="z").evaluate(found)
    measured = spark_mnist.evaluate(assembled(numbers), "two", rate=1.0, store=store).first()
    assert area == pytest.approx(measured["metrics"]["auc"])
    for thresholds, expected in (([0.0, 1.0], 0), ([1.0, 0.0], 1)):
        assert {*classes(model.copy().setThresholds(thresholds).transform(assembled(numbers)))} == {
            expected
        }
    with pytest.raises(errors.OptionError, match="thresholds has 3 numbers, and there are 2"):
        model.copy().setThresholds([0.1, 0.2, 0.3]).transform(assembled(numbers))


def test_an_estimator_refuses_the_tasks_of_others(numbers):
    for estimator in (MnistClassifier(task="regression"), MnistRegressor(task="binary")):
        with pytest.raises(errors.OptionError, match="learns one output with task="):
            estimator.setParams(labelCol="y", verbose=0).fit(numbers)
