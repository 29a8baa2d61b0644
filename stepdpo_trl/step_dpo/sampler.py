"""An order of training in which the pairs of a prompt stand together."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class PromptGroupSampler(Sampler[int]):
    """
    Shuffles prompts, and the pairs of each, and keeps these together.

    Args:
        prompts (`Sequence`):
            Prompt of each row, as text or messages.
        seed (`int`):
            Seed. The order depends on it and on the epoch alone, so that all processes have the same and a run that
            resumes goes on in it.
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
        """Change the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        for group in generator.permutation(len(self.groups)):
            yield from generator.permutation(self.groups[group]).tolist()
