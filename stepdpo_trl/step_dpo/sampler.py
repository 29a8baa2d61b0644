"""Sampler that keeps the pairs of a prompt together."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ..shared_prefix.columns import group_rows


class PromptGroupSampler(Sampler[int]):
    """
    Sampler that shuffles prompts, and the pairs within each prompt, and yields the pairs of a prompt consecutively.

    Args:
        prompts (`np.ndarray`):
            Hash of the prompt of each row, of shape `(rows,)`.
        seed (`int`):
            Random seed. The order depends only on the seed and the epoch, so it is the same in all processes and in a
            resumed run.
    """

    def __init__(self, prompts: np.ndarray, seed: int) -> None:
        self.rows, self.starts, self.ends = group_rows(prompts)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        for group in generator.permutation(len(self.starts)):
            yield from generator.permutation(self.rows[self.starts[group] : self.ends[group]]).tolist()
