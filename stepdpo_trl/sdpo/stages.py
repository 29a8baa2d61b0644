"""Stages of sDPO (arXiv 2403.19270), and how preference data is split into them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from ..shared_prefix.columns import hashes, rows_by_value

STAGE_COLUMN = "stage"
# Options that a stage may override; the defaults are the training arguments of the same name
STAGE_OPTIONS = ("beta", "learning_rate", "num_train_epochs")
# Columns that identify a row: its tokens, or its text if it is tokenized on the fly (data with images)
ROW_COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids", "images_digest"),  # step pairs with images
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt", "chosen", "rejected"),
)


@dataclass
class Stage:
    """
    A stage of an sDPO run.

    Its position in the run (`first_epoch`, `first_update`, ...) is set by [`StagedTraining`] when training starts.

    Args:
        number (`int`):
            Number of the stage, starting at 1.
        name (`str`):
            Name of the stage, as used in `stage_options` and in the report.
        dataset (`Dataset`):
            Tokenized rows of the stage.
        beta (`float`):
            Strength of the KL penalty, as in [`~trl.DPOConfig`].
        learning_rate (`float`):
            Peak learning rate.
        num_train_epochs (`float`):
            Number of epochs over the rows of the stage.
    """

    number: int
    name: str
    dataset: Dataset
    beta: float
    learning_rate: float
    num_train_epochs: float
    digests: np.ndarray = field(init=False, repr=False, compare=False)  # one 64-bit hash per row
    # Updates are optimizer steps, counted as in `global_step`; batches are per epoch and process
    first_epoch: int = field(init=False, default=0)
    epochs: int = field(init=False, default=0)
    first_update: int = field(init=False, default=0)
    updates: int = field(init=False, default=0)
    updates_per_epoch: int = field(init=False, default=0)
    batches: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.digests = row_digests(self.dataset)

    @property
    def digest(self) -> str:
        """Hash of all rows, in order."""
        return combine_digests(self.digests)

    @property
    def last_update(self) -> int:
        """Value of `global_step` at the end of the stage."""
        return self.first_update + self.updates

    def record(self) -> dict[str, Any]:
        """Return the properties that must match those in a checkpoint to resume from it."""
        names = ("name", "digest", "updates", *STAGE_OPTIONS)
        return {"rows": len(self.dataset), **{name: getattr(self, name) for name in names}}


class StageCallback(Protocol):
    """The part of [`SDPOCallback`] that the training loop uses."""

    schedule: str
    record: dict[str, Any]

    def registered(self, trainer: Any) -> "StageCallback":
        """Return the instance that the trainer calls."""


def combine_digests(digests: np.ndarray) -> str:
    """Combine the hashes of rows, in order, into one."""
    return hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()


def row_digests(dataset: Dataset) -> np.ndarray:
    """Hash the contents of each row to 64 bits."""
    columns = next((names for names in ROW_COLUMNS if set(names) <= set(dataset.column_names)), None)
    return hashes(dataset, columns or dataset.column_names)


def join_stages(stages: Any) -> Dataset:
    """
    Concatenate the datasets of the stages, with a column `stage` that holds the name of the stage.

    Args:
        stages (`list[Dataset]` or `dict[str, Dataset]`):
            Datasets of the stages, in training order. Stages of a list are named "1", "2", ...

    Returns:
        `Dataset`: The rows of all stages.

    Raises:
        TypeError: If a stage is not a `Dataset`.
        ValueError: If there are no stages, if a stage is empty, or if names, columns or types conflict.
    """
    if isinstance(stages, DatasetDict):
        raise ValueError(
            f"A DatasetDict with the splits {sorted(stages)} was passed as stages. Pass one of its splits, or "
            "`dict(data)` if each split is a stage."
        )
    if not isinstance(stages, Mapping):
        stages = {str(number): dataset for number, dataset in enumerate(stages, start=1)}
    if len({str(name) for name in stages}) < len(stages):
        raise ValueError(f"Two stages have the same name: {[str(name) for name in stages]}. Rename one of them.")
    if not stages:
        raise ValueError("There are no stages: the list or dict of datasets is empty. Pass at least one.")
    parts, columns = [], None
    for name, dataset in stages.items():
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"Stage {name!r} is of type {type(dataset).__name__}, but a stage must be a `datasets.Dataset`, "
                "because it ends after all of its rows. Load it with `streaming=False`, or use "
                "`Dataset.from_generator`."
            )
        if len(dataset) == 0:
            raise ValueError(f"Stage {name!r} is empty. Check how it was loaded and filtered, or remove it.")
        if STAGE_COLUMN in dataset.column_names:
            raise ValueError(f"Stage {name!r} already has a column `{STAGE_COLUMN}`. Rename or remove the column.")
        if columns is not None and set(dataset.column_names) != columns:
            different = sorted(set(dataset.column_names) ^ columns)
            fix = "Use `rename_columns` and `select_columns` so that all stages have the same columns."
            if different == ["images"]:
                fix = 'To the stage without images, add `stage.add_column("images", [[]] * len(stage))`.'
            raise ValueError(
                f"Stage {name!r} and the first stage have different columns: {different} are in one of them only. "
                + fix
            )
        columns = set(dataset.column_names)
        parts.append(dataset.add_column(STAGE_COLUMN, [str(name)] * len(dataset)))
    try:
        return concatenate_datasets(parts)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The columns of the stages have different types: {error} Cast them with `Dataset.cast`."
        ) from error


def find_stages(dataset: Any, fractions: Sequence[float] | None = None) -> dict[str, Dataset]:
    """
    Split a dataset into stages by its column `stage`, or by fractions.

    Numbers in the column `stage` are sorted; names are kept in order of appearance.

    Args:
        dataset (`Dataset`):
            Rows of all stages.
        fractions (`list[float]`, *optional*):
            Fraction of the rows in each stage, in row order. They must sum to 1.

    Returns:
        `dict[str, Dataset]`: The rows of each stage, by name and in training order.

    Raises:
        TypeError: If the dataset is streamed.
        ValueError: If there is neither a column `stage` nor `fractions`, or both, or if a stage is empty.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The training data is of type {type(dataset).__name__}, but training in stages needs a dataset of known "
            "length. Load it with `streaming=False`."
        )
    has_column = STAGE_COLUMN in dataset.column_names
    if has_column and fractions is not None:
        raise ValueError(
            f"`fractions` is set, but the data has a column `{STAGE_COLUMN}` as well. Remove one of them. (Datasets "
            "passed as a list or dict are stages already.)"
        )
    if not has_column and fractions is None:
        raise ValueError(
            f"SDPOCallback found no stages: the data has no column `{STAGE_COLUMN}`, only {dataset.column_names}. Add "
            "that column, pass a list or dict of datasets to StepDPOTrainer, or set SDPOCallback(fractions=[...])."
        )
    dataset = dataset.with_format(None)  # Python values instead of tensors
    if fractions is not None:
        return _number(_cut(dataset, range(len(dataset)), fractions))
    rows = rows_by_value(dataset, STAGE_COLUMN)
    if None in rows:
        raise ValueError(f"Row {rows[None][0]} has no value in the column `{STAGE_COLUMN}`. Fix or remove it.")
    names = [*rows]
    if all(isinstance(name, (int, float)) for name in names):
        names.sort()
    return {str(name): dataset.select(rows[name]) for name in names}


def split_stages(
    dataset: Dataset,
    how: str,
    fractions: Sequence[float] | None = None,
    source_column: str | None = None,
    gamma: Sequence[float] | np.ndarray | None = None,
    by: str = "reward_accuracy",
    seed: int = 42,
) -> dict[str, Dataset]:
    r"""
    Split preference data into the stages of [`SDPOCallback`], in one of the ways that section 4.3 of the sDPO paper
    compares.

    Args:
        dataset (`Dataset`):
            Preference data.
        how (`str`):
            How to split the data. Possible values are:

            - `"easy_to_hard"`: Order the data by `gamma`, that is by how well the model already separates chosen from
              rejected. With `source_column`, each source is a stage, and the easiest source is first, as the paper
              recommends. Otherwise, the rows are sorted by descending `gamma` and cut according to `fractions`.
            - `"stratified"`: Split at random, with the same fraction of each source in every stage. This is the
              control experiment of the paper, which scored below plain DPO.
        fractions (`list[float]`, *optional*):
            Fraction of the rows in each stage. They must sum to 1. Not allowed for `"easy_to_hard"` with
            `source_column`.
        source_column (`str`, *optional*):
            Name of the column that holds the source of each row.
        gamma (`list[float]` or `np.ndarray`, *optional*):
            \\( \log \pi(y_w|x) - \log \pi(y_l|x) \\) of each row under the model to be trained, in nats, of shape
            `(rows,)`. Use [`measure_gamma`] to compute it. Required for `"easy_to_hard"`.
        by (`str`, *optional*, defaults to `"reward_accuracy"`):
            Quantity that orders the sources: `"reward_accuracy"`, the fraction of rows with `gamma > 0`, or `"gamma"`,
            the mean of `gamma`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the random split.

    Returns:
        `dict[str, Dataset]`: The stages in training order, named after their source or "1", "2", ...

    Raises:
        ValueError: If an argument is missing or invalid.

    Example:

    ```python
    >>> gamma = measure_gamma(model, pairs, args)
    >>> stages = split_stages(pairs, "easy_to_hard", source_column="dataset", gamma=gamma)
    ```
    """
    if how not in ("easy_to_hard", "stratified"):
        raise ValueError(f"Unknown split {how!r}. `how` must be 'easy_to_hard' or 'stratified'.")
    if source_column is not None and source_column not in dataset.column_names:
        raise ValueError(
            f"source_column={source_column!r} is not a column of the dataset. Use one of {dataset.column_names}."
        )
    sources = {"": np.arange(len(dataset))} if source_column is None else rows_by_value(dataset, source_column)
    if how == "stratified":
        return _number(_stratified(dataset, sources, _require(fractions, "fractions", how), seed))

    margins = np.asarray(_require(gamma, "gamma", how), dtype=np.float64)
    if len(margins) != len(dataset):
        raise ValueError(f"`gamma` has {len(margins)} values, but the dataset has {len(dataset)} rows.")
    if not np.isfinite(margins).all():
        row = int(np.flatnonzero(~np.isfinite(margins))[0])
        raise ValueError(f"`gamma` of row {row} is {margins[row]}. Fix or remove the row.")
    if source_column is None:
        order = np.argsort(-margins, kind="stable")
        return _number(_cut(dataset, order, _require(fractions, "fractions", how)))
    if by not in ("reward_accuracy", "gamma"):
        raise ValueError(f"Unknown order {by!r}. `by` must be 'reward_accuracy' or 'gamma'.")
    if fractions is not None:
        raise ValueError(
            "`fractions` has no effect with `source_column`, where each source is a stage. Remove one of them."
        )
    ease = margins if by == "gamma" else margins > 0
    ordered = sorted(sources, key=lambda source: -ease[sources[source]].mean())
    return {str(source): dataset.select(sources[source]) for source in ordered}


def _require(value: Any, name: str, how: str) -> Any:
    if value is None:
        raise ValueError(f"The split {how!r} requires `{name}`. Pass it.")
    return value


def _number(parts: list[Dataset]) -> dict[str, Dataset]:
    return {str(number): part for number, part in enumerate(parts, start=1)}


def check_fractions(fractions: Sequence[float]) -> None:
    """
    Check that fractions are positive and sum to 1.

    Raises:
        ValueError: If they are not positive or do not sum to 1.
    """
    if not all(0 < fraction <= 1 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions={list(fractions)} are invalid. Fractions must be positive and sum to 1.")


def _bounds(number: int, fractions: Sequence[float]) -> list[int]:
    """Return the end index of each stage among `number` rows."""
    check_fractions(fractions)
    return [round(number * float(total)) for total in np.cumsum(fractions)]


def _cut(dataset: Dataset, order: range | np.ndarray, fractions: Sequence[float]) -> list[Dataset]:
    ends = _bounds(len(order), fractions)
    starts = [0, *ends[:-1]]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
        if start == end:
            raise ValueError(
                f"Stage {number} is empty: its fraction {fractions[number - 1]} of {len(order)} rows rounds to 0. "
                "Increase the fraction."
            )
    return [dataset.select(order[start:end]) for start, end in zip(starts, ends, strict=True)]


def _stratified(
    dataset: Dataset, sources: dict[Any, np.ndarray], fractions: Sequence[float], seed: int
) -> list[Dataset]:
    random = np.random.default_rng(seed)
    stage_of_row = np.empty(len(dataset), np.int64)
    for rows in sources.values():
        sizes = np.diff(_bounds(len(rows), fractions), prepend=0)
        stage_of_row[random.permutation(rows)] = np.repeat(np.arange(len(sizes)), sizes)
    stages = [np.flatnonzero(stage_of_row == number) for number in range(len(fractions))]
    for number, (rows, fraction) in enumerate(zip(stages, fractions, strict=True), start=1):
        if not len(rows):
            raise ValueError(
                f"Stage {number} is empty: its fraction {fraction} of each source rounds to 0 rows. Increase the "
                "fraction."
            )
    return [dataset.select(rows) for rows in stages]
