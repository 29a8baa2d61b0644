"""Checking final answers with math-verify, in worker processes with a hard time limit."""

import logging
import multiprocessing
import re
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass, replace
from types import TracebackType

from pebble import ProcessExpired, ProcessPool

from .answer_rules import agrees, final_answer

RIGHT, WRONG, UNREADABLE = "right", "wrong", "unreadable"
TIME_LIMIT = 10.0  # seconds


@dataclass(frozen=True)
class Check:
    """
    What a solution's final answer is worth.

    Args:
        outcome (`str`):
            `"right"`, `"wrong"`, or `"unreadable"`: there is no final answer, or it cannot be compared. That is not
            a wrong answer.
        answer (`str`, *optional*):
            The final answer found.
        reason (`str`, *optional*):
            Why it is unreadable.
    """

    outcome: str
    answer: str | None = None
    reason: str | None = None


class _UnreadableError(Exception):
    """Something that cannot be compared; says what."""


def check_answer(gold: str, text: str) -> Check:
    """
    Compare the final answer of a solution with the gold answer. Without a time limit: see [`AnswerChecker`].

    Args:
        gold (`str`):
            The gold answer, as data sets write it: `"1,200"`, `"\\\\frac{3}{4}"`, `"Tuesday"`.
        text (`str`):
            The solution.

    Returns:
        `Check`: The outcome.
    """
    answer = final_answer(text)
    if answer is None:
        return Check(UNREADABLE, reason="no final answer")
    try:
        return Check(RIGHT if agrees(gold, answer, _equal) else WRONG, answer)
    except _UnreadableError as error:
        return Check(UNREADABLE, answer, str(error))
    except Exception as error:  # whatever a parser of free text raises
        return Check(UNREADABLE, answer, f"{type(error).__name__} in math-verify")


def _equal(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    default = LatexExtractionConfig()
    # `units` would take variables for units and drop them
    config = [replace(default, normalization_config=replace(default.normalization_config, units=False))]
    parsed = []
    for name, value in (("gold", gold), ("given", answer)):
        values = parse(f"\\boxed{{{value}}}", config, parsing_timeout=None)
        if not values or value.count("{") != value.count("}"):
            raise _UnreadableError(f"the {name} answer does not parse")
        parsed.append(values)
    same = verify(*parsed, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    return bool(same)


class AnswerChecker:
    """
    Checks answers in worker processes. One that takes too long is ended with its process, and the answer counts as
    unreadable. Scripts need `if __name__ == "__main__":`, as with all processes of Python's.

    Args:
        processes (`int`, *optional*, defaults to `2`):
            Number of workers.
        time_limit (`float`, *optional*, defaults to `10.0`):
            Seconds for one answer.
    """

    def __init__(self, processes: int = 2, time_limit: float = TIME_LIMIT) -> None:
        # Not forks of this process, which may have threads and hold a GPU
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["math_verify"])
        self.pool = ProcessPool(processes, context=context)
        self.time_limit = time_limit

    def __enter__(self) -> "AnswerChecker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.stop()
        self.pool.join()

    def check(self, answers: Iterable[tuple[str, str]]) -> list[Check]:
        """
        Check many.

        Args:
            answers (`Iterable[tuple[str, str]]`):
                Gold answer and solution of each.

        Returns:
            `list[Check]`: The outcomes, in order.
        """
        limit = self.time_limit
        futures = [self.pool.schedule(_limited_check, args=(*pair, limit), timeout=limit) for pair in answers]
        checks = []
        for future in futures:
            try:
                checks.append(future.result())
            except TimeoutError:
                checks.append(Check(UNREADABLE, reason=f"checking took more than {self.time_limit:g} s"))
            except ProcessExpired as error:
                checks.append(Check(UNREADABLE, reason=f"checking ended its process (exit code {error.exitcode})"))
        return checks


def check_golds(checker: AnswerChecker, golds: Sequence[str]) -> list[int]:
    """
    Find gold answers that nothing can be compared with.

    Args:
        checker (`AnswerChecker`):
            Who checks.
        golds (`Sequence[str]`):
            Gold answers.

    Returns:
        `list[int]`: Places of those that are neither words nor read by math-verify.
    """
    doubtful = [index for index, gold in enumerate(golds) if not re.fullmatch(r"-?[\d.,]*\d|[A-Za-z][A-Za-z ]*", gold)]
    # Compared with something else, so that it has to be read
    checks = checker.check((golds[index], "\\boxed{123456789}") for index in doubtful)
    return [index for index, check in zip(doubtful, checks, strict=True) if check.outcome == UNREADABLE]


def _limited_check(gold: str, text: str, time_limit: float) -> Check:
    logging.disable(logging.CRITICAL)  # math-verify says for each parse that there is no time limit
    signal.alarm(int(time_limit) + 5)  # ends this process, should the one that watches it be gone
    try:
        return check_answer(gold, text)
    finally:
        signal.alarm(0)
