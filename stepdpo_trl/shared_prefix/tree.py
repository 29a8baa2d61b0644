"""
Sequences that share prefixes, laid out so that every shared token stands once.

The rows of a batch are sorted, so that a row follows the one it shares most with, and each adds to the layout the
tokens that are new in it. For a prompt `p` with the steps `a` and `b`:

    rows       p a          p b
    layout     p p p a a    b b b
    positions  0 1 2 3 4    3 4 5      counted along the row, not along the layout
    row 1: all 5 tokens are new, and attend to the 5 tokens of the row
    row 2: 3 tokens are new, and attend to the 6 tokens of the row, of which 3 stand in row 1

That is a trie of the batch in depth-first order. Attention over it is one causal call with fewer queries than keys for
each row, aligned at the end; everything else in a decoder sees tokens one by one and needs no change.
"""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class _Movable:
    """Tensors that move together, as data loaders and accelerate move a batch."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Any:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Any:
        moved = copy.copy(self)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                setattr(moved, field.name, function(value))
            elif value and isinstance(value, list) and isinstance(value[0], _Movable):
                setattr(moved, field.name, [item._map(function) for item in value])
        return moved


@dataclass
class Pack(_Movable):
    """
    The tokens that one forward computes. A chain is what one row adds.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, tokens)`):
            Tokens, chain after chain.
        position_ids (`torch.LongTensor` of shape `(1, tokens)`):
            Place of each in its row.
        keys (`torch.LongTensor` of shape `(keys,)`):
            For each chain, where the tokens of its row stand, those of the chain last.
        query_offsets, key_offsets (`torch.IntTensor` of shape `(chains + 1,)`):
            Where each chain begins in `input_ids` and in `keys`.
        lengths (`list[tuple[int, int]]`):
            Tokens of each chain and of its row, for those that need them without asking the device.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    keys: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    lengths: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Positions computed."""
        return self.input_ids.shape[1]

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest chain and of the longest row."""
        queries, keys = zip(*self.lengths, strict=True)
        return max(queries), max(keys)

    def first_token(self) -> "Pack":
        """The smallest pack there is."""
        offsets = torch.arange(2, dtype=torch.int32, device=self.query_offsets.device)
        return Pack(self.input_ids[:, :1], self.position_ids[:, :1], self.keys[:1], offsets, offsets, [(1, 1)])


@dataclass
class PrefixTree(_Movable):
    """
    A batch of rows as a tree, and what to read off it.

    Args:
        packs (`list[Pack]`):
            The tokens, split where there are more than fit into one forward.
        sources (`torch.LongTensor` of shape `(rows, steps)`):
            For each labelled token of a row, which token of the packs predicts it, one column before its own.
        input_ids, completion_mask (`torch.LongTensor` of shape `(rows, steps)`):
            The labelled tokens of each row behind the token before the first of them, and which they are.
        uses (`torch.LongTensor` of shape `(1, tokens)`):
            How many rows each token of the packs stands for.
    """

    packs: list[Pack]
    sources: torch.Tensor
    input_ids: torch.Tensor
    completion_mask: torch.Tensor
    uses: torch.Tensor

    @property
    def tokens(self) -> int:
        """Positions computed for the batch."""
        return self.uses.shape[1]

    def padded(self, packs: int) -> "PrefixTree":
        """
        With packs of one token in front, so that there are as many as in another process: those that shard a model
        wait for each other in every forward of a layer.
        """
        stand_ins = [self.packs[0].first_token()] * (packs - len(self.packs))
        return dataclasses.replace(self, packs=[*stand_ins, *self.packs])


def build_tree(
    rows: Sequence[Sequence[int]], labelled: Sequence[Sequence[int]], max_tokens: int | None = None
) -> PrefixTree:
    """
    Lay out a batch so that shared prefixes stand once.

    Args:
        rows (`Sequence[Sequence[int]]`):
            Token ids of each row, without padding.
        labelled (`Sequence[Sequence[int]]`):
            1 for each token that has a label, 0 for the others.
        max_tokens (`int`, *optional*):
            Most tokens of a pack. A row that is longer has a pack of its own.

    Returns:
        `PrefixTree`: The batch.
    """
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    packs, paths = _lay_out(arrays, max_tokens)
    places = [1 + np.flatnonzero(np.asarray(mask)[1:]) for mask in labelled]  # nothing predicts the first token
    width = 1 + max(1, *(len(place) for place in places))
    sources, input_ids, completion_mask = (np.zeros((len(arrays), width), dtype=np.int64) for _ in range(3))
    for i, (mask, place, row, path) in enumerate(zip(labelled, places, arrays, paths, strict=True)):
        completion_mask[i, :1] = mask[:1]  # counts, where a length is asked for
        if len(place):
            sources[i, : len(place)] = path[place - 1]
            input_ids[i, : len(place) + 1] = row[[place[0] - 1, *place]]
            completion_mask[i, 1 : len(place) + 1] = 1
    uses = np.bincount(np.concatenate(paths), minlength=1)[None]
    tensors = (torch.from_numpy(array) for array in (sources, input_ids, completion_mask, uses))
    return PrefixTree(packs, *tensors)


def _lay_out(rows: list[np.ndarray], max_tokens: int | None) -> tuple[list[Pack], list[np.ndarray]]:
    """The packs, and where the tokens of each row stand, counted over all packs."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())
    ordered = [rows[i] for i in order]
    shared = [0, *(_common_prefix(*pair) for pair in itertools.pairwise(ordered))]
    starts = _cut([len(row) for row in ordered], shared, max_tokens)
    packs: list[Pack] = []
    paths = [np.empty(0, dtype=np.int64)] * len(rows)
    tokens = 0
    for first, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        chains, start = [], tokens
        for place in range(first, end):
            row, known = ordered[place], 0 if place == first else shared[place]
            above = paths[order[place - 1]][:known]
            path = np.concatenate([above, np.arange(tokens, tokens + len(row) - known)])
            paths[order[place]] = path
            if known < len(row):
                chains.append((row[known:], known, path - start))
                tokens += len(row) - known
        packs.append(_pack(chains))
    return packs, paths


def _cut(lengths: list[int], shared: list[int], max_tokens: int | None) -> list[int]:
    """
    Cut sorted rows into packs of at most `max_tokens` so that the fewest tokens are computed twice.

    Args:
        lengths (`list[int]`): Tokens of each row.
        shared (`list[int]`): Tokens that each row shares with the one before it.
        max_tokens (`int`, *optional*): Most tokens of a pack with more than one row.

    Returns:
        `list[int]`: The first row of each pack.
    """
    if max_tokens is None:
        return [0]
    # Of the first `end` rows: the fewest tokens, the fewest packs for them, and where the last pack begins
    best = [(0, 0, 0)]
    for end in range(1, len(lengths) + 1):
        candidates, added = [], 0  # by the rows after the first of the last pack
        for first in reversed(range(end)):
            if lengths[first] + added <= max_tokens or first == end - 1:
                candidates.append((best[first][0] + lengths[first] + added, best[first][1] + 1, first))
            added += lengths[first] - shared[first]
        best.append(min(candidates))
    starts, end = [], len(lengths)
    while end:
        end = best[end][2]
        starts.append(end)
    return starts[::-1]


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def _pack(chains: list[tuple[np.ndarray, int, np.ndarray]]) -> Pack:
    tokens = np.concatenate([row for row, _, _ in chains])
    positions = np.concatenate([np.arange(start, start + len(row)) for row, start, _ in chains])
    lengths = [(len(row), len(keys)) for row, _, keys in chains]
    offsets = np.concatenate([[[0, 0]], np.cumsum(lengths, axis=0)]).astype(np.int32)
    return Pack(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        keys=torch.from_numpy(np.concatenate([keys for _, _, keys in chains])),
        query_offsets=torch.from_numpy(offsets[:, 0].copy()),
        key_offsets=torch.from_numpy(offsets[:, 1].copy()),
        lengths=lengths,
    )
