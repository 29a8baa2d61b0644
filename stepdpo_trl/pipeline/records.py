"""Records that the pipeline stages exchange. Standard library only."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, overload

from ..data.checkers import MATH, Checker
from ..data.messages import counted
from ..runs.run_directory import RunError
from .row_files import open_rows


@dataclass(frozen=True)
class Problem:
    """
    Problem whose solutions can be checked.

    Args:
        id (`str`):
            Key of the problem in the run.
        problem (`str`):
            Text of the problem.
        answer (`str`):
            Gold final answer. May be empty with a checker that does not read it.
        solution (`str`, *optional*, defaults to `""`):
            Gold solution, shown to judges.
        row (`dict`, *optional*):
            The row of the file, for a checker that reads other columns.
    """

    id: str
    problem: str
    answer: str
    solution: str = ""
    row: dict[str, Any] | None = field(default=None, repr=False, hash=False)

    def as_row(self) -> dict[str, Any]:
        """Return what a checker receives: the row of the file, or one with the columns of this class."""
        if self.row is not None:
            return self.row
        return {"id": self.id, "problem": self.problem, "answer": self.answer, "solution": self.solution}


@dataclass(frozen=True)
class Solution:
    """
    Sampled solution.

    Args:
        key (`str`):
            Key of the solution in the run.
        problem (`Problem`):
            The problem.
        text (`str`):
            Text of the solution, from the beginning of the assistant's turn.
        outcome (`str`):
            `"right"`, `"wrong"`, or `"unreadable"` if there is no final answer to compare.
        finish_reason (`str`):
            `"stop"`, or `"length"` if the solution was truncated.
        answer (`str`, *optional*):
            Final answer.
        style (`str`, *optional*):
            How the solution is split into steps. Defaults to the style that
            [`~stepdpo_trl.data.steps.split_steps`] detects.
    """

    key: str
    problem: Problem
    text: str
    outcome: str
    finish_reason: str
    answer: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class Verdict:
    """
    First wrong step of a solution, according to a judge.

    Args:
        step (`int`, *optional*):
            Number of the step, counted from 1. `None` if the judge abstains.
        judge (`str`):
            Name of the judge.
        evidence (`dict`):
            Evidence for the verdict.
        solution (`str`, *optional*):
            Digest of the solution's text. Runs of earlier releases lack it.
    """

    step: int | None
    judge: str
    evidence: dict[str, Any]
    solution: str | None = None


def text_digest(*parts: object) -> str:
    """Return a short hash of texts."""
    return digest_of(parts)


def digest_of(parts: Iterable[object]) -> str:
    """Return [`text_digest`] of many texts, without keeping them in memory."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(f"\0{part}".encode() if number else str(part).encode())
    return digest.hexdigest()[:16]


def is_of(solution: Solution, digest: str | None) -> bool:
    """Return whether a record belongs to the text of a solution, given its digest (`None` in old runs)."""
    return digest is None or digest == text_digest(solution.text)


_PROBLEM_COLUMNS = ("problem", "question", "prompt")
_IMAGE_COLUMNS = ("image", "images")


class ProblemFile(Sequence[Problem]):
    """
    Problems of a file, which are read when they are used. See [`read_problems`].

    Args:
        path (`Path`):
            The file.
        rows (`Sequence`):
            Its rows, checked by [`check_rows`].
        selected (`range`):
            Numbers of the rows to use.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.
    """

    def __init__(self, path: Path, rows: Sequence[Any], selected: range, checker: Checker = MATH) -> None:
        self._path, self._rows, self._selected, self._checker = path, rows, selected, checker

    def __reduce__(self) -> Any:  # workers of Ray open the file again
        return _reopen, (self._path.absolute(), self._selected, self._checker)

    def __len__(self) -> int:
        return len(self._selected)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> "ProblemFile": ...
    def __getitem__(self, index: int | slice) -> "Problem | ProblemFile":
        if isinstance(index, slice):
            return ProblemFile(self._path, self._rows, self._selected[index], self._checker)
        return _checked_problem(self._rows[self._selected[index]], self._checker)

    def __iter__(self) -> Iterator[Problem]:
        selected = self._selected
        rows = islice(self._rows, selected.start, selected.stop, selected.step)
        return (_checked_problem(row, self._checker) for row in rows)


def _reopen(path: Path, selected: range, checker: Checker) -> ProblemFile:
    return ProblemFile(path, open_rows(path), selected, checker)


def _checked_problem(row: Any, checker: Checker) -> Problem:
    problem = _problem(row, checker.custom)
    assert isinstance(problem, Problem), problem
    return problem


def read_problems(path: str | Path, limit: int | None = None, checker: Checker = MATH) -> ProblemFile:
    """
    Read problems from JSON Lines or Parquet.

    Rows have `problem` (or `question`, or `prompt`) and `answer`, and optionally `solution` and `id`. An `answer` that
    contains `####`, as in GSM8K, is a solution followed by the final answer. For a checker of the user, `answer` is
    optional too, and rows keep all their columns.

    Args:
        path (`str` or `Path`):
            The file.
        limit (`int`, *optional*):
            Maximum number of problems, from the beginning of the file.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.

    Returns:
        [`ProblemFile`]: The problems. Without a column `id`, the id is a hash of the text.

    Raises:
        RunError: If the file cannot be read, or rows are invalid. The message counts them and quotes the first five.
    """
    rows = open_rows(Path(path))
    check_rows(rows, str(path), limit, checker)
    return ProblemFile(Path(path), rows, range(len(rows))[:limit], checker)


def problems_of(rows: Sequence[Any], where: str, limit: int | None = None, checker: Checker = MATH) -> list[Problem]:
    """
    Convert rows to problems; see [`read_problems`] for the columns.

    Args:
        rows (`Sequence`):
            The rows.
        where (`str`):
            Origin of the rows, for error messages.
        limit (`int`, *optional*):
            Maximum number of problems.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.

    Returns:
        `list[Problem]`: The problems.

    Raises:
        RunError: If rows are invalid or have images, or there are none.
    """
    check_rows(rows, where, limit, checker)
    return [_checked_problem(row, checker) for row in rows[:limit]]


def check_rows(rows: Sequence[Any], where: str, limit: int | None = None, checker: Checker = MATH) -> None:
    """
    Check that rows are different problems; see [`read_problems`] for the columns.

    Args:
        rows (`Sequence`):
            The rows.
        where (`str`):
            Origin of the rows, for error messages.
        limit (`int`, *optional*):
            Maximum number of problems. Later rows may be invalid, but must not have images.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.

    Raises:
        RunError: If rows are invalid or have images, or there are none.
    """
    row_numbers: dict[str, int] = {}
    first_errors: list[str] = []
    errors = 0
    for number, row in enumerate(rows, start=1):
        images = [name for name in _IMAGE_COLUMNS if isinstance(row, Mapping) and row.get(name)]
        if images:
            raise RunError(
                f"Row {number} of {where} has a column `{images[0]}`, but problems must be text: remove the problems "
                "with images from the file."
            )
        if limit is not None and number > limit:
            continue
        problem = _problem(row, checker.custom)
        if isinstance(problem, str):
            error = problem
        elif (first := row_numbers.setdefault(problem.id, number)) < number:
            error = f"same text as row {first}" if row.get("id") is None else f"same id {problem.id!r} as row {first}"
        else:
            continue
        errors += 1
        if len(first_errors) < 5:
            first_errors.append(f"row {number}: {error}")
    if errors:
        raise RunError(
            f"{counted(errors, 'row')} of {where} cannot be used: {'; '.join(first_errors)}"
            f"{' ...' if errors > 5 else ''}. Fix or remove such rows."
        )
    if not row_numbers:
        raise RunError(f"{where} has no problems. Pass a file with at least one row.")


def read_texts(path: str | Path) -> Iterator[str]:
    """
    Read the texts of problems. Unlike in [`read_problems`], answers are optional.

    Args:
        path (`str` or `Path`):
            JSON Lines or Parquet.

    Yields:
        `str`: The texts.

    Raises:
        RunError: If the file cannot be read, or a row has no text.
    """
    for number, row in enumerate(open_rows(Path(path)), start=1):
        column = next((name for name in _PROBLEM_COLUMNS if isinstance(row, Mapping) and name in row), None)
        if column is None:
            raise RunError(
                f"Row {number} of {path} has no column `problem` (or `question`). Add it, or remove the row."
            )
        yield str(row[column])


def _problem(row: Any, any_answer: bool) -> Problem | str:
    """Convert a row to a problem, or return the reason why it is invalid."""
    if not isinstance(row, Mapping):
        return f"{row!r:.40} is not an object"
    column = next((name for name in _PROBLEM_COLUMNS if name in row), None)
    if column is None:
        return f"no column `problem` (or `question`), only {sorted(row)}"
    text, answer, solution = row[column], row.get("answer"), row.get("solution") or ""
    if not isinstance(text, str) or not text.strip():
        return f"`{column}` is {'not text' if text and not isinstance(text, str) else 'empty'} ({text!r:.40})"
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and isfinite(answer):
        answer = str(answer)
    if any_answer and not isinstance(answer, str):
        answer = ""
    if not isinstance(answer, str) or not (answer.strip() or any_answer):
        return f"no `answer` ({text[:40]!r})"
    if "####" in answer:
        reasoning, _, answer = answer.rpartition("####")
        solution = solution or reasoning.strip()
    if not answer.strip() and not any_answer:
        return f"no final answer after `####` ({text[:40]!r})"
    try:
        name = text_digest(text) if row.get("id") is None else str(row["id"])
        f"{name}{text}{answer}{solution}".encode()
    except UnicodeEncodeError as error:
        return f"contains text that cannot be encoded ({error.reason}: {error.object[error.start]!r})"
    kept: dict[str, Any] = {}
    for column in row if any_answer else ():
        try:
            kept[str(column)] = json.loads(json.dumps(row[column]))
        except (TypeError, ValueError) as error:
            return f"the column `{column}` cannot be stored as JSON ({error}; {text[:40]!r})"
    return Problem(name, text.strip(), answer.strip(), solution, kept if any_answer else None)


def write_problem(problem: Problem) -> dict[str, Any]:
    """Return the record of a problem. Its key is the id."""
    row = {} if problem.row is None else {"row": problem.row}
    return {"problem": problem.problem, "answer": problem.answer, "solution": problem.solution, **row}


def shard_of(problems: Sequence[Problem], shard: tuple[int, int]) -> Sequence[Problem]:
    """
    Select the problems of a shard.

    Args:
        problems (`Sequence[Problem]`):
            All problems.
        shard (`tuple[int, int]`):
            Index i of the shard, and number n of shards.

    Returns:
        `Sequence[Problem]`: Every n-th problem, starting with problem i.
    """
    index, count = shard
    return problems if count == 1 else problems[index::count]


# Counts of the pipeline stages in the order of the line, with their names there
_COUNTS = {
    "right": "right",
    "wrong": "wrong",
    "unreadable": "unreadable",
    "located": "located",
    "abstained": "not located",
    "rectified": "corrected",
    "given up": "given up",
    "samples": "samples",
    "pairs": "pairs",
    "dropped": "dropped by the check",
}


def count_line(stage: str, folder: str | Path, counts: Mapping[str, int]) -> str:
    """
    Format the counts of a pipeline stage as one line.

    Args:
        stage (`str`):
            Name of the stage, such as `"collect"`.
        folder (`str` or `Path`):
            Run folder.
        counts (`Mapping[str, int]`):
            The counts.

    Returns:
        `str`: The line, such as `"collect in run: 23 right, 17 wrong"`.
    """
    names = [name for name in _COUNTS if name in counts] + [name for name in counts if name not in _COUNTS]
    shown = ", ".join(f"{counts[name]:,} {_COUNTS.get(name, name)}" for name in names)
    return f"{stage} in {folder}: {shown or 'nothing to do'}"
