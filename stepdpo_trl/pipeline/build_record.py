"""Counts and examples of the last build of a run, kept in its folder for reports."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import write_atomically
from .reading import reading

BUILD = "build.json"
_EXAMPLES = 3
_COLUMNS = ("prompt", "initial_reason_steps", "rejected", "chosen")


@dataclass(frozen=True)
class BuildRecord:
    """
    Result of a build.

    Args:
        output_file (`str`):
            Path or URL of the dataset.
        pairs (`int`):
            Number of pairs.
        left_out (`dict[str, int]`, *optional*):
            Number of dropped pairs per reason.
        examples (`list[dict[str, str]]`, *optional*):
            Example pairs.
    """

    output_file: str
    pairs: int
    left_out: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)


def make_record(output_file: str, rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, int]) -> BuildRecord:
    """
    Make the record of a build.

    Args:
        output_file (`str`):
            Path or URL of the dataset.
        rows (`Sequence[Mapping]`):
            The pairs.
        left_out (`Mapping[str, int]`):
            Number of dropped pairs per reason.

    Returns:
        [`BuildRecord`]: The record.
    """
    return BuildRecord(output_file, len(rows), dict(left_out), choose_examples(rows))


def write_build(path: str | Path, record: BuildRecord) -> None:
    """
    Write the record of a build to `build.json`.

    Args:
        path (`str` or `Path`):
            Run folder, or the folder of its shards.
        record ([`BuildRecord`]):
            The record.
    """
    write_atomically(Path(path) / BUILD, json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")


def read_build(path: str | Path) -> BuildRecord | None:
    """
    Read the record of the last build.

    Args:
        path (`str` or `Path`):
            Run folder, or the folder of its shards.

    Returns:
        [`BuildRecord`] or `None`: The record, `None` if nothing was built.
    """
    file = Path(path) / BUILD
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    with reading("The content", file, "Run `stepdpo build` again."):
        return BuildRecord(**json.loads(text))


def choose_examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """
    Choose example pairs, evenly spaced.

    Args:
        rows (`Sequence[Mapping]`):
            The pairs.

    Returns:
        `list[dict[str, str]]`: Up to three pairs with their text columns.
    """
    count = min(_EXAMPLES, len(rows))
    return [{column: rows[index * len(rows) // count][column] for column in _COLUMNS} for index in range(count)]
