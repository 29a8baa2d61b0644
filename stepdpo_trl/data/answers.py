"""Check final answers with math-verify, in worker processes with a hard time limit."""

import logging
import multiprocessing
import re
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass, replace
from types import TracebackType

from pebble import ProcessExpired, ProcessPool

from .answer_rules import MAX_LENGTH, agrees, final_answer

RIGHT, WRONG, UNREADABLE = "right", "wrong", "unreadable"
TIME_LIMIT = 10.0  # seconds


@dataclass(frozen=True)
class Check:
    """
    Result of checking the final answer of a solution.

    Args:
        outcome (`str`):
            `"right"`, `"wrong"` or `"unreadable"`. An answer is unreadable if it is missing or cannot be compared,
            which is not the same as wrong.
        answer (`str`, *optional*):
            The final answer that was found.
        reason (`str`, *optional*):
            Reason why the answer is unreadable.
    """

    outcome: str
    answer: str | None = None
    reason: str | None = None


class _UnreadableError(Exception):
    """Raised when an answer cannot be compared."""


def check_answer(gold: str, text: str) -> Check:
    """
    Compare the final answer of a solution with the gold answer.

    There is no time limit. Use [`AnswerChecker`] for solutions sampled from a model.

    Args:
        gold (`str`):
            The gold answer as written in the dataset, such as `"1,200"`, `"\\\\frac{3}{4}"` or `"Tuesday"`.
        text (`str`):
            The solution.

    Returns:
        `Check`: The result.
    """
    answer = final_answer(text)
    if answer is None:
        return Check(UNREADABLE, reason="no final answer")
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return Check(UNREADABLE, reason=f"more than {MAX_LENGTH} characters to compare")
    try:
        return Check(RIGHT if agrees(gold, answer, _equal) else WRONG, answer)
    except _UnreadableError as error:
        return Check(UNREADABLE, answer, str(error))
    except Exception as error:  # parsing free text can raise any exception
        return Check(UNREADABLE, answer, f"{type(error).__name__} in math-verify")


def _equal(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    default = LatexExtractionConfig()
    # With `units=True`, math-verify mistakes variables for units and drops them
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
    Answer checker with worker processes and a time limit.

    If a check exceeds the time limit, its process is killed and the answer counts as unreadable. Scripts that use this
    class need an `if __name__ == "__main__":` guard, because the workers import the main module.

    Args:
        processes (`int`, *optional*, defaults to `2`):
            Number of worker processes.
        time_limit (`float`, *optional*, defaults to `10.0`):
            Time limit for one answer in seconds.
    """

    def __init__(self, processes: int = 2, time_limit: float = TIME_LIMIT) -> None:
        # Forking this process is unsafe: it may have threads and a CUDA context
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
        Check the final answers of solutions.

        Args:
            answers (`Iterable[tuple[str, str]]`):
                Pairs of gold answer and solution.

        Returns:
            `list[Check]`: The results, in the order of `answers`.
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
                checks.append(Check(UNREADABLE, reason=f"the checking process died (exit code {error.exitcode})"))
        return checks


def check_golds(checker: AnswerChecker, golds: Sequence[str]) -> list[int]:
    """
    Find gold answers that cannot be compared with any answer.

    Args:
        checker (`AnswerChecker`):
            The checker to use.
        golds (`Sequence[str]`):
            The gold answers.

    Returns:
        `list[int]`: Indices of the gold answers that are not words and that math-verify cannot parse, and of
        those that are too long to compare.
    """
    plain = re.compile(r"-?[\d.,]{0,100}\d|[A-Za-z][A-Za-z ]{0,100}")
    doubtful = [index for index, gold in enumerate(golds) if not plain.fullmatch(gold)]
    # A different answer forces math-verify to parse the gold answer
    checks = checker.check((golds[index], "\\boxed{123456789}") for index in doubtful)
    return [index for index, check in zip(doubtful, checks, strict=True) if check.outcome == UNREADABLE]


def _limited_check(gold: str, text: str, time_limit: float) -> Check:
    logging.disable(logging.CRITICAL)  # math-verify warns about the missing time limit on every parse
    signal.alarm(int(time_limit) + 5)  # ends this process even if its parent has died
    try:
        return check_answer(gold, text)
    finally:
        signal.alarm(0)
