"""ProcessBench (https://huggingface.co/papers/2412.06559): solutions with a known first wrong step."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .published import LocalizationCase, rows


def read_processbench(path: str | Path, counts: Counter[str] | None = None) -> Iterator[LocalizationCase]:
    """
    Read the solutions of ProcessBench. It has no step pairs, since no step has an alternative.

    Args:
        path (`str` or `Path`):
            The file, in JSON (an array) or JSON Lines.
        counts (`Counter`, *optional*):
            Updated with the number of rows and cases.

    Yields:
        `LocalizationCase`: One per row.

    Raises:
        ValueError: If the file is not in this format. The message contains the row.
    """
    counts = Counter() if counts is None else counts
    for row in rows(path, "processbench"):
        steps, label = row.get("steps", list), row.get("label", int)
        if not steps or not all(isinstance(step, str) for step in steps):
            row.refuse("`steps`", steps)
        if not -1 <= label < len(steps):
            row.refuse(f"`label` (steps: {len(steps)})", label)
        counts.update(("rows", "cases"))
        first_wrong = None if label == -1 else label + 1
        yield LocalizationCase(row.get("id", str), row.get("problem", str), tuple(steps), first_wrong, row.source)
