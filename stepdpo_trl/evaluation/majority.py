"""Majority vote over several samples of a problem."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from ..data.answer_rules import MAX_LENGTH, normalize
from ..data.answers import RIGHT, UNREADABLE, Check
from ..data.checkers import MATH, Checker
from ..pipeline.policy import Continuation
from ..pipeline.records import text_digest
from ..runs.tasks import Ask, CheckRequest, Task

Key = Fraction | str  # plain numbers are compared by value, without the answer checker


@dataclass(frozen=True)
class Vote:
    """
    Result of a majority vote.

    Args:
        outcome (`str`):
            `"right"`, `"wrong"`, or `"unreadable"` if no sample has a readable answer.
        answer (`str`, *optional*):
            The winning answer, as its first sample writes it.
        votes (`int`, *optional*, defaults to `0`):
            Number of samples with this answer.
    """

    outcome: str
    answer: str | None = None
    votes: int = 0


@dataclass(frozen=True)
class ProblemAnswers:
    """
    Answers of one model to one problem.

    Args:
        samples (`list[Continuation]`):
            The sampled solutions.
        majority (`Vote`, *optional*):
            Their majority vote. `None` if their checker finds no answers.
    """

    samples: list[Continuation]
    majority: Vote | None


def vote(samples: Sequence[Continuation], checker: Checker = MATH) -> Task[Vote]:
    """
    Find the answer that most samples give. A tie goes to the answer that was sampled first.

    Two answers count as the same if both are right, or if they are equal: according to the answer checker in
    mathematics, otherwise as text. Samples without a readable answer have no vote, and neither have answers in
    mathematics that are too long to compare.

    Args:
        samples (`Sequence[Continuation]`):
            The sampled solutions of a problem, with checked answers.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.

    Returns:
        `Vote`: The winning answer.
    """
    readable = (sample.check for sample in samples if sample.check.outcome != UNREADABLE)
    checks = [check for check in readable if checker != MATH or len(check.answer or "") <= MAX_LENGTH]
    if not checks:
        return Vote(UNREADABLE)
    groups: list[Key | None] = [None if check.outcome == RIGHT else check.answer or "" for check in checks]
    if checker == MATH:
        keys = [None if group is None else _key(str(group)) for group in groups]
        first_equal = yield from _first_equal([key for key in dict.fromkeys(keys) if key is not None])
        groups = [None if key is None else first_equal[key] for key in keys]
    winner, votes = Counter(groups).most_common(1)[0]
    check = checks[groups.index(winner)]
    return Vote(check.outcome, check.answer, votes)


def _key(answer: str) -> Key:
    answer = normalize(answer)
    return Fraction(answer) if re.fullmatch(r"-?\d{1,100}(?:\.\d{1,100})?", answer) else answer


def _first_equal(keys: Sequence[Key]) -> Task[dict[Key, Key]]:
    """Map each answer to the first answer that is equal to it."""
    pairs = [pair for pair in combinations(keys, 2) if any(isinstance(key, str) for key in pair)]
    requests = {
        pair: CheckRequest(f"same/{text_digest(*pair)}", {"answer": str(pair[0])}, f"\\boxed{{{pair[1]}}}")
        for pair in pairs
    }
    checks: Mapping[str, Check] = (yield Ask("check", tuple(requests.values()))) if pairs else {}
    equal = {pair for pair, request in requests.items() if checks[request.key].outcome == RIGHT}
    first_equal: dict[Key, Key] = {}
    for key in keys:
        first_equal[key] = next((first for first in first_equal.values() if (first, key) in equal), key)
    return first_equal
