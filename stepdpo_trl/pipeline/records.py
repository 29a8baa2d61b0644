"""What the stages hand on to each other. Standard library only."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from ..runs.run_directory import RunError


@dataclass(frozen=True)
class Problem:
    """
    A problem with a known answer.

    Args:
        id (`str`):
            Its name in the run.
        problem (`str`):
            The text.
        answer (`str`):
            The gold final answer.
        solution (`str`, *optional*, defaults to `""`):
            The gold solution, for judges.
    """

    id: str
    problem: str
    answer: str
    solution: str = ""


@dataclass(frozen=True)
class Solution:
    """
    A sampled solution.

    Args:
        key (`str`):
            Its name in the run.
        problem (`Problem`):
            The problem.
        text (`str`):
            The solution, from the beginning of the assistant's turn.
        outcome (`str`):
            `"right"`, `"wrong"` or `"unreadable"`: no final answer that can be compared.
        finish_reason (`str`):
            `"stop"`, or `"length"` where it was cut.
        answer (`str`, *optional*):
            The final answer.
        style (`str`, *optional*):
            How its steps are told apart, defaults to what [`~stepdpo_trl.data.steps.split_steps`] finds.
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
    Where a solution first goes wrong.

    Args:
        step (`int`, *optional*):
            Number of the step, from 1. `None`: no verdict.
        judge (`str`):
            Who says so.
        evidence (`dict`):
            Why.
    """

    step: int | None
    judge: str
    evidence: dict[str, Any]


def text_digest(*parts: object) -> str:
    """Short name for a text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


_PROBLEM_COLUMNS = ("problem", "question", "prompt")


def read_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """
    Read problems from JSON lines or Parquet.

    Rows have `problem` (or `question`, or `prompt`) and `answer`, and may have `solution` and `id`. An `answer` with
    `####` in it, as in GSM8K, is a solution with the final answer behind.

    Args:
        path (`str` or `Path`):
            The file.
        limit (`int`, *optional*):
            Take the first so many.

    Returns:
        `list[Problem]`: The problems. Without `id` they are named by their text.

    Raises:
        RunError: If the file or a row cannot be used; all such rows are counted and the first ones named.
    """
    return problems_of(_read_rows(Path(path)), str(path), limit)


def problems_of(rows: Sequence[Any], where: str, limit: int | None = None) -> list[Problem]:
    """
    Make problems of rows, as [`read_problems`] does.

    Args:
        rows (`Sequence`):
            The rows.
        where (`str`):
            Where they come from, for the error message.
        limit (`int`, *optional*):
            Take the first so many.

    Raises:
        RunError: If a row cannot be used.
    """
    problems: dict[str, Problem] = {}
    texts: dict[str, int] = {}
    wrong = []
    for number, row in enumerate(rows if limit is None else rows[:limit], start=1):
        problem = _problem(row)
        if isinstance(problem, str):
            wrong.append(f"row {number}: {problem}")
        elif problem.id in problems:
            same = (
                f"the text of row {texts[problem.id]} again"
                if row.get("id") is None
                else f"the id {problem.id!r} again"
            )
            wrong.append(f"row {number}: {same}")
        else:
            problems[problem.id] = problem
            texts[problem.id] = number
    if wrong:
        raise RunError(
            f"{len(wrong)} of the rows of {where} cannot be used: {'; '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''}. Mend or remove them."
        )
    if not problems:
        raise RunError(f"{where} has no problems. Give a file with one problem a line.")
    return list(problems.values())


def read_texts(path: str | Path) -> list[str]:
    """
    Read the texts of problems, as [`read_problems`] does, whether they have answers or not.

    Raises:
        RunError: If a row has no text.
    """
    texts = []
    for number, row in enumerate(_read_rows(Path(path)), start=1):
        column = next((name for name in _PROBLEM_COLUMNS if isinstance(row, Mapping) and name in row), None)
        if column is None:
            raise RunError(f"Row {number} of {path} has no `problem` (nor `question`).")
        texts.append(str(row[column]))
    return texts


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        near = (
            get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1) if path.parent.is_dir() else []
        )
        raise RunError(f"There is no file {path}.{f' Did you mean {path.parent / near[0]}?' if near else ''}")
    if path.suffix == ".parquet":
        from datasets import Dataset

        try:
            return list(Dataset.from_parquet(str(path)))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is not a Parquet file that can be read ({error}).") from error
    rows = []
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(
                f"Line {number} of {path} is not JSON ({error}): {line[:60]!r}. Problems are read from JSON lines, "
                "one object a line, or from .parquet."
            ) from error
    return rows


def _problem(row: Any) -> Problem | str:
    """A problem, or why the row is none."""
    if not isinstance(row, Mapping):
        return f"{row!r:.40} is not an object"
    column = next((name for name in _PROBLEM_COLUMNS if name in row), None)
    if column is None:
        return f"has no `problem` (nor `question`), only {sorted(row)}"
    text, answer, solution = row[column], row.get("answer"), row.get("solution") or ""
    if not isinstance(text, str) or not text.strip():
        return f"`{column}` is {'no text' if text and not isinstance(text, str) else 'empty'} ({text!r:.40})"
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        return f"has no `answer` ({text[:40]!r})"
    if "####" in answer:
        reasoning, _, answer = answer.rpartition("####")
        solution = solution or reasoning.strip()
    if not answer.strip():
        return f"has nothing behind `####` ({text[:40]!r})"
    try:
        name = text_digest(text) if row.get("id") is None else str(row["id"])
        f"{name}{text}{answer}{solution}".encode()
    except UnicodeEncodeError as error:
        return f"is no text that can be written ({error.reason}: {error.object[error.start]!r})"
    return Problem(name, text.strip(), answer.strip(), solution)


def write_problem(problem: Problem) -> dict[str, Any]:
    """Record of a problem, under its id."""
    return {"problem": problem.problem, "answer": problem.answer, "solution": problem.solution}


def shard_of(problems: Iterable[Problem], shard: tuple[int, int]) -> list[Problem]:
    """Every n-th problem, beginning with the i-th, of `shard` (i, n)."""
    index, count = shard
    return [problem for number, problem in enumerate(problems) if number % count == index]
