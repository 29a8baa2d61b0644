"""Reading and checking of published JSON files, and the step pairs and localization cases that importers return."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PUBLISHED = {
    "prm800k": 'phase*_train.jsonl of openai/prm800k: {"question": {"problem": ...}, "label": {"steps": [{'
    '"completions": [{"text": ..., "rating": -1, 0 or 1}], "chosen_completion": ...}], "finish_reason": ...}}',
    "math_shepherd": 'math-shepherd.jsonl of peiyi9979/Math-Shepherd: {"input": "... Step 1: ... ки\\nStep 2: ... ки"'
    ', "label": "... Step 1: ... +\\nStep 2: ... -", "task": ...}',
    "processbench": 'gsm8k.json, math.json, ... of Qwen/ProcessBench: {"id": ..., "problem": ..., "steps": [...], '
    '"label": the first wrong step counted from 0, or -1}',
}


@dataclass(frozen=True)
class Row:
    """
    A row of a published file, or an object inside it.

    Args:
        data (`Any`):
            The object.
        where (`str`):
            Its location for error messages, such as `"line 3 of train.jsonl"`.
        format (`str`):
            Key of [`PUBLISHED`].
        id (`str`):
            Name of the file and number of the row.
    """

    data: Any
    where: str
    format: str
    id: str

    @property
    def source(self) -> str:
        """Format, file and row, such as `"prm800k:phase2_train.jsonl:17"`."""
        return f"{self.format}:{self.id}"

    def get(self, field: str, *kinds: type) -> Any:
        """
        Return the value of a field.

        Args:
            field (`str`):
                Name of the field. Dots separate the names of nested fields.
            *kinds (`type`):
                Allowed types. A missing field counts as null.

        Returns:
            `Any`: The value.

        Raises:
            ValueError: If the value has another type.
        """
        value = self.data
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if type(value) not in kinds:
            self.refuse(f"`{field}`", value)
        return value

    def inner(self, data: Any, name: str) -> "Row":
        """
        Wrap an object inside this one.

        Args:
            data (`Any`):
                The object.
            name (`str`):
                Its name for error messages.

        Returns:
            `Row`: The wrapped object.

        Raises:
            ValueError: If `data` is not an object.
        """
        if not isinstance(data, dict):
            self.refuse(name, data)
        return Row(data, f"{name} of {self.where}", self.format, self.id)

    def refuse(self, what: str, found: Any) -> NoReturn:
        """
        Raise an error that shows an unexpected value and the expected format.

        Args:
            what (`str`):
                Name of the value.
            found (`Any`):
                The value.

        Raises:
            ValueError: Always.
        """
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(f"{what} of {self.where} is {shown}. Expected {PUBLISHED[self.format]}.")


def rows(path: str | Path, format: str) -> Iterator[Row]:
    """
    Read the rows of a JSON Lines file or of a JSON array.

    Args:
        path (`str` or `Path`):
            The file. It may be compressed with gzip.
        format (`str`):
            Key of [`PUBLISHED`].

    Yields:
        `Row`: The rows.

    Raises:
        ValueError: If the file has no rows, is not valid JSON, or is truncated. The message contains the line.
    """
    path = Path(path)
    expected = f"Expected {PUBLISHED[format]}."
    number, is_empty = 0, True
    with path.open("rb") as head:
        compressed = head.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if compressed else path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith("version https://git-lfs"):
                    raise ValueError(f"{path} is a Git LFS pointer. Run `git lfs pull` in its repository. {expected}")
                is_array = number == 1 and line.lstrip().startswith("[")
                if is_array:
                    line += lines.read()
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    start = line if len(line) <= 80 else line[:77] + "..."
                    at, reason = number, str(error)
                    if isinstance(error, json.JSONDecodeError):
                        at, reason = number + error.lineno - 1, f"{error.msg} at column {error.colno}"
                    raise ValueError(
                        f"Line {at} of {path} is not valid JSON, or is truncated ({reason}): {start!r}. {expected}"
                    ) from error
                for position, data in enumerate(found, 1) if is_array else [(number, found)]:
                    where = f"{'row' if is_array else 'line'} {position} of {path}"
                    row = Row(data, where, format, f"{path.name}:{position}")
                    if not isinstance(data, dict):
                        row.refuse("The value", data)
                    is_empty = False
                    yield row
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read after line {number} ({error}). {expected}") from error
    if is_empty:
        raise ValueError(f"{path} is empty. {expected}")


@dataclass(frozen=True)
class LocalizationCase:
    """
    A solution with a known first wrong step.

    Args:
        id (`str`):
            Id of the row, or name of the file and number of the row.
        problem (`str`):
            The problem.
        steps (`tuple[str, ...]`):
            The steps of the solution, without labels such as "Step 1:".
        first_wrong (`int` or `None`):
            The first wrong step, counted from 1; `None` if no step is wrong.
        source (`str`):
            Format, file and row, such as `"prm800k:phase2_train.jsonl:17"`.
        answer (`str`, *optional*, defaults to `""`):
            The gold answer, if the file contains it.
    """

    id: str
    problem: str
    steps: tuple[str, ...]
    first_wrong: int | None
    source: str
    answer: str = ""


class PublishedStep(NamedTuple):
    """
    A step of a published solution, used as the chosen or rejected step of a pair.

    Args:
        text (`str`):
            The step.
        full (`str`):
            The step and all steps after it in its solution.
        ends (`bool`):
            Whether the step ends its solution.
        source (`str`):
            Format, file and row.
    """

    text: str
    full: str
    ends: bool
    source: str


def matched(
    right: dict[str, PublishedStep], wrong: dict[str, PublishedStep]
) -> Iterator[tuple[PublishedStep, PublishedStep]]:
    """
    Match each wrong step with a right step. The right steps take turns.

    Args:
        right (`dict[str, PublishedStep]`):
            Right steps, by text.
        wrong (`dict[str, PublishedStep]`):
            Wrong steps, by text. Steps that are also right are skipped.

    Returns:
        `Iterator[tuple[PublishedStep, PublishedStep]]`: Pairs of a right and a wrong step.
    """
    rights = [step for text, step in right.items() if text not in wrong]
    wrongs = [step for text, step in wrong.items() if text not in right]
    return ((rights[k % len(rights)], step) for k, step in enumerate(wrongs) if rights)


def pair(
    dataset: str, prompt: str, prefix: str, chosen: PublishedStep, rejected: PublishedStep, answer: str, index: int
) -> dict[str, Any]:
    """
    Create the row of a step pair.

    Args:
        dataset (`str`):
            Name of the dataset.
        prompt (`str`):
            The problem.
        prefix (`str`):
            The previous steps.
        chosen (`PublishedStep`):
            The preferred step.
        rejected (`PublishedStep`):
            The rejected step.
        answer (`str`):
            The gold answer.
        index (`int`):
            Index of the step, from 0.

    Returns:
        `dict[str, Any]`: The row.
    """
    same = chosen.source == rejected.source
    return {
        "dataset": dataset,
        "prompt": prompt,
        "initial_reason_steps": prefix,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "full_chosen": chosen.full,
        "full_rejected": rejected.full,
        "answer": answer,
        "step_index": index + 1,
        "chosen_ends_solution": chosen.ends,
        "rejected_ends_solution": rejected.ends,
        "source": rejected.source if same else f"{rejected.source}, {chosen.source}",
    }
