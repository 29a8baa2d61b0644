"""Check solutions in worker processes with limits on time and memory."""

import logging
import multiprocessing
import os
import queue
import re
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from .answer_rules import MAX_LENGTH, agrees, final_answer
from .apart import adopt_orphans, call_apart, limit_memory
from .checkers import MATH, Checker, CheckerError, load_function
from .choices import CHOICES, correct_option, read_choice

RIGHT, WRONG, UNREADABLE = "right", "wrong", "unreadable"
TIME_LIMIT = 10.0  # seconds
MEMORY_LIMIT = 2 * 2**30  # bytes
NO_ANSWER = "no final answer"
_WRAPPED = re.compile(r"\\(?:text|math|mbox)\w*\s*\{([^{}]*)\}")
_SCHEDULED_PER_PROCESS = 16
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Check:
    """
    Result of checking a solution.

    Args:
        outcome (`str`):
            `"right"`, `"wrong"` or `"unreadable"`. A solution is unreadable if its answer is missing or cannot be
            compared, which is not the same as wrong.
        answer (`str`, *optional*):
            The final answer that was found.
        reason (`str`, *optional*):
            Reason why the solution is unreadable.
        failed (`bool`, *optional*, defaults to `False`):
            Whether it is unreadable because the checker failed.
    """

    outcome: str
    answer: str | None = None
    reason: str | None = None
    failed: bool = False


def cause_of(reason: str | None) -> str:
    """Return the part of a reason that solutions with the same problem share."""
    return (reason or "not recorded").partition(":")[0]


class CheckingStoppedError(Exception):
    """Raised when checking is stopped before all solutions are checked."""


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
        return Check(UNREADABLE, reason=NO_ANSWER)
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


def check_exact(gold: str, text: str) -> Check:
    r"""
    Compare the final answer of a solution with the gold answer as text.

    White space, dollar signs around the answer, and `\text{}` around it do not count.

    Args:
        gold (`str`):
            The gold answer.
        text (`str`):
            The solution.

    Returns:
        `Check`: The result.
    """
    answer = final_answer(text)
    if answer is None:
        return Check(UNREADABLE, reason=NO_ANSWER)
    return Check(RIGHT if _plain(answer) == _plain(gold) else WRONG, answer)


def _plain(answer: str) -> str:
    answer = " ".join(answer.split()).strip("$ ")
    wrapped = _WRAPPED.fullmatch(answer)
    return wrapped[1].strip() if wrapped else answer


def check_choice(gold: str, text: str) -> Check:
    r"""
    Compare the letter that a solution chooses with the gold letter, see [`~stepdpo_trl.data.choices.read_choice`].

    Args:
        gold (`str`):
            The gold letter, A to E.
        text (`str`):
            The solution.

    Returns:
        `Check`: The result. Its answer is the letter.
    """
    answers = [answer for answer in (final_answer(text), correct_option(text)) if answer is not None]
    letters = [letter for answer in answers if (letter := read_choice(answer[:MAX_LENGTH])) is not None]
    if letters:
        return Check(RIGHT if letters[0] == gold.strip() else WRONG, letters[0])
    if answers:
        return Check(UNREADABLE, answers[0], "the answer is not one of the letters A to E")
    return Check(UNREADABLE, reason=NO_ANSWER)


_BY_ANSWER: dict[str, Callable[[str, str], Check]] = {
    "math": check_answer,
    "exact": check_exact,
    "choice": check_choice,
}


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class AnswerChecker:
    """
    Pool of processes that check solutions, with limits on time and memory.

    If a check exceeds a limit, the solution counts as unreadable. A function of the user runs in a child of the worker
    process, and everything that it has started is killed when it returns. Scripts that use this class need an
    `if __name__ == "__main__":` guard, because the workers import the main module.

    Args:
        processes (`int`, *optional*):
            Number of worker processes. Defaults to the number of cores that this process may use.
        time_limit (`float`, *optional*, defaults to `10.0`):
            Time limit for one solution in seconds.
        memory_limit (`int`, *optional*, defaults to `2 * 2**30`):
            Memory that checking one solution may use, in bytes (Linux).
    """

    def __init__(
        self, processes: int | None = None, time_limit: float = TIME_LIMIT, memory_limit: int = MEMORY_LIMIT
    ) -> None:
        # Forking this process is unsafe: it may have threads and a CUDA context
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["math_verify"])
        self.processes = processes or count_cores()
        self.pool = ProcessPool(self.processes, initializer=_start_worker, initargs=(memory_limit,), context=context)
        self.time_limit, self.memory_limit = time_limit, memory_limit

    def __enter__(self) -> "AnswerChecker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.stop()
        self.pool.join()

    def check(
        self,
        solutions: Iterable[tuple[Mapping[str, Any], str]],
        checker: Checker = MATH,
        stop: threading.Event | None = None,
    ) -> list[Check]:
        """
        Check solutions.

        Args:
            solutions (`Iterable[tuple[Mapping[str, Any], str]]`):
                Pairs of problem and solution. The problem is a row with the columns that the checker reads: `answer`
                for those of this package.
            checker (`Checker`, *optional*, defaults to `MATH`):
                The checker.
            stop (`threading.Event`, *optional*):
                Event that another thread sets to end this call with an error.

        Returns:
            `list[Check]`: The results, in the order of `solutions`.

        Raises:
            CheckerError: If the function of the user returns something else than `True`, `False` or `None`.
            CheckingStoppedError: If `stop` is set.
        """
        _start_forkserver()
        limit = self.time_limit
        # The worker itself stops a function of the user. The rest of the time is for importing it
        timeout = limit + 60 if checker.custom else limit
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        checks: dict[int, Check] = {}
        scheduled = 0
        for problem, text in solutions:
            if scheduled - len(checks) == self.processes * _SCHEDULED_PER_PROCESS:
                self._take(done, checks, stop)
            arguments = (checker, problem, text, limit, self.memory_limit)
            future = self.pool.schedule(_limited_check, args=arguments, timeout=timeout)
            future.add_done_callback(partial(_put, done, scheduled))
            scheduled += 1
        while len(checks) < scheduled:
            self._take(done, checks, stop)
        return [checks[number] for number in range(scheduled)]

    def _take(
        self, done: "queue.SimpleQueue[tuple[int, Any]]", checks: dict[int, Check], stop: threading.Event | None
    ) -> None:
        """Wait for a result."""
        while stop is None or not stop.is_set():
            try:
                number, future = done.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                continue
            try:
                checks[number] = future.result()
            except TimeoutError:
                checks[number] = _failed(f"checking took more than {self.time_limit:g} s")
            except ProcessExpired as error:
                checks[number] = _failed(f"the checking process died (exit code {error.exitcode})")
            return
        raise CheckingStoppedError


def _start_forkserver() -> None:
    """Start the process that forks the workers, unless it runs. Ctrl-C must not interrupt its imports."""
    resource_tracker.ensure_running()  # unblocks the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _put(done: "queue.SimpleQueue[tuple[int, Any]]", number: int, future: Any) -> None:
    done.put((number, future))


def _failed(reason: str) -> Check:
    return Check(UNREADABLE, reason=reason, failed=True)


def check_golds(pool: AnswerChecker, golds: Sequence[str], checker: Checker = MATH) -> list[int]:
    """
    Find gold answers that cannot be compared with any answer.

    Args:
        pool (`AnswerChecker`):
            The processes to use.
        golds (`Sequence[str]`):
            The gold answers.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker.

    Returns:
        `list[int]`: Indices of the gold answers that are not words and that math-verify cannot parse, that are too
        long to compare, or that are not one of the letters A to E.
    """
    if checker.name == "choice":
        return [index for index, gold in enumerate(golds) if gold not in tuple(CHOICES)]
    if checker != MATH:
        return []
    plain = re.compile(r"-?[\d.,]{0,100}\d|[A-Za-z][A-Za-z ]{0,100}")
    doubtful = [index for index, gold in enumerate(golds) if not plain.fullmatch(gold)]
    # A different answer forces math-verify to parse the gold answer
    checks = pool.check(({"answer": golds[index]}, "\\boxed{123456789}") for index in doubtful)
    return [index for index, check in zip(doubtful, checks, strict=True) if check.outcome == UNREADABLE]


def _start_worker(memory_limit: int) -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns about the missing time limit on every parse
    adopt_orphans()
    limit_memory(memory_limit)


def _limited_check(
    checker: Checker, problem: Mapping[str, Any], text: str, time_limit: float, memory_limit: int
) -> Check:
    if checker.custom:
        return _check_custom(checker, problem, text, time_limit, memory_limit)
    signal.alarm(int(time_limit) + 5)  # ends this process even if its parent has died
    try:
        return _BY_ANSWER[checker.name](problem["answer"], text)
    finally:
        signal.alarm(0)


def _check_custom(
    checker: Checker, problem: Mapping[str, Any], text: str, time_limit: float, memory_limit: int
) -> Check:
    if not text.strip():
        return Check(UNREADABLE, reason="the solution is blank")
    returned = call_apart(load_function(checker), (problem, text), time_limit, memory_limit)
    if returned.other is not None:
        columns = ("id", "problem", "question", "prompt")
        name = next((str(problem[column])[:60] for column in columns if problem.get(column)), "?")
        raise CheckerError(
            f"The checker {checker.name!r} returned {returned.other} for the problem {name!r}. Return True, False, or "
            "None if the solution cannot be read."
        )
    if returned.failure is not None:
        return _failed(returned.failure)
    if returned.value is None:
        return Check(UNREADABLE, reason="the checker returned None")
    return Check(RIGHT if returned.value else WRONG)
