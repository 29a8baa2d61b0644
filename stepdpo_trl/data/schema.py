"""The step preference record, and the checks that every row of step data has to pass.

Standard library only: the trainer and the data pipeline meet in these records.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

PREFIX_COLUMN = "initial_reason_steps"
REQUIRED_COLUMNS = ("prompt", PREFIX_COLUMN, "chosen", "rejected")
OPTIONAL_COLUMNS = ("chosen_ends_solution", "rejected_ends_solution")


@dataclass(frozen=True)
class StepPreference:
    """
    One step pair: the columns of `xinlai/Math-Step-DPO-10K`, and whether a step ends the solution.

    Args:
        prompt (`str` or `list[dict]`):
            The problem, or the messages up to the solution.
        chosen (`str`):
            The preferred step s_win, from the first character after `initial_reason_steps`.
        rejected (`str`):
            The undesirable step s_lose, likewise.
        initial_reason_steps (`str`, *optional*, defaults to `""`):
            The correct steps s_1 ... s_(k-1) and usually the "Step k:" that begins the next one.
        chosen_ends_solution (`bool`, *optional*, defaults to `False`):
            Whether the solution is over after `chosen`, so that the end of the turn is learnt with it.
        rejected_ends_solution (`bool`, *optional*, defaults to `False`):
            The same for `rejected`.
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
        Check a row and make a record of it. Other columns are ignored; a null prefix is an empty one.

        Args:
            row (`Mapping[str, Any]`):
                The row.
            where (`str`):
                What to call the row in an error, such as `"row 3 of the train dataset"`.

        Returns:
            `StepPreference`: The record.

        Raises:
            ValueError: If a column is missing, of a wrong type or empty, if both steps are the same, or if the
                prompt already ends with an assistant turn and there is a prefix as well.
        """
        check_columns(row, where)
        prompt = row["prompt"]
        prefix = "" if row[PREFIX_COLUMN] is None else row[PREFIX_COLUMN]
        if not isinstance(prefix, str):
            raise ValueError(
                f"`{PREFIX_COLUMN}` of {where} is {_show(prefix)}. It must be a string: join the steps into one text "
                "(it may be empty or null)."
            )
        for column in ("chosen", "rejected"):
            step = row[column]
            if not isinstance(step, str):
                hint = " Step data has plain text here, not messages." if isinstance(step, list) else ""
                raise ValueError(f"`{column}` of {where} is {_show(step)}. It must be a non-empty string.{hint}")
            if not step.strip():
                raise ValueError(
                    f"`{column}` of {where} is empty ({step!r}): there is no step to learn from. Remove the row."
                )
        if row["chosen"] == row["rejected"]:
            raise ValueError(
                f"`chosen` and `rejected` of {where} are the same ({_show(row['chosen'])}): there is nothing to "
                "prefer. Remove the row."
            )
        _check_prompt(prompt, prefix, where)
        flags = {column: _flag(row, column, where) for column in OPTIONAL_COLUMNS}
        return cls(prompt, row["chosen"], row["rejected"], prefix, **flags)


def is_step_data(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are step pairs, rather than ordinary preference pairs."""
    return PREFIX_COLUMN in columns


def check_plain_columns(columns: Iterable[str], where: str) -> None:
    """
    Check that rows without `initial_reason_steps` are meant to be ordinary preference pairs.

    Raises:
        ValueError: If a column looks like a misspelt `initial_reason_steps`: the prefix would be left out unnoticed.
    """
    for nearest in get_close_matches(PREFIX_COLUMN, columns, n=1, cutoff=0.85):
        raise ValueError(
            f"Column `{nearest}` of {where} looks like `{PREFIX_COLUMN}`, which is missing. Rename it to train on "
            "steps, or remove it to train on ordinary preference pairs."
        )


def check_columns(columns: Iterable[str], where: str) -> None:
    """
    Check that step data has its columns.

    Args:
        columns (`Iterable[str]`):
            Column names.
        where (`str`):
            What to call the rows in an error.

    Raises:
        ValueError: If a required column is missing, or an optional one is misspelt; names the nearest column.
    """
    columns = list(columns)
    for required in REQUIRED_COLUMNS:
        if required not in columns:
            nearest = get_close_matches(required, [c for c in columns if c not in REQUIRED_COLUMNS], n=1, cutoff=0.0)
            mend = f" Rename the nearest column, {nearest[0]!r}, if that is what it holds." if nearest else ""
            raise ValueError(f"Column `{required}` is missing from {where}, which has {sorted(columns)}.{mend}")
    for column in columns:
        nearest = get_close_matches(column, OPTIONAL_COLUMNS, n=1, cutoff=0.9)
        if nearest and column not in OPTIONAL_COLUMNS:
            raise ValueError(f"Column `{column}` of {where} is not known. Did you mean `{nearest[0]}`? Rename it.")


def _check_prompt(prompt: Any, prefix: str, where: str) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"`prompt` of {where} is empty. It must hold the problem.")
        return
    is_messages = isinstance(prompt, list) and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    if not is_messages or not prompt:
        raise ValueError(
            f"`prompt` of {where} is {_show(prompt)}. It must be a string, or a list of messages such as "
            '[{"role": "user", "content": "What is 2 + 3?"}].'
        )
    if prompt[-1]["role"] == "assistant" and prefix:
        raise ValueError(
            f"`prompt` of {where} ends with an assistant turn and there is a `{PREFIX_COLUMN}` as well, so it is not "
            f"clear what the step continues. Put the whole of the assistant's text into `{PREFIX_COLUMN}` and end the "
            "prompt with the user's turn."
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
