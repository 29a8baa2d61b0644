"""Columns of datasets as arrays: the same values as plain Python, without an object per row."""

import hashlib
import random
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset

from stepdpo_trl import split_stages
from stepdpo_trl.sdpo.stages import find_stages, row_digests
from stepdpo_trl.shared_prefix.columns import group_rows, hashes, list_lengths, numbers, per_row, rows_by_value
from stepdpo_trl.shared_prefix.mixin import longest_first
from stepdpo_trl.step_dpo.sampler import PromptGroupSampler

RANDOM = random.Random(0)
ROWS = 2500  # more than two batches
VALUES = {
    "text": [RANDOM.choice("xyz") for _ in range(ROWS)],
    "number": [RANDOM.randrange(5) for _ in range(ROWS)],
    "null": [RANDOM.choice(["x", None]) for _ in range(ROWS)],
    "late": ["x"] * 2000 + ["y"] * 500,
    "ids": [[7] * RANDOM.randrange(4) for _ in range(ROWS)],
    "message": [[{"role": "user", "content": RANDOM.choice("xy")}] for _ in range(ROWS)],
}
DATASET = Dataset.from_dict(VALUES)
ORDER = RANDOM.sample(range(ROWS), ROWS)
SHUFFLED = DATASET.select(ORDER)  # with a table of indices


def plain_groups(values):
    groups = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    return groups


@pytest.mark.parametrize("column", ["text", "number", "null", "late"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_by_value(column, shuffled):
    values = [VALUES[column][row] for row in ORDER] if shuffled else VALUES[column]
    found = rows_by_value(SHUFFLED if shuffled else DATASET, column)
    expected = plain_groups(values)
    assert list(found) == list(expected)
    assert {value: rows.tolist() for value, rows in found.items()} == expected


def test_group_rows():
    for keys in ([], [3], [5, 2, 5, 2**64 - 1, 0, 2]):
        rows, starts, ends = group_rows(np.array(keys, np.uint64))
        found = [rows[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
        assert found == list(plain_groups(keys).values())


def test_numbers_and_lengths():
    assert numbers(SHUFFLED, "number").tolist() == [VALUES["number"][row] for row in ORDER]
    assert list_lengths(SHUFFLED, "ids").tolist() == [len(VALUES["ids"][row]) for row in ORDER]
    assert per_row(DATASET.select([]), ["number"], len).shape == (0,)


def test_hashes():
    """The hash is part of the digest of a stage in checkpoints, so it must not change."""
    found = hashes(SHUFFLED, ["ids", "message"])
    rows = [(VALUES["ids"][row], VALUES["message"][row]) for row in ORDER]
    digests = [hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in rows]
    assert found.tobytes() == b"".join(digests)


def test_order_of_groups():
    """The order is that of a shuffle of Python lists, so a resumed run of an earlier release continues in it."""
    prompts = [[{"role": "user", "content": name}] for name in "abcabcab"]
    sampler = PromptGroupSampler(hashes(Dataset.from_dict({"prompt": prompts}), ["prompt"]), 3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        generator = np.random.default_rng((3, epoch))
        groups = [[0, 3, 6], [1, 4, 7], [2, 5]]
        expected = [row for group in generator.permutation(3) for row in generator.permutation(groups[group])]
        assert list(sampler) == expected


def large_dataset(rows):
    """Create rows whose values are objects of their own in Python."""
    return Dataset.from_dict(
        {
            "prompt": [f"problem number {row // 2}" for row in range(rows)],
            "stage": [f"stage {row % 2}" for row in range(rows)],
            **{
                f"{name}_ids": [[1000 + row % 7] * 3 for row in range(rows)]
                for name in ("prompt", "chosen", "rejected")
            },
        }
    )


GAMMA = np.random.default_rng(0).normal(size=12_000)
WORK = {
    "sampler": lambda rows: sum(1 for _ in PromptGroupSampler(hashes(rows, ["prompt"]), 0)),
    "lengths": longest_first,
    "digests": row_digests,
    "stages": find_stages,
    "by source": lambda rows: split_stages(rows, "easy_to_hard", source_column="stage", gamma=GAMMA),
    "by gamma": lambda rows: split_stages(rows, "easy_to_hard", [0.5, 0.5], gamma=GAMMA),
    "stratified": lambda rows: split_stages(rows, "stratified", [0.5, 0.5], source_column="stage"),
}


@pytest.fixture(scope="module")
def many_rows():
    return large_dataset(len(GAMMA))


@pytest.mark.parametrize("work", WORK)
def test_no_python_object_per_row(work, many_rows):
    """A few arrays of numbers take less memory than a list of Python objects and the dictionary that groups them."""
    tracemalloc.start()
    WORK[work](many_rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / len(GAMMA) < 80
