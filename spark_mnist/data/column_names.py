"""Names of columns: patterns, spellings, and what is said of a name that no column has.

Runs on: driver.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan

logger = logging.getLogger(__name__)

WILDCARD = "*"
"""Wildcard: a name that has it stands for several columns."""
MAX_SHOWN_COLUMNS = 10
"""Most columns that a message names."""


def expand(
    columns: Sequence[str], names: Sequence[str], non_features: Sequence[str | None] = ()
) -> tuple[str, ...]:
    """Replace each pattern like ``pixel*`` by the columns that it matches, in their order.

    Args:
        columns: Columns of the DataFrame.
        names: Names of columns, or patterns.
        non_features: Columns that are not features, in any spelling: patterns do not match them.

    Raises:
        errors.MissingColumn: A pattern matches no column.
    """
    feature_names: list[str] = []
    non_feature_keys = [canonical(name) for name in non_features if name]
    for name in names:
        if WILDCARD not in name or name in columns:
            feature_names.append(name)
            continue
        candidates = [other for other in columns if canonical(other) not in non_feature_keys]
        pattern = ".*".join(map(re.escape, name.split(WILDCARD)))
        matches = [other for other in candidates if re.fullmatch(pattern, other, re.DOTALL)]
        if not matches:
            raise errors.MissingColumn(f"no column matches {name!r} among {abbreviate(columns)}")
        feature_names += [
            other for other in matches if other not in names and other not in feature_names
        ]
    return tuple(feature_names)


def canonical(name: str) -> str:
    """Return the form that all spellings of a column's name share."""
    return name.strip().lower()


def pixel_columns(
    df: DataFrame, input_spec: plan.InputSpec, non_features: Sequence[str | None]
) -> tuple[str, ...]:
    """Return the pixel columns of a table that has no other columns, or ().

    Args:
        df: The table.
        input_spec: The specification of pictures in one column.
        non_features: Columns that are not features.
    """
    non_feature_keys = [canonical(name) for name in non_features if name]
    names = tuple(name for name in df.columns if canonical(name) not in non_feature_keys)
    if (
        canonical(input_spec.features[0]) in map(canonical, df.columns)
        or len(names) != input_spec.width
    ):
        return ()
    logger.info("%s to %s are the pixels", names[0], names[-1])
    return names


def resolve(df: DataFrame, name: str) -> str:
    """Return the column that a name means: the exact name, or the only one that Spark would find.

    Case counts where ``spark.sql.caseSensitive`` is true. Blanks around a name, as headers of CSV
    files have them, count where they tell two columns apart.

    Raises:
        errors.MissingColumn: No column has that name.
        errors.UnreadableColumn: Several columns have that name.
    """
    candidates = _names_by_canonical_name(tuple(df.columns)).get(canonical(name), [])
    if candidates == [name]:
        return name
    if str(df.sparkSession.conf.get("spark.sql.caseSensitive")).lower() == "true":
        spellings: tuple[Callable[[str], str], ...] = (str, str.strip)
    else:
        spellings = (str.lower, lambda text: text.lower().strip())
    for spelling in spellings:
        matches = [other for other in candidates if spelling(other) == spelling(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise errors.UnreadableColumn(
                f"the DataFrame has {len(matches)} columns called {name!r} ({', '.join(matches)}): "
                "rename all but one"
            )
    raise errors.MissingColumn(_missing_column_message(df, name))


@functools.lru_cache(maxsize=8)
def _names_by_canonical_name(names: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Return the names of columns in groups that differ only in case and in blanks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(canonical(name), []).append(name)
    return groups


def _missing_column_message(df: DataFrame, name: str) -> str:
    """Return a message that a column does not exist, with the probable reason."""
    names = df.columns
    if not names:
        return f"no column {name!r}: the DataFrame has no columns at all; is the file empty?"
    message = f"no column {name!r} among {abbreviate(names)}{errors.did_you_mean(name, names)}"
    if names == ["_corrupt_record"]:
        return f"{message}; the JSON has not one object a line: read it with multiLine=true"
    if len(names) == 1 and (mark := next((m for m in ";\t|" if m in names[0]), None)):
        return f"{message}; the file is separated by {mark!r}: read it with sep={mark!r}"
    values = [other for other in names if re.fullmatch(r"[-+]?\d+(\.\d+)*(_\d+)?", other)]
    if len(values) > len(names) / 2:
        return f"{message}; these look like values: without a header, read it with header=false"
    if all(re.fullmatch(r"_c\d+", other) for other in names):
        return f"{message}; if the file has a header, read it with header=true"
    struct, _, field = name.partition(".")
    structs = [each.name for each in df.schema if isinstance(each.dataType, T.StructType)]
    if field and struct in structs:
        return f"{message}; of a struct, select the field first: df.select('*', '{struct}.{field}')"
    if name == plan.InputSpec.features[0]:
        return f"{message}; name the columns to learn from with features="
    return message


def abbreviate(names: Sequence[str]) -> str:
    """Return the first of many names as text, and how many there are."""
    if len(names) <= MAX_SHOWN_COLUMNS:
        return str(list(names))
    return f"{str(list(names[:MAX_SHOWN_COLUMNS])).removesuffix(']')}, ...], {len(names)} in all"


def quote(name: str) -> str:
    """Return a column's name as SQL quotes it."""
    return f"`{name.replace('`', '``')}`"


def column(df: DataFrame, name: str) -> tuple[Column, T.DataType]:
    """Return a column and its type.

    Raises:
        errors.MissingColumn: No column has that name.
        errors.UnreadableColumn: Several columns have that name.
    """
    exact_name, data_type = field(df, name)
    return df[quote(exact_name)], data_type


def field(df: DataFrame, name: str) -> tuple[str, T.DataType]:
    """Return the exact name of a column, and its type; raises as ``resolve``."""
    exact_name = resolve(df, name)
    return exact_name, df.schema[df.columns.index(exact_name)].dataType
