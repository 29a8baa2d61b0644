"""Accuracies with 95 % intervals, and what tells two of them apart. Standard library, and numpy for the bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964  # of 95 %
RESAMPLES = 10_000

Interval = tuple[float, float]


def wilson(share: float, total: float) -> Interval:
    """
    The 95 % Wilson score interval of a share.

    Args:
        share (`float`):
            The share, from 0 to 1.
        total (`float`):
            Independent observations that it was seen in.

    Returns:
        `tuple[float, float]`: From 0 to 1.
    """
    spread = Z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered(shares: Sequence[float], samples: int) -> Interval:
    """
    The 95 % interval of a mean over problems, of each of which several answers were sampled.

    Answers to one problem are alike, so `samples` times as many answers tell less than as many problems. The interval
    is Wilson's, with the number of independent answers that would vary as the mean over problems does (Korn and
    Graubard 1998). With one sample it is Wilson's itself.

    Args:
        shares (`Sequence[float]`):
            Share of right answers to each problem.
        samples (`int`):
            Answers to each problem.

    Returns:
        `tuple[float, float]`: From 0 to 1.
    """
    problems = len(shares)
    mean = math.fsum(shares) / problems
    variance = math.fsum((share - mean) ** 2 for share in shares) / problems**2
    if mean in (0, 1):
        return wilson(mean, problems)  # nothing says that the answers to a problem are not all one
    most = problems * samples
    return wilson(mean, min(mean * (1 - mean) / variance, most) if variance else most)


def mcnemar(only_first: int, only_second: int) -> float:
    """
    Exact McNemar test, two-sided.

    Args:
        only_first (`int`):
            Problems that the first model solves and the second does not.
        only_second (`int`):
            Problems that the second model solves and the first does not.

    Returns:
        `float`: Probability of such a difference, or a greater one, between models that are equally good.
    """
    total = only_first + only_second
    tail = sum(math.comb(total, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def bootstrap(differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """
    The 95 % percentile interval of the mean of paired differences, by resampling problems.

    Args:
        differences (`Sequence[float]`):
            Of each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        resamples (`int`, *optional*, defaults to `10000`):
            Resamples.

    Returns:
        `tuple[float, float]`: The interval, or `None` where all differences are equal: resamples are then, too, and
        say nothing of other problems.
    """
    import numpy as np

    # Drawing problems with replacement is drawing how often each different value comes up
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    if len(values) == 1:
        return None
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=resamples)
    low, high = np.quantile(drawn @ values / len(differences), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Accuracy:
    """
    Share of problems solved.

    Args:
        right (`int`):
            Problems whose final answer is right.
        total (`int`):
            All problems.
    """

    right: int
    total: int

    @property
    def value(self) -> float:
        """Share of right answers, from 0 to 1."""
        return self.right / self.total

    @property
    def interval(self) -> Interval:
        """The 95 % interval (Wilson score), from 0 to 1."""
        return wilson(self.value, self.total)

    def __str__(self) -> str:
        return show(self.value, self.interval)


def show(value: float, interval: Interval, form: str = ".1%") -> str:
    """A value with its interval, such as `"76.0% (73.3% to 78.5%)"`."""
    low, high = interval
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
