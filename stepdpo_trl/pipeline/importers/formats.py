"""
Step pairs, and solutions whose first wrong step is known, from what others published: PRM800K, Math-Shepherd and
ProcessBench. The files are read as they are, zipped (.gz) or not. Standard library only.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .math_shepherd import math_shepherd_cases, read_math_shepherd
from .prm800k import prm800k_cases, read_prm800k
from .published import LocalizationCase, rows

__all__ = [
    "FORMATS",
    "Format",
    "LocalizationCase",
    "localization_cases",
    "read_math_shepherd",
    "read_prm800k",
    "read_processbench",
]


def read_processbench(path: str | Path, counts: Counter[str] | None = None) -> Iterator[LocalizationCase]:
    """
    Read the solutions of ProcessBench, in a JSON array or one a line. It gives no pairs: no step has an alternative.

    Args:
        path (`str` or `Path`):
            The file.
        counts (`Counter`, *optional*):
            Receives the number of rows and of cases.

    Yields:
        `LocalizationCase`: One for every row.

    Raises:
        ValueError: If the file is not in this format; names the row.
    """
    counts = Counter() if counts is None else counts
    for row in rows(path, "processbench"):
        steps, label = row.get("steps", list), row.get("label", int)
        if not steps or not all(isinstance(step, str) for step in steps):
            row.refuse("`steps`", steps)
        if not -1 <= label < len(steps):
            row.refuse(f"`label` (of {len(steps)} steps)", label)
        counts.update(("rows", "cases"))
        first_wrong = None if label == -1 else label + 1
        yield LocalizationCase(row.get("id", str), row.get("problem", str), tuple(steps), first_wrong, row.source)


def localization_cases(
    format: str, path: str | Path, counts: Counter[str] | None = None
) -> Iterator[LocalizationCase]:
    """
    Read solutions whose first wrong step is known. Of PRM800K these are the solutions rated up to a -1 or to their end
    (in phase 1 only those without a -1 are whole), of Math-Shepherd those without a + after a -.

    Args:
        format (`str`):
            One of `FORMATS`.
        path (`str` or `Path`):
            The file.
        counts (`Counter`, *optional*):
            Receives the number of rows, of cases, and of the other rows by reason.

    Returns:
        `Iterator[LocalizationCase]`: The solutions.

    Raises:
        ValueError: If there is no such format, or the file is not in it.
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}. Choose one of {sorted(FORMATS)}.")
    return FORMATS[format].cases(path, Counter() if counts is None else counts)


class Format(NamedTuple):
    """The readers of a format: `pairs` of step pairs, if it has any, and `cases` of [`LocalizationCase`]s."""

    pairs: Callable[[str | Path, Counter[str] | None], Iterator[dict[str, Any]]] | None
    cases: Callable[[str | Path, Counter[str]], Iterator[LocalizationCase]]


FORMATS = {
    "prm800k": Format(read_prm800k, prm800k_cases),
    "math_shepherd": Format(read_math_shepherd, math_shepherd_cases),
    "processbench": Format(None, read_processbench),
}
