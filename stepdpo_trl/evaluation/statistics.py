"""Accuracies with 95% intervals, and paired tests. Needs the standard library, and numpy for the bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964  # 97.5% quantile of the standard normal distribution
RESAMPLES = 10_000

Interval = tuple[float, float]


def wilson(share: float, total: float) -> Interval:
    """
    Compute the 95% Wilson score interval of a proportion.

    Args:
        share (`float`):
            The proportion, from 0 to 1.
        total (`float`):
            Number of independent observations.

    Returns:
        `tuple[float, float]`: Lower and upper bound, from 0 to 1.
    """
    spread = Z**2 / total
    center = (share + spread / 2) / (1 + spread)
    half_width = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, center - half_width), min(1.0, center + half_width)


def clustered(shares: Sequence[float], samples: int) -> Interval:
    """
    Compute the 95% interval of a mean accuracy over problems with several samples each.

    Samples of one problem are correlated, so they count less than samples of different problems. The interval is
    Wilson's with an effective sample size: the number of independent observations whose mean has the same variance as
    the mean over problems (Korn and Graubard, 1998). With one sample per problem it is the plain Wilson interval.

    Args:
        shares (`Sequence[float]`):
            Share of right answers to each problem.
        samples (`int`):
            Number of samples per problem.

    Returns:
        `tuple[float, float]`: Lower and upper bound, from 0 to 1.
    """
    num_problems = len(shares)
    mean = math.fsum(shares) / num_problems
    variance = math.fsum((share - mean) ** 2 for share in shares) / num_problems**2
    if mean in (0, 1):
        return wilson(mean, num_problems)  # no variation, so assume that all samples of a problem are the same
    num_answers = num_problems * samples
    return wilson(mean, min(mean * (1 - mean) / variance, num_answers) if variance else num_answers)


def mcnemar(only_first: int, only_second: int) -> float:
    """
    Compute the two-sided p-value of McNemar's exact test.

    Args:
        only_first (`int`):
            Number of problems that only the first model solves.
        only_second (`int`):
            Number of problems that only the second model solves.

    Returns:
        `float`: Probability of a difference at least this large between two models that are equally good.
    """
    total = only_first + only_second
    tail = sum(math.comb(total, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def bootstrap(differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """
    Compute the 95% percentile interval of a mean of paired differences by resampling problems.

    Args:
        differences (`Sequence[float]`):
            Difference of each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        resamples (`int`, *optional*, defaults to `10000`):
            Number of resamples.

    Returns:
        `tuple[float, float]` or `None`: Lower and upper bound. `None` if all differences are equal, because then all
        resamples are equal too.
    """
    import numpy as np

    # Resampling problems is a multinomial draw of the counts of each distinct difference, which is much faster
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    if len(values) == 1:
        return None
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=resamples)
    low, high = np.quantile(drawn @ values / len(differences), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Accuracy:
    """
    Share of problems with a right answer.

    Args:
        right (`int`):
            Number of problems with a right final answer.
        total (`int`):
            Number of problems.
    """

    right: int
    total: int

    @property
    def value(self) -> float:
        """Share of right answers, from 0 to 1."""
        return self.right / self.total

    @property
    def interval(self) -> Interval:
        """95% Wilson score interval, from 0 to 1."""
        return wilson(self.value, self.total)

    def __str__(self) -> str:
        return show(self.value, self.interval)


def show(value: float, interval: Interval, form: str = ".1%") -> str:
    """Format a value with its interval, such as `"76.0% (73.3% to 78.5%)"`."""
    low, high = interval
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
