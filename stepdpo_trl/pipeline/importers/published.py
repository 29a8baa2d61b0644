"""The rows of published JSON files, what is wrong with a file that is not the one expected, and what rows become."""

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
    An object of a published file.

    Args:
        data (`Any`):
            The object.
        where (`str`):
            What to call it in an error, such as `"line 3 of train.jsonl"`.
        format (`str`):
            A key of `PUBLISHED`.
        id (`str`):
            The file's name and the row's number.
    """

    data: Any
    where: str
    format: str
    id: str

    @property
    def source(self) -> str:
        """Format, file and row."""
        return f"{self.format}:{self.id}"

    def get(self, field: str, *kinds: type) -> Any:
        """
        Look a field up.

        Args:
            field (`str`):
                Its name, with dots for fields of fields.
            *kinds (`type`):
                The types it may have. A missing field is null, so it is an error without `NoneType` among them.

        Raises:
            ValueError: If it has another type.
        """
        value = self.data
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if type(value) not in kinds:
            self.refuse(f"`{field}`", value)
        return value

    def inner(self, data: Any, name: str) -> "Row":
        """An object inside this one, called `name` in an error; a `ValueError` if it is none."""
        if not isinstance(data, dict):
            self.refuse(name, data)
        return Row(data, f"{name} of {self.where}", self.format, self.id)

    def refuse(self, what: str, found: Any) -> NoReturn:
        """Raise a `ValueError` that says what was found and what was expected."""
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(f"{what} of {self.where} is {shown}. Expected {PUBLISHED[self.format]}.")


def rows(path: str | Path, format: str) -> Iterator[Row]:
    """
    Read the rows of a JSON lines file or of a JSON array, zipped or not.

    Args:
        path (`str` or `Path`):
            The file.
        format (`str`):
            A key of `PUBLISHED`.

    Raises:
        ValueError: If there are none, or the text is not JSON or breaks off; names the line.
    """
    path = Path(path)
    expected = f"Expected {PUBLISHED[format]}."
    number, is_empty = 0, True
    with path.open("rb") as head:
        zipped = head.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith("version https://git-lfs"):
                    raise ValueError(f"{path} is a pointer of Git LFS: run `git lfs pull` where it is. {expected}")
                is_array = number == 1 and line.lstrip().startswith("[")
                if is_array:
                    line += lines.read()
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except json.JSONDecodeError as error:
                    start = line if len(line) <= 80 else line[:77] + "..."
                    raise ValueError(
                        f"Line {number + error.lineno - 1} of {path} is not JSON, or not all of it ({error.msg} at "
                        f"column {error.colno}): {start!r}. {expected}"
                    ) from error
                for place, data in enumerate(found, 1) if is_array else [(number, found)]:
                    where = f"{'row' if is_array else 'line'} {place} of {path}"
                    row = Row(data, where, format, f"{path.name}:{place}")
                    if not isinstance(data, dict):
                        row.refuse("The whole", data)
                    is_empty = False
                    yield row
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read after line {number} ({error}). {expected}") from error
    if is_empty:
        raise ValueError(f"{path} is empty. {expected}")


@dataclass(frozen=True)
class LocalizationCase:
    """
    A solution whose first wrong step is known.

    Args:
        id (`str`):
            The row's own id, or the file's name and the row's number.
        problem (`str`):
            The problem.
        steps (`tuple[str, ...]`):
            The steps of the solution, without "Step k:".
        first_wrong (`int` or `None`):
            The first wrong step, counted from 1; `None` if no step is wrong.
        source (`str`):
            Format, file and row, such as `"prm800k:phase2_train.jsonl:17"`.
        answer (`str`, *optional*, defaults to `""`):
            The right final answer, where the file has it.
    """

    id: str
    problem: str
    steps: tuple[str, ...]
    first_wrong: int | None
    source: str
    answer: str = ""


class PublishedStep(NamedTuple):
    """A step of a solution, as one side of a pair."""

    text: str
    full: str  # the step and what follows it in its solution
    ends: bool
    source: str


def matched(
    right: dict[str, PublishedStep], wrong: dict[str, PublishedStep]
) -> Iterator[tuple[PublishedStep, PublishedStep]]:
    """Each wrong step with a right one; the right ones take turns, and a step that is both is left out."""
    rights = [step for text, step in right.items() if text not in wrong]
    wrongs = [step for text, step in wrong.items() if text not in right]
    return ((rights[k % len(rights)], step) for k, step in enumerate(wrongs) if rights)


def pair(
    dataset: str, prompt: str, lead: str, chosen: PublishedStep, rejected: PublishedStep, answer: str, index: int
) -> dict[str, Any]:
    """The row of a pair, for the step with this index from 0."""
    same = chosen.source == rejected.source
    return {
        "dataset": dataset,
        "prompt": prompt,
        "initial_reason_steps": lead,
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
