"""Sampler that keeps the pairs of a prompt together."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class PromptGroupSampler(Sampler[int]):
    """
    Sampler that shuffles prompts, and the pairs within each prompt, and yields the pairs of a prompt consecutively.

    Args:
        prompts (`Sequence`):
            Prompt of each row, as text or messages, or as a tuple with a digest of its images.
        seed (`int`):
            Random seed. The order depends only on the seed and the epoch, so it is the same in all processes and in a
            resumed run.
    """

    def __init__(self, prompts: Sequence[Any], seed: int) -> None:
        groups = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[str(prompt)].append(row)
        self.groups = [np.array(rows) for rows in groups.values()]
        self.rows = len(prompts)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        for group in generator.permutation(len(self.groups)):
            yield from generator.permutation(self.groups[group]).tolist()
