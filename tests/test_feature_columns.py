import numpy as np
import pyarrow as pa
import pytest
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import column_names, feature_columns, labels, profile
from spark_mnist.networks import registry

PICTURES = plan.InputSpec()
PICTURE = np.random.default_rng(0).integers(0, 256, 784)
FORMS = {  # name: (Spark type, the same picture)
    "binary": (T.BinaryType(), PICTURE.astype("uint8").tobytes()),
    "bytes": (T.ArrayType(T.ShortType()), PICTURE.tolist()),
    "integers": (T.ArrayType(T.IntegerType()), PICTURE.tolist()),
    "longs": (T.ArrayType(T.LongType()), PICTURE.tolist()),
    "floats": (T.ArrayType(T.FloatType()), (PICTURE / 255).tolist()),
    "doubles": (T.ArrayType(T.DoubleType()), (PICTURE / 255).tolist()),
    "dense vector": (VectorUDT(), Vectors.dense(PICTURE / 255)),
    "sparse vector": (VectorUDT(), Vectors.sparse(784, np.arange(784), PICTURE / 255)),
    "text": (T.StringType(), ",".join(str(p) for p in PICTURE / 255)),
    "text with blanks": (T.StringType(), " , ".join(str(p) for p in PICTURE / 255)),
}
ONE_HOT = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
LABELS = {
    "int": (T.IntegerType(), 3),
    "long": (T.LongType(), 3),
    "double": (T.DoubleType(), 3.0),
    "text": (T.StringType(), " 3"),
    "one-hot ints": (T.ArrayType(T.IntegerType()), ONE_HOT),
    "one-hot doubles": (T.ArrayType(T.DoubleType()), [float(x) for x in ONE_HOT]),
    "one-hot vector": (VectorUDT(), Vectors.dense(ONE_HOT)),
    "one-hot text": (T.StringType(), "0,0,0,1,0,0,0,0,0,0"),
}


def frame(spark, image, label):
    fields = [T.StructField("image", image[0]), T.StructField("label", label[0])]
    return spark.createDataFrame([(image[1], label[1])], T.StructType(fields))


@pytest.mark.parametrize("form", FORMS)
def test_every_representation_gives_the_same_tensor(spark, form):
    df = frame(spark, FORMS[form], LABELS["int"])
    source = feature_columns.features(df, PICTURES)
    expected = (PICTURE / 255).astype("float32").reshape(1, 784)
    scored = feature_columns.reader(source)(
        pa.array(df.select(source.column).toPandas().iloc[:, 0])
    )
    packed = df.select(feature_columns.pack(source)).first()[0]
    trained = source.encoding.unpack([bytes(packed)])
    tensor = registry.numbers(scored, source.encoding.scale)
    np.testing.assert_allclose(tensor, expected, atol=6e-8)
    assert trained.dtype == scored.dtype == source.encoding.dtype
    np.testing.assert_array_equal(trained, scored)
    assert profile.profile_rows(df, PICTURES).rows == 1


def test_every_representation_has_the_same_place_in_the_order(spark):
    keys = set()
    for image in FORMS.values():
        df = frame(spark, image, LABELS["int"])
        source = feature_columns.features(df, PICTURES)
        keys.add(df.select(feature_columns.order_key(source, 7, F.col("label"))).first()[0])
    assert len(keys) == 1


def test_an_order_of_doubles_is_that_of_floats(spark):
    input_spec = plan.InputSpec(features=("x",), pixels=False, width=2, classes=2)
    keys = set()
    for kind in ("double", "float"):
        df = spark.createDataFrame([([0.1, 7.0], 1)], f"x array<{kind}>, label int")
        for standardized in (True, False):
            source = feature_columns.features(df, input_spec, standardized=standardized)
            keys.add(df.select(feature_columns.order_key(source, 7, F.col("label"))).first()[0])
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("PNG", b"\x89PNG\r\n\x1a\n" + bytes(776)),
        ("JPEG", b"\xff\xd8\xff\xe0" + bytes(780)),
        ("GIF", b"GIF89a" + bytes(778)),
        ("BMP", b"BM\x10\x03\x00\x00" + bytes(778)),
        ("TIFF", b"II*\x00" + bytes(780)),
        ("WebP", b"RIFF\x00\x00\x00\x00WEBP" + bytes(772)),
    ],
)
def test_files_are_no_pixels(spark, kind, content):
    assert len(content) == 784
    df = frame(spark, (T.BinaryType(), content), LABELS["int"])
    with pytest.raises(errors.BadRows, match=f"1 x image is a {kind} file, not pixels"):
        profile.profile_rows(df, PICTURES)
    if kind != "BMP":
        source = feature_columns.features(df, PICTURES)
        with pytest.raises(errors.BadRows, match="has a file in image, not pixels: decode it"):
            feature_columns.reader(source)(pa.array([content]))


@pytest.mark.parametrize("form", LABELS)
def test_every_label_form_gives_the_same_class(spark, form):
    df = frame(spark, FORMS["binary"], LABELS[form])
    assert df.select(labels.column(df, PICTURES).alias("label")).first()[0] == 3
    assert profile.profile_rows(df, PICTURES).rows == 1


def changed(index, value):
    pixels = (PICTURE / 255).tolist()
    pixels[index] = value
    return pixels


DOUBLES, INTEGERS, TEXT = FORMS["doubles"][0], FORMS["integers"][0], T.StringType()


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (DOUBLES, None, "is null"),
        (DOUBLES, [0.0] * 783, "pixels, not 784"),
        (DOUBLES, [0.0] * 785, "pixels, not 784"),
        (DOUBLES, [], "pixels, not 784"),
        (DOUBLES, changed(5, None), "no number"),
        (DOUBLES, changed(5, float("nan")), "no number"),
        (DOUBLES, changed(5, float("inf")), "infinite"),
        (DOUBLES, changed(5, -0.1), "outside 0..1"),
        (DOUBLES, changed(5, 255.0), "outside 0..1"),
        (INTEGERS, [256] + [0] * 783, "outside 0..255"),
        (INTEGERS, [-1] + [0] * 783, "outside 0..255"),
        (INTEGERS, [-(2**31)] + [0] * 783, "outside 0..255"),
        (T.ArrayType(T.ByteType()), [-128] + [0] * 783, "outside 0..255"),
        (T.ArrayType(T.LongType()), [10**12] + [0] * 783, "outside 0..255"),
        (T.BinaryType(), b"\0" * 783, "pixels, not 784"),
        (VectorUDT(), Vectors.dense([0.5]), "pixels, not 784"),
        (VectorUDT(), None, "is null"),
        (TEXT, "", "pixels, not 784"),
        (TEXT, ",".join(["0"] * 783 + ["x"]), "no number"),
        (TEXT, ",".join(["0"] * 783 + ["7"]), "outside 0..1"),
    ],
)
def test_images_that_are_none_are_counted_with_the_reason(spark, kind, value, why):
    df = frame(spark, (kind, value), LABELS["int"])
    good = frame(spark, (kind, blank(kind)), LABELS["int"])
    with pytest.raises(errors.BadRows, match=rf"1 of 2 rows cannot be used: 1 x image.*{why}"):
        profile.profile_rows(df.union(good), PICTURES)


def blank(kind):
    if isinstance(kind, T.ArrayType):
        return [0.0 if kind.elementType == T.DoubleType() else 0] * 784
    forms = {"binary": b"\0" * 784, "string": ",".join(["0"] * 784)}
    return forms.get(kind.typeName(), Vectors.dense([0.0] * 784))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (T.IntegerType(), None), (T.IntegerType(), 10), (T.IntegerType(), -1),
        (T.LongType(), 10**15), (T.DoubleType(), 3.5), (T.DoubleType(), float("nan")),
        (TEXT, "seven"), (TEXT, "3.5"), (TEXT, ""), (TEXT, "0,1"),
        (T.ArrayType(T.IntegerType()), [0] * 10), (T.ArrayType(T.IntegerType()), [1, 1] + [0] * 8),
        (T.ArrayType(T.IntegerType()), [1, None] + [0] * 8), (T.ArrayType(T.IntegerType()), [1] + [0] * 8),
        (T.ArrayType(T.DoubleType()), [0.5, 0.5] + [0.0] * 8),
        (VectorUDT(), Vectors.dense([2.0] + [0.0] * 9)),
    ],
)  # fmt: skip
def test_labels_that_are_none_are_counted(spark, kind, value):
    why = "label is null" if value is None else r"label is neither 0..9 nor one-hot"
    with pytest.raises(ValueError, match=f"1 of 1 rows .*{why}"):
        profile.profile_rows(frame(spark, FORMS["binary"], (kind, value)), PICTURES)


def test_no_rows(spark):
    empty = frame(spark, FORMS["binary"], LABELS["int"]).where("label = 4")
    with pytest.raises(errors.TooFewRows, match="no rows"):
        profile.profile_rows(empty, PICTURES)


def test_a_missing_column_is_a_key_error_with_the_nearest_name(spark):
    df = frame(spark, FORMS["binary"], LABELS["int"]).withColumnRenamed("label", "lable")
    with pytest.raises(KeyError, match=r"no column 'label' among .*did you mean 'lable'"):
        labels.column(df, PICTURES)


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_type_without_tensor_form_is_a_type_error(spark, column):
    df = frame(spark, FORMS["binary"], LABELS["int"]).withColumn(column, F.current_date())
    with pytest.raises(TypeError, match=f"column '{column}' is date; it may be"):
        profile.profile_rows(df, PICTURES)


@pytest.mark.parametrize("bad", [None, np.zeros(783), np.full(784, np.nan), np.full(784, 1.5)])
def test_rows_to_predict_are_checked_when_they_are_read(spark, bad):
    source = feature_columns.features(frame(spark, FORMS["doubles"], LABELS["int"]), PICTURES)
    with pytest.raises(errors.BadRows, match="a row to predict"):
        feature_columns.reader(source)(pa.array([np.zeros(784), bad]))


def test_large_numbers_that_are_one_float_have_places_of_their_own(spark):
    input_spec = plan.InputSpec(features=("x",), pixels=False, width=1, classes=2)
    df = spark.createDataFrame([([1.7e9 + i], 1) for i in range(50)], "x array<double>, label int")
    source = feature_columns.features(df, input_spec, standardized=True)
    assert df.select(feature_columns.order_key(source, 7, F.col("label"))).distinct().count() == 50


def test_only_a_star_is_a_pattern():
    columns = ["x[0]a", "x0", "label"]
    assert column_names.expand(columns, ["x[0]*"]) == ("x[0]a",)
    assert column_names.expand(columns, ["x*"]) == ("x[0]a", "x0")


def test_the_added_array_has_a_name_that_no_column_has(spark):
    df = spark.createDataFrame([(1.0, 2.0, "x")], "a double, b double, Spark_MNIST_Features string")
    source = feature_columns.features(
        df, plan.InputSpec(features=("a", "b"), pixels=False, width=2)
    )
    with_array, source = feature_columns.with_array(df, source)
    assert with_array.columns == [*df.columns, f"{feature_columns.ARRAY_COLUMN}_"]
    assert with_array.select(source.column).first()[0] == [1.0, 2.0]
