"""The stages of sDPO (arXiv 2403.19270): preference data in parts, each spent before the next one."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

STAGE_COLUMN = "stage"
# What a stage may set for itself; the default is the trainer's argument of the same name
STAGE_OPTIONS = ("beta", "learning_rate", "num_train_epochs")
# What makes a prepared row, and for data that is prepared on the fly (images) what it is made of
ROW_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids"), ("prompt", "chosen", "rejected")


@dataclass
class Stage:
    """
    One stage: rows, options, and its place in the run, which is known once the batches can be counted.

    Args:
        number (`int`): Counted from 1.
        name (`str`): What the user calls it.
        dataset (`Dataset`): The rows, tokenized.
        beta, learning_rate, num_train_epochs (`float`): As in [`~trl.DPOConfig`].
    """

    number: int
    name: str
    dataset: Dataset
    beta: float
    learning_rate: float
    num_train_epochs: float
    digests: list[bytes] = field(init=False, repr=False)  # of each row
    # Epochs and updates (global_step) before this stage, and of it. `batches` is what a process draws in an epoch
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
        """A hash of all rows in their order."""
        return combined_digest(self.digests)

    @property
    def last_update(self) -> int:
        """`global_step` after the stage."""
        return self.first_update + self.updates

    def record(self) -> dict[str, Any]:
        """What a checkpoint must agree with to go on in this stage."""
        names = ("name", "digest", "updates", *STAGE_OPTIONS)
        return {"rows": len(self.dataset), **{name: getattr(self, name) for name in names}}


def combined_digest(digests: list[bytes]) -> str:
    """A hash of rows in their order."""
    return hashlib.blake2b(b"".join(digests), digest_size=8).hexdigest()


def row_digests(dataset: Dataset) -> list[bytes]:
    """A hash of the contents of each row."""
    columns = next(([*names] for names in ROW_COLUMNS if set(names) <= set(dataset.column_names)), None)
    digests = []
    for batch in dataset.select_columns(columns or dataset.column_names).iter(batch_size=1000):
        rows = zip(*batch.values(), strict=True)
        digests += [hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in rows]
    return digests


def join_stages(stages: Any) -> Dataset:
    """
    One data set out of a list or dict of them, with a column `stage` that says which row is whose.

    Args:
        stages (`list[Dataset]` or `dict[str, Dataset]`):
            The data of each stage, in the order of training. Stages of a list are named "1", "2", ...

    Raises:
        TypeError, ValueError: If something else is given, if a stage is empty, or if columns differ.
    """
    if isinstance(stages, DatasetDict):
        raise ValueError(
            f"A DatasetDict with the splits {sorted(stages)} was given as stages. Choose a split to train on, or pass "
            "`dict(data)` if each split is a stage."
        )
    if not isinstance(stages, Mapping):
        stages = {str(number): dataset for number, dataset in enumerate(stages, start=1)}
    if len({str(name) for name in stages}) < len(stages):
        raise ValueError(f"Two stages have the same name: {[str(name) for name in stages]}.")
    if not stages:
        raise ValueError("There are no stages: the list or dict of data sets is empty.")
    parts, columns = [], None
    for name, dataset in stages.items():
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"Stage {name!r} is a {type(dataset).__name__}. A stage must be a `datasets.Dataset`, since its "
                "length decides when it ends: load it with `streaming=False`, or use `Dataset.from_generator`."
            )
        if len(dataset) == 0:
            raise ValueError(f"Stage {name!r} is empty. Check how it was loaded and filtered, or leave it out.")
        if STAGE_COLUMN in dataset.column_names:
            raise ValueError(f"Stage {name!r} has a column `{STAGE_COLUMN}` of its own. Rename or remove that.")
        if columns is not None and set(dataset.column_names) != columns:
            different = sorted(set(dataset.column_names) ^ columns)
            raise ValueError(
                f"Stage {name!r} has other columns than the first one: {different} are in one of them only. Give all "
                "stages the same columns, with `rename_columns` and `select_columns`."
            )
        columns = set(dataset.column_names)
        parts.append(dataset.add_column(STAGE_COLUMN, [str(name)] * len(dataset)))
    try:
        return concatenate_datasets(parts)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The stages' columns hold different types: {error} Cast them with `Dataset.cast`."
        ) from error


def find_stages(dataset: Any, fractions: Sequence[float] | None = None) -> dict[str, Dataset]:
    """
    The rows of each stage: by the column `stage`, numbers ascending and names as they appear, or cut by fractions.

    Args:
        dataset (`Dataset`):
            All rows.
        fractions (`list[float]`, *optional*):
            Share of the rows in each stage, in their order. They sum to 1.

    Raises:
        TypeError, ValueError: If the stages cannot be told, or one is empty.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The training data is a {type(dataset).__name__}. Stages need a length: load it with `streaming=False`."
        )
    if (STAGE_COLUMN in dataset.column_names) == (fractions is not None):
        given = "both a column `stage` and `fractions`" if fractions else "neither"
        raise ValueError(
            f"SDPOCallback found {given}. Pass StepDPOTrainer a list or dict of data sets, or give the data a column "
            f"`{STAGE_COLUMN}` (it has {dataset.column_names}), or set SDPOCallback(fractions=[...])."
        )
    dataset = dataset.with_format(None)  # plain values
    if fractions is not None:
        return _named(_cut(dataset, range(len(dataset)), fractions))
    values = dataset[:][STAGE_COLUMN]
    if any(value is None for value in values):
        raise ValueError(f"Row {values.index(None)} has no value in the column `{STAGE_COLUMN}`.")
    names = list(dict.fromkeys(values))
    if all(isinstance(name, (int, float)) for name in names):
        names.sort()
    rows: dict[Any, list[int]] = {name: [] for name in names}
    for index, value in enumerate(values):
        rows[value].append(index)
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
    Split preference data into stages for [`StepDPOTrainer`] with [`SDPOCallback`], as section 4.3 of sDPO compares.

    Args:
        dataset (`Dataset`):
            The rows.
        how (`str`):
            - `"easy_to_hard"`: by what the model to be trained already tells apart. With `source_column` one stage a
              source, the easiest first (what the paper recommends); without, rows in descending order of `gamma`, cut
              by `fractions`.
            - `"stratified"`: at random, with the same share of every source in each stage (the paper's control, which
              came out below plain DPO).
        fractions (`list[float]`, *optional*):
            Share of the rows in each stage; they sum to 1. Not for `"easy_to_hard"` with `source_column`.
        source_column (`str`, *optional*):
            Column that names the source of a row.
        gamma (`np.ndarray` or `list[float]`, *optional*):
            \\( \log \pi(y_w|x) - \log \pi(y_l|x) \\) of each row under the model to be trained, from
            [`measure_gamma`]. For `"easy_to_hard"`.
        by (`str`, *optional*, defaults to `"reward_accuracy"`):
            What orders the sources: `"reward_accuracy"`, the share of rows with `gamma > 0`, or `"gamma"`, its mean.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the random split.

    Returns:
        `dict[str, Dataset]`: The stages, in order. Stages that are sources have their names.

    Raises:
        ValueError: If an argument is missing or unusable.
    """
    if how not in ("easy_to_hard", "stratified"):
        raise ValueError(f"Unknown split {how!r}: `how` is 'easy_to_hard' or 'stratified'.")
    if source_column is not None and source_column not in dataset.column_names:
        raise ValueError(f"There is no column {source_column!r}, only {dataset.column_names}.")
    sources = _rows_by_source(dataset, source_column)
    if how == "stratified":
        return _named(_stratified(dataset, sources, _need(fractions, "fractions", how), seed))

    margins = np.asarray(_need(gamma, "gamma", how), dtype=np.float64)
    if len(margins) != len(dataset):
        raise ValueError(f"`gamma` has {len(margins)} values and the data {len(dataset)} rows.")
    if not np.isfinite(margins).all():
        raise ValueError(f"`gamma` is not a number in row {int(np.flatnonzero(~np.isfinite(margins))[0])}.")
    if source_column is None:
        order = np.argsort(-margins, kind="stable")
        return _named(_cut(dataset, order.tolist(), _need(fractions, "fractions", how)))
    if by not in ("reward_accuracy", "gamma"):
        raise ValueError(f"Unknown order {by!r}: `by` is 'reward_accuracy' or 'gamma'.")
    if fractions is not None:
        raise ValueError("With `source_column` each source is a stage: leave `fractions` out.")
    ease = margins if by == "gamma" else margins > 0
    ordered = sorted(sources, key=lambda source: -ease[sources[source]].mean())
    return {str(source): dataset.select(sources[source]) for source in ordered}


def _need(value: Any, name: str, how: str) -> Any:
    if value is None:
        raise ValueError(f"The split {how!r} needs `{name}`.")
    return value


def _named(parts: list[Dataset]) -> dict[str, Dataset]:
    return {str(number): part for number, part in enumerate(parts, start=1)}


def _rows_by_source(dataset: Dataset, column: str | None) -> dict[Any, list[int]]:
    if column is None:
        return {"": list(range(len(dataset)))}
    sources: dict[Any, list[int]] = {}
    for index, source in enumerate(dataset[:][column]):
        sources.setdefault(source, []).append(index)
    return sources


def check_fractions(fractions: Sequence[float]) -> None:
    """
    Check the shares of the stages.

    Raises:
        ValueError: If they are not positive or do not sum to 1.
    """
    if not all(0 < fraction <= 1 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions={list(fractions)}: they must be positive and sum to 1.")


def _bounds(number: int, fractions: Sequence[float]) -> list[int]:
    """Where each stage ends among `number` rows."""
    check_fractions(fractions)
    return [round(number * float(total)) for total in np.cumsum(fractions)]


def _cut(dataset: Dataset, order: Sequence[int], fractions: Sequence[float]) -> list[Dataset]:
    ends = _bounds(len(order), fractions)
    starts = [0, *ends[:-1]]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
        if start == end:
            raise ValueError(f"Stage {number} is empty: {fractions[number - 1]} of {len(order)} rows.")
    return [dataset.select(order[start:end]) for start, end in zip(starts, ends, strict=True)]


def _stratified(
    dataset: Dataset, sources: dict[Any, list[int]], fractions: Sequence[float], seed: int
) -> list[Dataset]:
    random = np.random.default_rng(seed)
    stages: list[list[int]] = [[] for _ in fractions]
    for rows in sources.values():
        shuffled = random.permutation(rows).tolist()
        ends = _bounds(len(rows), fractions)
        for stage, start, end in zip(stages, [0, *ends[:-1]], ends, strict=True):
            stage += shuffled[start:end]
    if not all(stages):
        raise ValueError(f"Stage {stages.index([]) + 1} is empty: {list(fractions)} of {len(dataset)} rows.")
    return [dataset.select(sorted(stage)) for stage in stages]
