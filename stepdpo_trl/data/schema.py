"""Step preference records and validation of step data.

Standard library only, because both the trainer and the data pipeline use it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

PREFIX_COLUMN = "initial_reason_steps"
REQUIRED_COLUMNS = ("prompt", PREFIX_COLUMN, "chosen", "rejected")
OPTIONAL_COLUMNS = ("chosen_ends_solution", "rejected_ends_solution")
IMAGE_COLUMNS = ("image", "images")  # one image per row, or a list of images


@dataclass(frozen=True)
class StepPreference:
    """
    Step pair with the columns of `xinlai/Math-Step-DPO-10K` and two optional flags.

    Args:
        prompt (`str` or `list[dict]`):
            The problem, or the messages before the solution.
        chosen (`str`):
            Preferred step s_win, starting with the first character after `initial_reason_steps`.
        rejected (`str`):
            Rejected step s_lose, starting at the same position.
        initial_reason_steps (`str`, *optional*, defaults to `""`):
            The correct steps s_1 ... s_(k-1), usually followed by the label "Step k:" of the next step.
        chosen_ends_solution (`bool`, *optional*, defaults to `False`):
            Whether the solution ends after `chosen`. If `True`, the end of the turn is trained as part of the step.
        rejected_ends_solution (`bool`, *optional*, defaults to `False`):
            Whether the solution ends after `rejected`.
    """

    prompt: str | list[dict[str, Any]]
    chosen: str
    rejected: str
    initial_reason_steps: str = ""
    chosen_ends_solution: bool = False
    rejected_ends_solution: bool = False

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> "StepPreference":
        """
        Validate a row and convert it to a record.

        Other columns are ignored. A null prefix becomes an empty string.

        Args:
            row (`Mapping[str, Any]`):
                The row.
            where (`str`):
                Description of the row for error messages, such as `"row 3 of the train dataset"`.

        Returns:
            `StepPreference`: The record.

        Raises:
            ValueError: If a column is missing, empty or of the wrong type, if its text is not valid Unicode, if both
                steps are equal, or if the row has a prefix although its prompt ends with an assistant turn.
        """
        check_columns(row, where)
        for column in REQUIRED_COLUMNS:
            _check_encodable(row[column], column, where)
        prompt = row["prompt"]
        prefix = "" if row[PREFIX_COLUMN] is None else row[PREFIX_COLUMN]
        if not isinstance(prefix, str):
            raise ValueError(
                f"`{PREFIX_COLUMN}` of {where} is {_show(prefix)}. It must be a string or null. Join the steps into "
                "one string."
            )
        for column in ("chosen", "rejected"):
            step = row[column]
            if not isinstance(step, str):
                hint = " Pass plain text, not messages." if isinstance(step, list) else ""
                raise ValueError(f"`{column}` of {where} is {_show(step)}. It must be a non-empty string.{hint}")
            if not step.strip():
                raise ValueError(
                    f"`{column}` of {where} is empty ({_show(step)}), so there is no step to train on. Remove the row."
                )
        if row["chosen"] == row["rejected"]:
            raise ValueError(
                f"`chosen` and `rejected` of {where} are the same ({_show(row['chosen'])}), so the row expresses no "
                "preference. Remove the row."
            )
        _check_prompt(prompt, prefix, where)
        flags = {column: _flag(row, column, where) for column in OPTIONAL_COLUMNS}
        return cls(prompt, row["chosen"], row["rejected"], prefix, **flags)


def is_step_data(columns: Iterable[str]) -> bool:
    """Return whether rows with these columns are step pairs rather than ordinary preference pairs."""
    return PREFIX_COLUMN in columns


def has_images(columns: Iterable[str]) -> bool:
    """Return whether rows with these columns have images, by the same columns as [`~trl.DPOTrainer`]."""
    return any(column in columns for column in IMAGE_COLUMNS)


def get_images(row: Mapping[str, Any], where: str) -> list[Any]:
    """
    Return the images of a row, as stored in its column `image` or `images`.

    Args:
        row (`Mapping[str, Any]`):
            The row.
        where (`str`):
            Description of the row for error messages.

    Returns:
        `list`: The images, which can be of any type but `None`. Empty if the row has no such column.

    Raises:
        ValueError: If the row has both columns, or if a column has no value of the right type.
    """
    columns = [column for column in IMAGE_COLUMNS if column in row]
    if len(columns) > 1:
        raise ValueError(f"{where} has both columns `image` and `images`. Remove one of the two.")
    if not columns:
        return []
    value = row[columns[0]]
    if columns == ["image"]:
        if value is None or isinstance(value, (list, tuple)):
            raise ValueError(
                f"`image` of {where} is {_show(value)}. It must be one image. Remove the row, or use a column "
                "`images` with a list of images, which is empty for rows without an image."
            )
        return [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"`images` of {where} is {_show(value)}. It must be a list of images, which is empty for rows without an "
            "image."
        )
    if any(image is None for image in value):
        raise ValueError(f"`images` of {where} is {_show(value)}. Remove the null values, or remove the row.")
    return list(value)


def check_plain_columns(columns: Iterable[str], where: str) -> None:
    """
    Check that ordinary preference pairs have no misspelled `initial_reason_steps` column.

    Args:
        columns (`Iterable[str]`):
            Column names.
        where (`str`):
            Description of the rows for error messages.

    Raises:
        ValueError: If a column looks like a misspelled `initial_reason_steps`, whose prefixes would be ignored.
    """
    for nearest in get_close_matches(PREFIX_COLUMN, columns, n=1, cutoff=0.85):
        raise ValueError(
            f"Column `{nearest}` of {where} looks like `{PREFIX_COLUMN}`, which is missing. Rename it to train on "
            "steps, or remove it to train on ordinary preference pairs."
        )


def check_columns(columns: Iterable[str], where: str) -> None:
    """
    Check that step data has the required columns.

    Args:
        columns (`Iterable[str]`):
            Column names.
        where (`str`):
            Description of the rows for error messages.

    Raises:
        ValueError: If a required column is missing or an optional column is misspelled.
    """
    columns = list(columns)
    for required in REQUIRED_COLUMNS:
        if required not in columns:
            nearest = get_close_matches(required, [c for c in columns if c not in REQUIRED_COLUMNS], n=1, cutoff=0.0)
            hint = f" Rename the nearest column, {nearest[0]!r}, if it contains this data." if nearest else ""
            raise ValueError(f"Column `{required}` is missing from {where}, which has {sorted(columns)}.{hint}")
    for column in columns:
        similar = _similar_optional(column)
        if similar and column not in OPTIONAL_COLUMNS:
            raise ValueError(f"Column `{column}` of {where} is unknown. Did you mean `{similar}`? Rename it.")


@cache  # this takes a tenth of the tokenization of a row otherwise
def _similar_optional(column: str) -> str | None:
    return next(iter(get_close_matches(column, OPTIONAL_COLUMNS, n=1, cutoff=0.9)), None)


def _check_encodable(value: Any, column: str, where: str) -> None:
    """Check that a text, or the texts in messages, contain no half of a surrogate pair, which tokenizers refuse."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{column}` of {where} contains {value[error.start]!r}, half of a character, which is no text. Fix "
                "or remove the row."
            ) from error
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_encodable(part, column, where)


def _check_prompt(prompt: Any, prefix: str, where: str) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"`prompt` of {where} is empty. It must contain the problem. Fix or remove the row.")
        return
    is_messages = isinstance(prompt, list) and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    if not is_messages or not prompt:
        raise ValueError(
            f"`prompt` of {where} is {_show(prompt)}. It must be a string, or a list of messages such as "
            '[{"role": "user", "content": "What is 2 + 3?"}].'
        )
    if prompt[-1]["role"] == "assistant" and prefix:
        raise ValueError(
            f"`prompt` of {where} ends with an assistant turn, but the row also has `{PREFIX_COLUMN}`, so it is "
            f"ambiguous which of them the step continues. Move all text of the assistant to `{PREFIX_COLUMN}` and end "
            "the prompt with a user turn."
        )


def _flag(row: Mapping[str, Any], column: str, where: str) -> bool:
    value = row.get(column)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"`{column}` of {where} is {_show(value)}. It must be true, false or null.")
    return value


def _show(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
