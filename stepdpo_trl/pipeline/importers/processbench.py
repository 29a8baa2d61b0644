"""ProcessBench (arXiv 2412.06559): solutions with a known first wrong step."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .published import LocalizationCase, rows


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
