"""Exported models, read by plain Keras and TensorFlow, against the scores in the DataFrame."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import datasets, errors
from spark_mnist.scoring import score_columns
from spark_mnist.store import manifests, model_store
from tests.conftest import FLOWERS, custom_model


@pytest.fixture
def flowers(spark, store):
    """A standardised table's model, its rows, and its scores as executors compute them."""
    iris = datasets.iris(spark)
    spark_mnist.fit(iris, "m", **{**FLOWERS, "epochs": 3}, store=store)
    saved = manifests.load(model_store.Store(store), "m", None, None)
    scores = score_columns.probabilities(iris, saved, batch_size=32)
    rows = np.array(iris.select(*datasets.MEASURES).collect(), "float32")
    return rows, np.array([row[0] for row in iris.select(F.array(scores)[0]).collect()])


def by_keras(path, rows):
    return keras.saving.load_model(path)(rows)


def by_tensorflow(path, rows):
    loaded = tf.saved_model.load(path)
    return loaded.serve(rows)


def by_lite(path, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow recommends another package for this
        interpreter = tf.lite.Interpreter(path)
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(taken["index"], rows.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], rows)
    interpreter.invoke()
    return interpreter.get_tensor(given["index"])


@pytest.mark.parametrize(
    ("format", "name", "read"),
    [
        ("keras", "m.keras", by_keras),
        ("savedmodel", "folder/m", by_tensorflow),
        ("tflite", "m.tflite", by_lite),
    ],
)
def test_others_read_what_was_exported(flowers, store, tmp_path, format, name, read):
    rows, scores = flowers
    path = str(tmp_path / "out" / name)
    assert spark_mnist.export("m", path, format, store=store) == path
    np.testing.assert_allclose(np.asarray(read(path, rows)), scores, atol=1e-5)
    assert list((tmp_path / "out").rglob("*.tmp")) == []
    with pytest.raises(errors.OptionError, match="is there already"):
        spark_mnist.export("m", path, format, store=store)


def test_pictures_of_a_model_with_objects_of_its_own(digits, store, tmp_path):
    spark_mnist.fit(digits, "m", network=custom_model, epochs=1, store=store, verbose=0)
    path = str(tmp_path / "m.tflite")
    with pytest.raises(errors.ModelMismatch, match="give the function"):
        spark_mnist.export("m", path, "tflite", store=store)
    spark_mnist.export("m", path, "tflite", store=store, network=custom_model)
    sums = by_lite(path, np.random.default_rng(0).random((4, 784), "float32")).sum(axis=1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        ("m.keras", "onnx", "format must be keras or savedmodel or tflite, not 'onnx'"),
        ("m", "kera", "did you mean 'keras'"),
        ("m.h5", "keras", r"a file \*.keras, not from .*m.h5"),
    ],
)
def test_formats_that_are_none(tmp_path, path, format, message):
    with pytest.raises(errors.OptionError, match=message):
        spark_mnist.export("m", tmp_path / path, format)


def test_features_far_from_zero_are_exported_as_doubles(spark, store, tmp_path):
    far = datasets.iris(spark).selectExpr("petal_length + 1.7e9 AS x", "species")
    options = {"features": "x", "label": "species", "epochs": 5, "store": store, "verbose": 0}
    spark_mnist.fit(far, "far", **options)
    with pytest.raises(errors.OptionError, match="format=tflite takes floats"):
        spark_mnist.export("far", tmp_path / "far.tflite", "tflite", store=store)
    path = spark_mnist.export("far", tmp_path / "far.keras", store=store)
    rows = far.collect()
    outputs = np.asarray(keras.saving.load_model(path)(np.array([[row["x"]] for row in rows])))
    names = ["setosa", "versicolor", "virginica"]
    answers = spark_mnist.predict(far, "far", interpret=True, store=store).collect()
    assert [names[i] for i in outputs.argmax(axis=1)] == [row["interpreted"] for row in answers]


def test_numbers_are_exported_in_the_units_of_the_label(spark, store, tmp_path):
    iris = datasets.iris(spark).withColumn("grams", 100 + 20 * F.col("petal_width"))
    options = {**FLOWERS, "label": "grams", "task": "regression", "epochs": 2, "store": store}
    spark_mnist.fit(iris, "m", **options)
    path = spark_mnist.export("m", tmp_path / "m.keras", store=store)
    rows = np.array(iris.select(*datasets.MEASURES).collect(), "float32")
    predicted = spark_mnist.predict(iris, "m", store=store).select("prediction").collect()
    np.testing.assert_allclose(by_keras(path, rows)[:, 0], np.array(predicted)[:, 0], rtol=1e-5)
