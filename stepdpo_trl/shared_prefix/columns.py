"""Columns of datasets as arrays, with a few bytes per row rather than Python objects."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


def per_row(dataset: Dataset, columns: Sequence[str], function: Callable[[pa.Table], Any]) -> np.ndarray:
    """
    Compute a value for each row, a thousand rows at a time.

    Args:
        dataset (`Dataset`):
            The rows.
        columns (`list[str]`):
            Columns that are read.
        function (`Callable`):
            Returns the values of the rows of a table.

    Returns:
        `np.ndarray`: The values, of shape `(rows,)`.
    """
    tables = dataset.select_columns([*columns]).with_format("arrow").iter(batch_size=1000)
    values = [np.asarray(function(table)) for table in tables]
    return np.concatenate(values) if values else np.empty(0)


def numbers(dataset: Dataset, column: str) -> np.ndarray:
    """Return a column of numbers, of shape `(rows,)`."""
    return per_row(dataset, [column], lambda table: table[column].to_numpy())


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Return the lengths of the lists in a column, of shape `(rows,)`."""
    return per_row(dataset, [column], lambda table: pc.list_value_length(table[column]).to_numpy())


def hashes(dataset: Dataset, columns: Sequence[str]) -> np.ndarray:
    """Return a 64-bit hash of the values that each row has in some columns, of shape `(rows,)`."""

    def hash_table(table: pa.Table) -> np.ndarray:
        rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
        digests = (hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in rows)
        return np.frombuffer(b"".join(digests), np.uint64)

    return per_row(dataset, columns, hash_table)


def rows_by_value(dataset: Dataset, column: str) -> dict[Any, np.ndarray]:
    """
    Return the indices of the rows with each value of a column.

    Args:
        dataset (`Dataset`):
            The rows.
        column (`str`):
            Column of numbers or texts with few different values.

    Returns:
        `dict[Any, np.ndarray]`: Ascending indices by value, in order of appearance.
    """
    codes: dict[Any, int] = {}

    def encode(table: pa.Table) -> np.ndarray:
        encoded = table[column].combine_chunks().dictionary_encode("encode")  # null is a value
        known = [codes.setdefault(value, len(codes)) for value in encoded.dictionary.to_pylist()]
        return np.array(known)[encoded.indices.to_numpy()]

    rows, starts, ends = group_rows(per_row(dataset, [column], encode))
    return {value: rows[start:end] for value, start, end in zip(codes, starts, ends, strict=True)}


def group_rows(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Group the rows with the same key.

    Args:
        keys (`np.ndarray`):
            Key of each row, of shape `(rows,)`.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: The indices of the rows, of shape `(rows,)`, and the start and end
        of each group among them, of shape `(groups,)`. Groups are in order of appearance, and their rows ascend.
    """
    rows = np.argsort(keys, kind="stable")
    ordered = keys[rows]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(keys)])
    ends = np.append(starts[1:], len(keys))[: len(starts)]
    by_appearance = np.argsort(rows[starts])
    return rows, starts[by_appearance], ends[by_appearance]
