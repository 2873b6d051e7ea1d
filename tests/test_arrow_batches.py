import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import functions as F

from spark_mnist.data import arrow_batches

WAYS = {"arrow or pandas": arrow_batches.by_batch, "pandas": arrow_batches._by_pandas_batch}
TABLE = "i int, b binary, n array<int>, x array<double>"


@pytest.fixture(scope="module")
def table(spark):
    rows = [
        (1, b"\x00\x01", [1, 2], [0.5, -1.0]),
        (2, None, None, None),
        (3, b"", [], []),
        (4, b"\xff", [7], [float("nan")]),
        (5, b"abc", [1, 2, 3], [1e300, 2.0, 3.0]),
    ]
    return spark.createDataFrame(rows, TABLE).repartition(2)


def by_number(df, column):
    return {row.i: row.value for row in df.select("i", column.alias("value")).collect()}


@pytest.mark.parametrize("way", WAYS)
def test_lists_are_packed_row_by_row(table, way):
    def pack(batches):
        return (arrow_batches.packed(rows, "<f4") for (rows,) in batches)

    packed = by_number(table, WAYS[way](pack, "binary")("n"))
    expected = {row.i: row.n for row in table.collect()}
    for number, values in expected.items():
        assert packed[number] == (None if values is None else np.asarray(values, "<f4").tobytes())


@pytest.mark.parametrize("way", WAYS)
def test_several_columns_come_as_one_batch(table, way):
    def lengths(batches):
        for columns in batches:
            yield pa.array(sum(map(arrow_batches.row_lengths, columns)), pa.int32())

    assert by_number(table, WAYS[way](lengths, "int")("b", "n", "x")) == {
        1: 6,
        2: 0,
        3: 0,
        4: 3,
        5: 9,
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_is_null_throughout(table, way):
    def pack(batches):
        return (arrow_batches.packed(rows, "<f8") for (rows,) in batches)

    nothing = by_number(table, WAYS[way](pack, "binary")(F.lit(None).cast("array<double>")))
    assert set(nothing.values()) == {None}


@pytest.mark.parametrize("large", [False, True])
def test_large_types_are_read_too(spark, table, large):
    setting = "spark.sql.execution.arrow.useLargeVarTypes"
    before = spark.conf.get(setting, "false")
    spark.conf.set(setting, str(large).lower())
    try:
        test_lists_are_packed_row_by_row(table, "arrow or pandas")
        test_several_columns_come_as_one_batch(table, "arrow or pandas")
    finally:
        spark.conf.set(setting, before)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_of_a_slice_are_its_own(kind):
    rows = pa.array([b"ab", b"cd", None, b"", b"ef"], kind)
    assert arrow_batches.numbers(rows).tobytes() == b"abcdef"
    assert arrow_batches.numbers(rows[1:4]).tobytes() == b"cd"
    assert arrow_batches.numbers(rows[2:3]).size == 0
    assert [*arrow_batches.row_lengths(rows[1:])] == [2, 0, 0, 2]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())])
def test_numbers_of_a_slice_are_its_own(kind):
    rows = pa.array([[1, 2], None, [3], []], kind)
    assert [*arrow_batches.numbers(rows[1:])] == [3]
    assert [*arrow_batches.row_lengths(rows[1:])] == [0, 1, 0]
    assert arrow_batches.packed(rows[1:], "uint8").to_pylist() == [None, b"\x03", b""]


def test_a_number_that_is_null_is_not_a_number():
    numbers = arrow_batches.numbers(pa.array([[1.0, None]]))
    np.testing.assert_array_equal(numbers, [1.0, np.nan])


def test_values_are_spread_over_the_rows_that_are_valid():
    is_valid = pa.array([False, True, True, False])
    values = arrow_batches.lists(np.asarray([[1.0, 2.0], [3.0, 4.0]]))
    assert arrow_batches.spread(values, is_valid).to_pylist() == [None, [1, 2], [3, 4], None]
    nothing = arrow_batches.lists(np.empty((0, 2)))
    assert arrow_batches.spread(nothing, pa.array([False, False])).to_pylist() == [None, None]
