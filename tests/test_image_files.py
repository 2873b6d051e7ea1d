"""Image files: what is decoded equals what Pillow gives on the driver, to the byte."""

import importlib.util
import io
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import datasets, errors
from spark_mnist.core import plan
from spark_mnist.data import feature_columns, image_files, profile

CLASSES = ("circle", "cross", "two words")
GREY = image_files.PixelFormat(28, 28, "L")
RNG = np.random.default_rng(5)


def picture(kind, *, size=28, mode="L"):
    """A noisy square, in a place of its own for each class."""
    channels = image_files.CHANNELS[mode]
    pixels = RNG.integers(0, 60, (size, size, channels), np.uint8)
    start = CLASSES.index(kind) * size // 3
    pixels[start : start + size // 3] = RNG.integers(200, 256, (size // 3, size, channels))
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def content(image, kind="PNG", **options):
    """An image file's content."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def expected(file, target=GREY):
    """Pixels as Pillow gives them."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        converted = image.convert(target.mode)
        size = (target.width, target.height)
        bilinear = Image.Resampling.BILINEAR
        return converted.resize(size, bilinear).tobytes()


def jobs_of(spark, function):
    """Number of the jobs that a function starts, and what it returns."""
    group = f"jobs of {function}"
    spark.sparkContext.setJobGroup(group, "")
    try:
        result = function()
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)
    return len(spark.sparkContext.statusTracker().getJobIdsForGroup(group)), result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of twenty grey pictures, half of them JPEG."""
    root = tmp_path_factory.mktemp("pictures")
    for kind in CLASSES:
        (root / kind).mkdir()
        for number in range(20):
            name = root / kind / f"{number}.{'png' if number % 2 else 'jpg'}"
            picture(kind).save(name)
    return root


@pytest.fixture
def damaged(folder, tmp_path):
    """The same folder, and one with a file that is cut off."""
    shutil.copytree(folder, tmp_path / "damaged")
    whole = (folder / "cross" / "1.png").read_bytes()
    (tmp_path / "damaged" / "cross" / "cut_off.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "damaged"


def by_path(df):
    return {row["path"].removeprefix("file:"): row for row in df.collect()}


def test_files_are_labelled_by_folder_and_equal_pillows(spark, folder):
    df = datasets.images(spark, folder)
    assert df.dtypes == [("path", "string"), ("image", "binary"), ("label", "string")]
    rows = by_path(df)
    assert {path: row["label"] for path, row in rows.items()} == {
        str(file): file.parent.name for file in folder.glob("*/*")
    }
    for path, row in rows.items():
        assert bytes(row["image"]) == expected(path)


def test_a_glob_names_some_of_the_files(spark, folder):
    df = datasets.images(spark, f"{folder}/c*/*.png")
    counts = {row["label"]: row["count"] for row in df.groupBy("label").count().collect()}
    assert counts == {"circle": 10, "cross": 10}


def test_nothing_is_decoded_before_rows_are_read(spark, folder):
    count, df = jobs_of(spark, lambda: datasets.images(spark, folder))
    assert count == 0
    count, _ = jobs_of(spark, lambda: datasets.decode(df, "image"))
    assert count == 0
    count, _ = jobs_of(spark, df.collect)
    assert count == 1


def test_colours_and_other_sizes(spark, tmp_path):
    target = image_files.PixelFormat(20, 40, "RGB")
    (tmp_path / "one").mkdir()
    for size, kind in ((32, "png"), (40, "png"), (32, "jpg")):
        picture("cross", size=size, mode="RGB").save(tmp_path / "one" / f"{size}.{kind}")
    picture("circle", size=32, mode="RGBA").save(tmp_path / "one" / "alpha.png")
    picture("circle", size=32, mode="RGB").quantize(9).save(tmp_path / "one" / "palette.gif")
    rows = by_path(datasets.images(spark, tmp_path, size=(20, 40), mode="RGB"))
    assert len(rows) == 5
    for path, row in rows.items():
        assert len(row["image"]) == 20 * 40 * 3
        assert bytes(row["image"]) == expected(path, target)
    same = by_path(datasets.images(spark, f"{tmp_path}/one/32.png", size=[32, 32], mode="RGB"))
    with Image.open(tmp_path / "one" / "32.png") as image:
        assert [bytes(row["image"]) for row in same.values()] == [image.tobytes()]


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("file:/a/b/c.png", "b"),
        ("file:/b/c.png", "b"),
        ("file:/c.png", ""),
        ("s3a://bucket/c.png", ""),
        ("s3a://bucket/b/c.png", "b"),
        ("s3a://bucket/x/ä b=1%20/c d.png", "ä b=1%20"),
        ("hdfs://host:8020/x/b/c.png", "b"),
    ],
)
def test_the_label_is_the_folder_not_the_host(spark, url, folder):
    df = spark.createDataFrame([(url,)], "path string")
    pattern = datasets.FOLDER_PATTERN
    assert df.select(F.regexp_extract("path", pattern, 1)).first()[0] == folder


def test_a_broken_file_stops_a_fit_with_its_path(spark, damaged, store):
    df = datasets.images(spark, damaged)
    assert df.where("image IS NULL").count() == 1
    options = {"features": "image", "epochs": 1, "verbose": 0, "store": store}
    message = (
        r"1 of 61 rows cannot be used: 1 x image is null; for instance "
        r"{'image': None, 'label': 'cross'} of file:/\S+/cross/cut_off.png\. Correct them"
    )
    with pytest.raises(errors.BadRows, match=message):
        spark_mnist.fit(df, "m", **options)
    result = spark_mnist.fit(df, "m", mode="DROPMALFORMED", **options)
    assert dict(result.rows.dropped) == {"image is null": 1}


def test_a_path_is_named_only_where_it_is_text(spark):
    df = spark.createDataFrame([(None, 3, 7)], "image binary, label int, path int")
    for rows, end in (
        (df, "'label': 3}"),
        (df.withColumn("path", F.lit(None).cast("string")), "}"),
    ):
        with pytest.raises(errors.BadRows, match=rf"{end}\. Correct"):
            profile.profile_rows(rows, plan.InputSpec())


def test_pictures_are_learned_and_told_apart(spark, folder, store):
    df = datasets.images(spark, folder).persist()
    options = {"verbose": 0, "store": store}
    spark_mnist.fit(df, "m", features="image", epochs=20, batch_size=8, **options)
    told = spark_mnist.predict(df, "m", interpret=True, **options)
    assert told.where("interpreted = label").count() >= 57
    df.unpersist()


def test_decode_replaces_a_column_in_place(spark):
    files = [content(picture(kind), format) for kind in CLASSES for format in ("PNG", "JPEG")]
    rows = [*enumerate(files), (6, None), (7, b"no picture"), (8, files[0][:99])]
    df = spark.createDataFrame([(n, f, -n) for n, f in rows], "n int, `a.b` binary, m int")
    decoded = datasets.decode(df, "A.B")
    assert decoded.dtypes == [("n", "int"), ("a.b", "binary"), ("m", "int")]
    images = [row["a.b"] for row in decoded.orderBy("n").collect()]
    assert [bytes(image) for image in images[:6]] == [expected(file) for file in files]
    assert images[6:] == [None] * 3


@pytest.mark.parametrize("mode", image_files.CHANNELS)
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_an_image_struct_gives_what_its_file_gives(spark, tmp_path, mode, target):
    path = tmp_path / "one" / "x.png"
    path.parent.mkdir()
    picture("cross", size=30, mode=mode).save(path)
    (tmp_path / "one" / "y.png").write_bytes(b"no picture")
    structs = spark.read.format("image").load(str(tmp_path / "one"))
    decoded = datasets.decode(structs, "image", size=(28, 30), mode=target)
    assert decoded.dtypes == [("image", "binary")]
    (file,) = datasets.images(spark, path, size=(28, 30), mode=target).collect()
    images = {row["image"] and bytes(row["image"]) for row in decoded.collect()}
    assert images == {bytes(file["image"]), None}


@pytest.mark.parametrize(
    ("row", "pixels"),
    [
        ((2, 1, 0, bytes([1, 2])), bytes([1, 1, 1, 2, 2, 2])),
        ((1, 2, 16, bytes([1, 2, 3, 4, 5, 6])), bytes([3, 2, 1, 6, 5, 4])),
        ((1, 1, 24, bytes([1, 2, 3, 4])), bytes([3, 2, 1])),
        ((1, 2, 16, bytes(5)), None),
        ((1, 2, 5, bytes(8)), None),  # CV_32F
        ((-1, -1, -1, b""), None),
        ((1, 2, 16, None), None),
    ],
)
def test_channels_of_a_struct_are_blue_green_red(row, pixels):
    target = image_files.PixelFormat(row[0], row[1], "RGB")
    assert image_files.decode_struct(*row, target=target) == pixels


def test_a_struct_that_is_null(spark):
    schema = (
        "struct<origin: string, height: int, width: int, nChannels: int, mode: int, data: binary>"
    )
    df = spark.createDataFrame(
        [(("x", 1, 1, 1, 0, bytes([7])),), (None,)], f"image {schema}"
    ).coalesce(1)
    found = [row["image"] for row in datasets.decode(df, "image", size=(1, 1)).collect()]
    assert [image and bytes(image) for image in found] == [bytes([7]), None]


def test_exif_turns_a_picture_upright():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = image_files.decode_file(content(image, exif=exif), image_files.PixelFormat(3, 2, "L"))
    assert np.frombuffer(upright, np.uint8).reshape(3, 2).tolist() == [[3, 0], [4, 1], [5, 2]]


def test_sixteen_bits_keep_the_upper_eight():
    values = np.array([[0, 255, 256], [4096, 40000, 65535]], np.uint16)
    file = content(Image.fromarray(values))
    small = image_files.decode_file(file, image_files.PixelFormat(2, 3, "L"))
    assert list(small) == (values >> 8).ravel().tolist()


def test_floats_have_no_range():
    image = Image.fromarray(np.ones((28, 28), np.float32))
    assert image_files.decode_file(content(image, "TIFF"), GREY) is None


def test_a_decompression_bomb_is_a_broken_file(monkeypatch):
    file = content(picture("cross", size=60))
    assert image_files.decode_file(file, GREY) is not None
    for limit in (3599, 1000):  # Pillow warns, Pillow raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert image_files.decode_file(file, GREY) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "CMYK"}, "mode must be one of L, RGB, RGBA, not 'CMYK'"),
        ({"mode": None}, "mode must be one of L, RGB, RGBA, not None"),
        ({"mode": ["L"]}, "mode must be one of L, RGB, RGBA, not"),
        ({"size": 28}, r"size must be height and width as positive integers, \(28, 28\), not 28"),
        ({"size": (28,)}, "size must be"),
        ({"size": (0, 28)}, "size must be"),
        ({"size": (28.0, 28)}, "size must be"),
        ({"size": (True, 28)}, "size must be"),
        ({"size": "28"}, "size must be"),
        ({"size": (20_000, 20_000)}, "400,000,000 bytes a picture in mode L; at most 134,217,728"),
    ],
)
def test_options_that_are_not_allowed(spark, options, message):
    df = spark.createDataFrame([(b"",)], "image binary")
    for call in (
        lambda: datasets.images(spark, "nowhere", **options),
        lambda: datasets.decode(df, "image", **options),
    ):
        with pytest.raises(errors.OptionError, match=message):
            call()


def test_columns_that_cannot_be_decoded(spark):
    df = spark.createDataFrame([(b"", 1)], "image binary, label int")
    with pytest.raises(errors.MissingColumn, match=r"no column 'imag' .*did you mean 'image'"):
        datasets.decode(df, "imag")
    with pytest.raises(errors.UnreadableColumn, match="column 'label' is int; it may be binary"):
        datasets.decode(df, "label")
    with pytest.raises(errors.NotADataFrame):
        datasets.decode("pictures", "image")


def test_a_path_that_nothing_matches(spark, tmp_path):
    with pytest.raises(errors.DatasetError, match=r"nowhere\S* cannot be read: "):
        datasets.images(spark, tmp_path / "nowhere" / "*.png")


def test_errors_on_undecoded_pictures_name_the_remedy(spark, folder):
    structs = spark.read.format("image").load(f"{folder}/cross").withColumn("label", F.lit(1))
    with pytest.raises(
        errors.UnreadableColumn,
        match=r"is an image struct of Spark, not pixels: decode it with spark_mnist\.datasets\.decode",
    ):
        feature_columns.features(structs, plan.InputSpec())
    files = spark.createDataFrame([(content(picture("cross")), 1)], "image binary, label int")
    with pytest.raises(
        errors.BadRows, match=r"PNG file, not pixels: decode it with spark_mnist\.datasets\.decode"
    ):
        profile.profile_rows(files, plan.InputSpec())
    assert profile.profile_rows(datasets.decode(files, "image"), plan.InputSpec()).rows == 1


def test_without_pillow_the_driver_names_the_extra(spark, monkeypatch):
    real = importlib.util.find_spec

    def without(name, *rest):
        return None if name == "PIL" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(errors.VersionError, match=r"install spark-mnist\[images\]"):
        datasets.images(spark, "pictures")
    with pytest.raises(errors.VersionError, match=r"install spark-mnist\[images\]"):
        datasets.decode(spark.createDataFrame([(b"",)], "image binary"), "image")


def test_without_pillow_an_executor_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = r"Spark's workers cannot import Pillow, .*install spark-mnist\[images\] there"
    with pytest.raises(errors.VersionError, match=message):
        image_files.decode_file(b"", GREY)


@pytest.mark.parametrize(
    ("version", "limits"),
    [("3.5.0", False), ("4.0.2", False), ("4.1.4", True), ("4.10.0-vendor-1", True)],
)
def test_releases_that_limit_bytes(version, limits):
    assert image_files._limits_bytes(version) == limits


@pytest.mark.parametrize(
    ("size", "limits", "rows"),
    [((28, 28), True, 10_000), ((1024, 1024), True, 128), ((28, 28), False, 128)],
)
def test_batches_are_such_that_executors_can_hold_them(spark, monkeypatch, size, limits, rows):
    before = spark.conf.get(feature_columns.ARROW_ROWS)
    df = spark.createDataFrame([(b"",)], "image binary")
    monkeypatch.setattr(image_files, "_limits_bytes", lambda version: limits)
    spark.conf.set(feature_columns.ARROW_ROWS, 10_000)
    try:
        datasets.decode(df, "image", size=size)
        assert int(spark.conf.get(feature_columns.ARROW_ROWS)) == rows
    finally:
        spark.conf.set(feature_columns.ARROW_ROWS, before)
