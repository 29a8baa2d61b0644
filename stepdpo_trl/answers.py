"""Checking final answers with math-verify, in worker processes with a hard time limit."""

import logging
import multiprocessing
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from types import TracebackType

from pebble import ProcessExpired, ProcessPool

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


_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SAID = re.compile(
    r"(?:final\s+answer|answer)(?:\s+to\s+[^.:\n]*)?\s*(?:\*\*)?\s*(?:\bis\b(?:\s*:)?|:)\s*(?:\*\*)?\s*(.+)", re.I
)


def final_answer(text: str) -> str | None:
    r"""
    Find the final answer of a solution.

    Args:
        text (`str`):
            The solution.

    Returns:
        `str` or `None`: What the last `\boxed{}` holds; else what follows the last `####`; else what follows the last
        "answer is" or "answer:" on its line. `None` if there is none of these.
    """
    boxed = [inside for match in _BOXED.finditer(text) if (inside := _braced(text, match.end())) is not None]
    if boxed:
        return boxed[-1].strip() or None
    if "####" in text:
        return (text.rpartition("####")[2].strip().splitlines() or [""])[0].strip() or None
    said = _SAID.findall(text)
    return said[-1].strip().rstrip(".").strip() or None if said else None


def _braced(text: str, start: int) -> str | None:
    """Text up to the brace that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
        if not depth:
            return text[start:place]
    return None


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
    from math_verify import parse, verify

    answer = final_answer(text)
    if answer is None:
        return Check(UNREADABLE, reason="no final answer")
    if _plain(answer) == _plain(gold):
        return Check(RIGHT, answer)
    parsed = {}
    for name, value in (("gold", gold), ("given", answer)):
        try:
            parsed[name] = parse(f"\\boxed{{{value}}}", parsing_timeout=None) or parse(value, parsing_timeout=None)
        except Exception as error:  # whatever a parser of free text raises
            return Check(UNREADABLE, answer, f"{type(error).__name__} in math-verify")
    for name, value in (("gold", gold), ("given", answer)):
        if not parsed[name] or value.count("{") != value.count("}"):
            return Check(UNREADABLE, answer, f"the {name} answer does not parse")
    try:
        same = verify(parsed["gold"], parsed["given"], timeout_seconds=None, raise_on_error=True)
    except Exception as error:
        return Check(UNREADABLE, answer, f"{type(error).__name__} in math-verify")
    return Check(RIGHT if same else WRONG, answer)


def _plain(answer: str) -> str:
    """For answers that are the same text, or words."""
    answer = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", answer)
    return re.sub(r"[\s$*]|\\[!,;]", "", answer).rstrip(".").casefold()


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
        futures = [self.pool.schedule(_quiet_check, args=pair, timeout=self.time_limit) for pair in answers]
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


def _quiet_check(gold: str, text: str) -> Check:
    logging.disable(logging.CRITICAL)  # math-verify says for each parse that there is no time limit
    return check_answer(gold, text)
