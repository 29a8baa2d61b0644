"""
Layout of a batch in which each shared token occurs only once.

The rows of a batch are sorted, so that each row follows the one with which it shares the longest prefix. Each row adds
only its new tokens to the layout. For a prompt `p` with the steps `a` and `b`:

    rows       p a          p b
    layout     p p p a a    b b b
    positions  0 1 2 3 4    3 4 5      counted along the row, not along the layout
    row 1: all 5 tokens are new and attend to the 5 tokens of the row
    row 2: 3 tokens are new and attend to the 6 tokens of the row, 3 of which belong to the layout of row 1

This is a trie of the batch in depth-first order. Attention is causal for each row, with fewer queries than keys,
aligned at the end. All other layers of a decoder process each token independently and need no change.
"""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


class _Movable:
    """Base class for dataclasses of tensors that data loaders and Accelerate can move between devices."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Any:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Any:
        moved = copy.copy(self)
        for name in (attribute.name for attribute in dataclasses.fields(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                setattr(moved, name, function(value))
            elif isinstance(value, dict):
                setattr(moved, name, {key: function(tensor) for key, tensor in value.items()})
            elif value and isinstance(value, list) and isinstance(value[0], _Movable):
                setattr(moved, name, [item._map(function) for item in value])
        return moved


@dataclass
class Pack(_Movable):
    """
    Tokens of one forward pass. The new tokens of a row are called a chain.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, tokens)`):
            Token ids of all chains, concatenated.
        position_ids (`torch.LongTensor` of shape `(1, tokens)` or `(axes, 1, tokens)`):
            Position of each token in its row, on several axes for models with multimodal position embeddings.
        keys (`torch.LongTensor` of shape `(keys,)`):
            For each chain, the indices of the tokens of its row in `input_ids`. The chain's tokens come last.
        query_offsets, key_offsets (`torch.IntTensor` of shape `(chains + 1,)`):
            Start of each chain in `input_ids` and in `keys`.
        lengths (`list[tuple[int, int]]`):
            Number of tokens of each chain and of its row, available without synchronizing with the device.
        origins (`torch.LongTensor` of shape `(tokens,)`):
            Index of each token in the concatenation of all rows of the batch.
        images (`list[int]`):
            Images of the tokens in their order, as indices into the images of the tree.
        blocks (`torch.LongTensor` of shape `(tokens,)`, *optional*):
            Block of each token, -1 for none. The tokens of a block attend to all tokens of the block, also to later
            ones. A block lies within a chain.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    keys: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    lengths: list[tuple[int, int]]
    origins: torch.Tensor
    images: list[int] = field(default_factory=list)
    blocks: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in the forward pass."""
        return self.input_ids.shape[1]

    @property
    def longest(self) -> tuple[int, int]:
        """Number of tokens of the longest chain and of the longest row."""
        queries, keys = zip(*self.lengths, strict=True)
        return max(queries), max(keys)

    def first_token(self) -> "Pack":
        """Return a pack with the first token only."""
        offsets = torch.arange(2, dtype=torch.int32, device=self.query_offsets.device)
        ids, positions = self.input_ids[:, :1], self.position_ids[..., :1]
        return Pack(ids, positions, self.keys[:1], offsets, offsets, [(1, 1)], self.origins[:1])


@dataclass
class PrefixTree(_Movable):
    """
    A batch of rows as a prefix tree, with the positions of its labeled tokens.

    Args:
        packs (`list[Pack]`):
            Tokens of the batch, split into forward passes.
        sources (`torch.LongTensor` of shape `(rows, labels)`):
            Index of the token, counted over all packs, that predicts the labeled token in the next column.
        input_ids (`torch.LongTensor` of shape `(rows, labels)`):
            Labeled tokens of each row, after the token that precedes the first of them. Padded with 0.
        completion_mask (`torch.LongTensor` of shape `(rows, labels)`):
            1 for the labeled tokens in `input_ids`, 0 for the others.
        uses (`torch.LongTensor` of shape `(1, tokens)`):
            Number of rows that contain each token of the packs.
        images (`dict[str, torch.Tensor]`):
            Different images of the batch, as arguments of the model's `get_image_features`. Empty without images.
    """

    packs: list[Pack]
    sources: torch.Tensor
    input_ids: torch.Tensor
    completion_mask: torch.Tensor
    uses: torch.Tensor
    images: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens in the forward passes of the batch, without dummy packs."""
        return self.uses.shape[1]

    def padded(self, packs: int) -> "PrefixTree":
        """
        Prepend dummy packs of one token.

        Processes that shard a model synchronize in each forward of a layer, so all need the same number of packs.

        Args:
            packs (`int`):
                Required number of packs.

        Returns:
            `PrefixTree`: The tree with that number of packs.
        """
        dummies = [self.packs[0].first_token()] * (packs - len(self.packs))
        return dataclasses.replace(self, packs=[*dummies, *self.packs])


def build_tree(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    max_tokens: int | None = None,
    keys: Sequence[Sequence[int]] | None = None,
) -> PrefixTree:
    """
    Build the prefix tree of a batch.

    Args:
        rows (`Sequence[Sequence[int]]`):
            Token ids of each row, without padding.
        labels (`Sequence[Sequence[int]]`):
            For each row, 1 for each token that has a label and 0 for the others.
        max_tokens (`int`, *optional*):
            Maximum number of tokens in a pack. A longer row gets a separate pack. If `None`, there is one pack.
        keys (`Sequence[Sequence[int]]`, *optional*):
            For each row, the numbers by which its tokens are compared with those of other rows. Defaults to the token
            ids, which are equal for different images.

    Returns:
        `PrefixTree`: The batch as a prefix tree.
    """
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    compared = arrays if keys is None else [np.asarray(row, dtype=np.int64) for row in keys]
    packs, paths = _lay_out(arrays, compared, max_tokens)
    labeled = [1 + np.flatnonzero(np.asarray(mask)[1:]) for mask in labels]  # the first token has no prediction
    width = 1 + max(1, *map(len, labeled))
    sources, input_ids, completion_mask = (np.zeros((len(arrays), width), dtype=np.int64) for _ in range(3))
    for i, (mask, positions, row, path) in enumerate(zip(labels, labeled, arrays, paths, strict=True)):
        completion_mask[i, :1] = mask[:1]  # counts in losses that divide by the length
        if len(positions):
            sources[i, : len(positions)] = path[positions - 1]
            input_ids[i, : len(positions) + 1] = row[[positions[0] - 1, *positions]]
            completion_mask[i, 1 : len(positions) + 1] = 1
    uses = np.bincount(np.concatenate(paths), minlength=1)[None]
    return PrefixTree(
        packs=packs,
        sources=torch.from_numpy(sources),
        input_ids=torch.from_numpy(input_ids),
        completion_mask=torch.from_numpy(completion_mask),
        uses=torch.from_numpy(uses),
    )


def _lay_out(
    rows: list[np.ndarray], keys: list[np.ndarray], max_tokens: int | None
) -> tuple[list[Pack], list[np.ndarray]]:
    """Return the packs, and for each row the indices of its tokens, counted over all packs."""
    order = sorted(range(len(rows)), key=lambda i: keys[i].astype(">i8").tobytes())
    ordered = [keys[i] for i in order]
    offsets = np.cumsum([0, *map(len, rows)])
    token_ids = np.concatenate(rows)
    shared = [0, *(_common_prefix(*pair) for pair in itertools.pairwise(ordered))]
    starts = _cut([len(row) for row in ordered], shared, max_tokens)
    packs: list[Pack] = []
    paths = [np.empty(0, dtype=np.int64)] * len(rows)
    tokens = 0
    for first, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        chains, start = [], tokens
        for i in range(first, end):
            row, known = ordered[i], 0 if i == first else shared[i]
            prefix = paths[order[i - 1]][:known]
            path = np.concatenate([prefix, np.arange(tokens, tokens + len(row) - known)])
            paths[order[i]] = path
            if known < len(row):
                chains.append((offsets[order[i]], known, path - start))
                tokens += len(row) - known
        packs.append(_pack(token_ids, chains))
    return packs, paths


def _cut(lengths: list[int], shared: list[int], max_tokens: int | None) -> list[int]:
    """
    Split sorted rows into packs of at most `max_tokens` tokens so that the fewest tokens are repeated.

    Args:
        lengths (`list[int]`):
            Number of tokens of each row.
        shared (`list[int]`):
            Number of tokens that each row shares with the previous one.
        max_tokens (`int`, *optional*):
            Maximum number of tokens in a pack of several rows.

    Returns:
        `list[int]`: Index of the first row of each pack.
    """
    if max_tokens is None:
        return [0]
    # For the first `end` rows: fewest tokens, fewest packs with that many tokens, first row of the last pack
    best = [(0, 0, 0)]
    for end in range(1, len(lengths) + 1):
        candidates, added = [], 0  # tokens added by the rows of the last pack after its first
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


def _pack(token_ids: np.ndarray, chains: list[tuple[int, int, np.ndarray]]) -> Pack:
    """Return the pack of chains, given as the start of their row in `token_ids`, first position and keys."""
    positions = np.concatenate([np.arange(first, len(keys)) for _, first, keys in chains])
    origins = np.concatenate([start + np.arange(first, len(keys)) for start, first, keys in chains])
    lengths = [(len(keys) - first, len(keys)) for _, first, keys in chains]
    offsets = np.concatenate([[[0, 0]], np.cumsum(lengths, axis=0)]).astype(np.int32)
    return Pack(
        input_ids=torch.from_numpy(token_ids[origins])[None],
        position_ids=torch.from_numpy(positions)[None],
        keys=torch.from_numpy(np.concatenate([keys for _, _, keys in chains])),
        query_offsets=torch.from_numpy(offsets[:, 0].copy()),
        key_offsets=torch.from_numpy(offsets[:, 1].copy()),
        lengths=lengths,
        origins=torch.from_numpy(origins),
    )
