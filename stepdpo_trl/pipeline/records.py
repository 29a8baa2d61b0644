"""Records that the pipeline stages exchange. Standard library only."""

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
    Problem with a known answer.

    Args:
        id (`str`):
            Key of the problem in the run.
        problem (`str`):
            Text of the problem.
        answer (`str`):
            Gold final answer.
        solution (`str`, *optional*, defaults to `""`):
            Gold solution, shown to judges.
    """

    id: str
    problem: str
    answer: str
    solution: str = ""


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
    """

    step: int | None
    judge: str
    evidence: dict[str, Any]


def text_digest(*parts: object) -> str:
    """Return a short hash of texts."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


_PROBLEM_COLUMNS = ("problem", "question", "prompt")
_IMAGE_COLUMNS = ("image", "images")


def read_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """
    Read problems from JSON Lines or Parquet.

    Rows have `problem` (or `question`, or `prompt`) and `answer`, and optionally `solution` and `id`. An `answer` that
    contains `####`, as in GSM8K, is a solution followed by the final answer.

    Args:
        path (`str` or `Path`):
            The file.
        limit (`int`, *optional*):
            Maximum number of problems, from the beginning of the file.

    Returns:
        `list[Problem]`: The problems. Without a column `id`, the id is a hash of the text.

    Raises:
        RunError: If the file cannot be read, or rows are invalid. The message counts them and quotes the first five.
    """
    return problems_of(_read_rows(Path(path)), str(path), limit)


def problems_of(rows: Sequence[Any], where: str, limit: int | None = None) -> list[Problem]:
    """
    Convert rows to problems; see [`read_problems`] for the columns.

    Args:
        rows (`Sequence`):
            The rows.
        where (`str`):
            Origin of the rows, for error messages.
        limit (`int`, *optional*):
            Maximum number of problems.

    Returns:
        `list[Problem]`: The problems.

    Raises:
        RunError: If rows are invalid or have images, or there are none.
    """
    for number, row in enumerate(rows, start=1):
        images = [name for name in _IMAGE_COLUMNS if isinstance(row, Mapping) and row.get(name)]
        if images:
            raise RunError(
                f"Row {number} of {where} has a column `{images[0]}`, but problems must be text: remove the problems "
                "with images from the file."
            )
    problems: dict[str, Problem] = {}
    row_numbers: dict[str, int] = {}
    errors = []
    for number, row in enumerate(rows if limit is None else rows[:limit], start=1):
        problem = _problem(row)
        if isinstance(problem, str):
            errors.append(f"row {number}: {problem}")
        elif problem.id in problems:
            first = row_numbers[problem.id]
            same = f"same text as row {first}" if row.get("id") is None else f"same id {problem.id!r} as row {first}"
            errors.append(f"row {number}: {same}")
        else:
            problems[problem.id] = problem
            row_numbers[problem.id] = number
    if errors:
        raise RunError(
            f"{len(errors)} rows of {where} cannot be used: {'; '.join(errors[:5])}"
            f"{' ...' if len(errors) > 5 else ''}. Fix or remove them."
        )
    if not problems:
        raise RunError(f"{where} has no problems. Pass a file with at least one row.")
    return list(problems.values())


def read_texts(path: str | Path) -> list[str]:
    """
    Read the texts of problems. Unlike in [`read_problems`], answers are optional.

    Args:
        path (`str` or `Path`):
            JSON Lines or Parquet.

    Returns:
        `list[str]`: The texts.

    Raises:
        RunError: If the file cannot be read, or a row has no text.
    """
    texts = []
    for number, row in enumerate(_read_rows(Path(path)), start=1):
        column = next((name for name in _PROBLEM_COLUMNS if isinstance(row, Mapping) and name in row), None)
        if column is None:
            raise RunError(
                f"Row {number} of {path} has no column `problem` (or `question`). Add it, or remove the row."
            )
        texts.append(str(row[column]))
    return texts


def describe_source(path: str | Path) -> dict[str, str]:
    """
    Describe a file of problems for the data card.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `dict[str, str]`: `path`, and `sha256` of the content if the file exists.
    """
    file = Path(path)
    digest = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if file.is_file() else {}
    return {"path": str(path), **digest}


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, n=1, cutoff=0.75)
        raise RunError(f"There is no file {path}.{f' Did you mean {path.parent / near[0]}?' if near else ''}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:  # not with datasets, which caches the rows by path and time, and takes problems[1].parquet for a pattern
            return pyarrow.parquet.ParquetFile(path).read().to_pylist()
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read as Parquet: {error}") from error
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
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"Line {number} of {path} is not JSON ({error}): {line[:60]!r}. Problems are read from JSON Lines, "
                "with one object per line, or from .parquet."
            ) from error
    return rows


def _problem(row: Any) -> Problem | str:
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
    if not isinstance(answer, str) or not answer.strip():
        return f"no `answer` ({text[:40]!r})"
    if "####" in answer:
        reasoning, _, answer = answer.rpartition("####")
        solution = solution or reasoning.strip()
    if not answer.strip():
        return f"no final answer after `####` ({text[:40]!r})"
    try:
        name = text_digest(text) if row.get("id") is None else str(row["id"])
        f"{name}{text}{answer}{solution}".encode()
    except UnicodeEncodeError as error:
        return f"contains text that cannot be encoded ({error.reason}: {error.object[error.start]!r})"
    return Problem(name, text.strip(), answer.strip(), solution)


def write_problem(problem: Problem) -> dict[str, Any]:
    """Return the record of a problem. Its key is the id."""
    return {"problem": problem.problem, "answer": problem.answer, "solution": problem.solution}


def shard_of(problems: Iterable[Problem], shard: tuple[int, int]) -> list[Problem]:
    """
    Select the problems of a shard.

    Args:
        problems (`Iterable[Problem]`):
            All problems.
        shard (`tuple[int, int]`):
            Index i of the shard, and number n of shards.

    Returns:
        `list[Problem]`: Every n-th problem, starting with problem i.
    """
    index, count = shard
    return [problem for number, problem in enumerate(problems) if number % count == index]


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
