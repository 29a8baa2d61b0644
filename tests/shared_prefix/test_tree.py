"""Compares the layout of a batch with a trie that is computed from sets of prefixes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_trl.shared_prefix.tree import build_tree

ROWS = [[5, 6, 7, 1, 2], [5, 6, 7, 3, 3, 4], [9, 9, 1], [9, 8]]
LABELS = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 1, 1], [0, 1]]


def trie_size(rows):
    """Return the number of tokens when each shared prefix is counted once."""
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def path(pack, token):
    """Return the tokens that a token of a pack attends to, itself last, according to the keys of its chain."""
    for (new, length), start, first in zip(pack.lengths, pack.query_offsets, pack.key_offsets, strict=False):
        if start <= token < start + new:
            keys = pack.keys[first : first + length]
            visible = keys[: length - new + token - start + 1]
            return pack.input_ids[0, visible].tolist()
    raise AssertionError(f"token {token} is in no chain")


def test_layout_by_hand():
    tree = build_tree(ROWS, LABELS)
    (pack,) = tree.packs
    #                      new tokens of: row 0          row 1    row 3 row 2
    assert pack.input_ids.tolist() == [[5, 6, 7, 1, 2, 3, 3, 4, 9, 8, 9, 1]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2]]
    assert pack.lengths == [(5, 5), (3, 6), (2, 2), (2, 3)]
    assert pack.query_offsets.tolist() == [0, 5, 8, 10, 12]
    assert pack.key_offsets.tolist() == [0, 5, 11, 13, 16]
    assert pack.keys.tolist() == [0, 1, 2, 3, 4, *(0, 1, 2, 5, 6, 7), *(8, 9), *(8, 10, 11)]
    assert tree.uses.tolist() == [[2, 2, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1]]
    assert tree.input_ids.tolist() == [
        [7, 1, 2, 0],  # the token before the first labeled one, then the labeled ones
        [7, 3, 3, 4],
        [9, 9, 1, 0],
        [9, 8, 0, 0],
    ]
    assert tree.completion_mask.tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]]
    assert tree.sources[0, :2].tolist() == [2, 3]
    assert tree.sources[1, :3].tolist() == [2, 5, 6]  # the same token predicts the first token of both steps
    assert tree.sources[2, :2].tolist() == [8, 10]
    assert tree.sources[3, :1].tolist() == [8]


rows_strategy = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=2, max_size=8)


@settings(deadline=None, max_examples=300)
@given(rows_strategy, st.data())
def test_each_label_is_predicted_from_the_tokens_before_it(rows, data):
    labels = [data.draw(st.lists(st.integers(0, 1), min_size=len(row), max_size=len(row))) for row in rows]
    max_tokens = data.draw(st.none() | st.integers(9, 30))
    tree = build_tree(rows, labels, max_tokens)
    starts = [0, *itertools.accumulate(pack.tokens for pack in tree.packs)]
    for row, mask, sources, ids, kept in zip(
        rows, labels, tree.sources, tree.input_ids, tree.completion_mask, strict=True
    ):
        positions = [position for position in range(1, len(row)) if mask[position]]
        assert kept.tolist() == [mask[0], *[1] * len(positions), *[0] * (len(kept) - 1 - len(positions))]
        assert ids[1 : len(positions) + 1].tolist() == [row[position] for position in positions]
        for source, position in zip(sources.tolist(), positions, strict=False):
            number = max(i for i, start in enumerate(starts) if start <= source)
            assert path(tree.packs[number], source - starts[number]) == row[:position]
    for pack in tree.packs:
        assert max_tokens is None or pack.tokens <= max_tokens
        assert [len(path(pack, token)) - 1 for token in range(pack.tokens)] == pack.position_ids[0].tolist()
    assert tree.uses.sum() == sum(map(len, rows))
    assert tree.tokens == sum(pack.tokens for pack in tree.packs) == tree.uses.shape[1]
    if max_tokens is None:
        assert tree.tokens == trie_size(rows)


def fewest_tokens(rows, max_tokens):
    """Return the fewest tokens, and the fewest packs for them, by trying all splits of the sorted rows."""
    rows = sorted(rows)
    best = None
    for cuts in itertools.product((False, True), repeat=len(rows) - 1):
        groups = [[rows[0]]]
        for row, cut in zip(rows[1:], cuts, strict=True):
            if cut:
                groups.append([])
            groups[-1].append(row)
        if all(len(group) == 1 or trie_size(group) <= max_tokens for group in groups):
            total = (sum(map(trie_size, groups)), len(groups))
            best = total if best is None else min(best, total)
    return best


@settings(deadline=None, max_examples=200)
@given(rows_strategy, st.integers(3, 20))
def test_packs_repeat_as_few_tokens_as_possible(rows, max_tokens):
    tree = build_tree(rows, [[1] * len(row) for row in rows], max_tokens)
    assert (tree.tokens, len(tree.packs)) == fewest_tokens(rows, max_tokens)


def test_a_pair_that_fits_is_not_split():
    """Two pairs of 8 tokens each share their first token: the split is between the pairs."""
    rows = [[1, 2, 2, 2, 2, 3, 3], [1, 2, 2, 2, 2, 4], [1, 5, 5, 5, 5, 6, 6], [1, 5, 5, 5, 5, 7]]
    tree = build_tree(rows, [[0] * 5 + [1] * (len(row) - 5) for row in rows], 8)
    assert [pack.tokens for pack in tree.packs] == [8, 8]


def test_dummy_packs_are_prepended_and_not_counted():
    tree = build_tree(ROWS, LABELS)
    padded = tree.padded(3)
    assert [pack.tokens for pack in padded.packs] == [1, 1, 12]
    assert padded.packs[0].lengths == [(1, 1)]
    assert padded.tokens == tree.tokens
    assert tree.padded(1).packs == tree.packs


def test_tensors_move_together():
    tree = build_tree(ROWS, LABELS, 8).to("meta")
    tensors = [tree.sources, tree.uses, *(pack.keys for pack in tree.packs), tree.packs[0].query_offsets]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert tree.packs[0].lengths == [(5, 5), (3, 6)]


def test_rows_without_labels():
    tree = build_tree([[1, 2]], [[0, 0]])
    assert tree.completion_mask.sum() == 0
    assert tree.input_ids.shape == (1, 2)  # one column to predict, so that the output has a gradient


@pytest.mark.parametrize("max_tokens", [None, 4])
def test_a_row_contained_in_another_adds_no_tokens(max_tokens):
    tree = build_tree([[1, 2, 3], [1, 2, 3], [1, 2]], [[0, 1, 1], [0, 1, 1], [0, 1]], max_tokens)
    assert tree.tokens == 3
    torch.testing.assert_close(tree.uses, torch.tensor([[3, 3, 2]]))
