"""The answer that most samples give."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from ..data.answer_rules import normalize
from ..data.answers import RIGHT, UNREADABLE, Check
from ..pipeline.policy import Continuation
from ..pipeline.records import text_digest
from ..runs.tasks import Ask, CheckRequest, Task

Key = Fraction | str  # plain numbers are compared as such, and need no checker


@dataclass(frozen=True)
class Vote:
    """
    What most samples say.

    Args:
        outcome (`str`):
            `"right"`, `"wrong"`, or `"unreadable"` where no sample can be read.
        answer (`str`, *optional*):
            The answer, as the first of them writes it.
        votes (`int`, *optional*, defaults to `0`):
            Samples that give it.
    """

    outcome: str
    answer: str | None = None
    votes: int = 0


@dataclass(frozen=True)
class ProblemAnswers:
    """
    What a model made of a problem.

    Args:
        samples (`list[Continuation]`):
            Its solutions.
        majority (`Vote`):
            What most of them say.
    """

    samples: list[Continuation]
    majority: Vote


def vote(samples: Sequence[Continuation]) -> Task[Vote]:
    """
    Find the answer that most samples give, of equally many the one that was given first.

    ProblemAnswers are one if they are right, or if the answer checker takes one for the other. Unreadable ones have no vote.
    """
    read = [sample.check for sample in samples if sample.check.outcome != UNREADABLE]
    if not read:
        return Vote(UNREADABLE)
    keys = [None if check.outcome == RIGHT else _key(check.answer or "") for check in read]
    firsts = yield from _same([key for key in dict.fromkeys(keys) if key is not None])
    groups = [key if key is None else firsts[key] for key in keys]
    winner, votes = Counter(groups).most_common(1)[0]
    check = read[groups.index(winner)]
    return Vote(check.outcome, check.answer, votes)


def _key(answer: str) -> Key:
    answer = normalize(answer)
    return Fraction(answer) if re.fullmatch(r"-?\d+(?:\.\d+)?", answer) else answer


def _same(keys: Sequence[Key]) -> Task[dict[Key, Key]]:
    """For each answer the first one that says the same."""
    pairs = [pair for pair in combinations(keys, 2) if str in map(type, pair)]
    requests = {
        pair: CheckRequest(f"same/{text_digest(*pair)}", str(pair[0]), f"\\boxed{{{pair[1]}}}") for pair in pairs
    }
    checks: Mapping[str, Check] = (yield Ask("check", tuple(requests.values()))) if pairs else {}
    same = {pair for pair, request in requests.items() if checks[request.key].outcome == RIGHT}
    firsts: dict[Key, Key] = {}
    for key in keys:
        firsts[key] = next((first for first in firsts.values() if (first, key) in same), key)
    return firsts
