"""Pairs from files and datasets on the Hub, and solutions from run folders."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import DATA_FILES, file_pattern
from ..data.messages import counted, similar_file
from ..data.schema import (
    IMAGE_COLUMNS,
    PREFIX_COLUMN,
    StepPreference,
    check_plain_columns,
    get_images,
    has_images,
    is_step_data,
)
from ..data.steps import split_steps
from ..pipeline.build import run_directories
from ..pipeline.collect import solutions_by_key
from ..pipeline.localize import read_verdicts
from ..pipeline.policy import render_template
from ..pipeline.reading import reading
from ..pipeline.records import Solution, Verdict
from ..runs.run_directory import RunDirectory, RunError
from .example import CHOSEN, FIRST_WRONG_STEP, REJECTED, STEP, Example, Part

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

_COMPARED = 10_000  # keys that are compared with a misspelled one, as all of a large run would take minutes

Found = tuple[Solution, dict[str, Verdict], str]  # a solution, its verdicts by judge, and its prompt


def is_run(path: Path) -> bool:
    """Return whether a path is the folder of a pipeline run, or of its shards."""
    return path.is_dir() and any(found for name in ("settings.jsonl", "shard-*-of-*") for found in path.glob(name))


def read_pairs(source: str, split: str, numbers: Sequence[int]) -> list[Example]:
    """
    Read rows of a dataset of pairs.

    Args:
        source (`str`):
            A file that ends in `.jsonl`, `.json` or `.parquet`, or what `datasets.load_dataset` takes.
        split (`str`):
            Split of a dataset that is not a single file.
        numbers (`Sequence[int]`):
            Row numbers, from 0. Empty for the first row.

    Returns:
        `list[Example]`: The pairs.

    Raises:
        ValueError: If the data cannot be read, or a row does not exist or is not a pair.
    """
    dataset = _load(source, split)
    rows = _choose(len(dataset), numbers or [0], source, "rows")
    return [_pair(_read(dataset, number, source), f"row {number}", f"row {number} of {source}") for number in rows]


def read_run(path: Path, numbers: Sequence[int], key: str | None = None) -> list[Example]:
    """
    Read solutions of a run, with their verdicts.

    Args:
        path (`Path`):
            Folder of the run.
        numbers (`Sequence[int]`):
            Numbers of the solutions, from 0. If empty, the first solution with a located wrong step, or else the
            first solution.
        key (`str`, *optional*):
            Key of one solution. Replaces `numbers`.

    Returns:
        `list[Example]`: The solutions.

    Raises:
        RunError: If the run has no solutions, or none with this key.
        ValueError: If a number is too large.
    """
    shards = _open_shards(path)
    if not any(shard.solutions for shard in shards):
        if (path / "results.json").exists():
            raise RunError(
                f"{path} is the folder of an evaluation, which cannot be shown. Its solutions are in "
                f"{path / 'records.jsonl'}. Pass a run of `stepdpo collect`, or a file of pairs."
            )
        raise RunError(f"{path} has no solutions yet. Run `stepdpo collect` first.")
    count = sum(len(shard.solutions) for shard in shards)
    if key is not None:
        if not any(key in shard.solutions for shard in shards):
            near = [one for _, one in islice(_keys(shards), _COMPARED)]
            nearest = (*get_close_matches(key, near, n=1), near[0])[0]
            raise RunError(
                f"{path} has no solution {key!r}. It has {counted(count, 'solution')}, such as {nearest!r}."
            )
        numbers = [next(number for number, (_, one) in enumerate(_keys(shards)) if one == key)]
    located = (number for number, (shard, one) in enumerate(_keys(shards)) if shard.is_located(one))
    numbers = _choose(count, numbers or [next(located, 0)], str(path), "solutions")
    keys = islice(enumerate(_keys(shards)), max(numbers) + 1)
    found = {number: shard.find(one) for number, (shard, one) in keys if number in numbers}
    return [_solution(*found[number], f"solution {number}", f"solution {number} of {path}") for number in numbers]


@dataclass(frozen=True)
class _Shard:
    """Solutions of a run folder with their verdicts. They are read when they are used."""

    solutions: Mapping[str, Solution]
    verdicts: Mapping[str, Mapping[str, Verdict]]  # by judge and key
    user: str  # template of the prompt

    def is_located(self, key: str) -> bool:
        return any(key in known and known[key].step for known in self.verdicts.values())

    def find(self, key: str) -> Found:
        solution = self.solutions[key]
        verdicts = {judge_name: known[key] for judge_name, known in self.verdicts.items() if key in known}
        return solution, verdicts, render_template(self.user, problem=solution.problem.problem)


def _open_shards(path: Path) -> list[_Shard]:
    shards = []
    for folder in run_directories(path):
        with RunDirectory(folder) as run:
            if "collect" in run.settings():
                verdicts = {judge_name: read_verdicts(run, judge_name)[1] for judge_name in run.logs("verdicts")}
                with reading("The record 'collect'", run.settings().path, "Restore the line."):
                    user = run.settings()["collect"]["prompt"]["user"]
                shards.append(_Shard(solutions_by_key(run), verdicts, user))
    return shards


def _keys(shards: Sequence[_Shard]) -> Iterator[tuple[_Shard, str]]:
    return ((shard, key) for shard in shards for key in shard.solutions)


def _choose(count: int, numbers: Sequence[int], source: str, unit: str) -> list[int]:
    for number in numbers:
        if number >= count:
            raise ValueError(f"--row {number}: {source} has {count} {unit}, numbered from 0 to {count - 1}.")
    return list(dict.fromkeys(numbers))


def _load(source: str, split: str) -> "Dataset":
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(source)
    is_file = path.suffix in DATA_FILES or path.is_file()
    if is_file:
        _check_file(path)
    try:
        if is_file:
            return load_dataset(DATA_FILES[path.suffix], data_files={"train": file_pattern(source)}, split="train")
        data = load_dataset(source)
    except (DatasetGenerationError, FileNotFoundError, ConnectionError, ValueError) as error:
        reason = f"{type(error).__name__}: {error.__cause__ or error}".splitlines()[0]
        kind = "read" if is_file else "loaded as a file, a run folder or a dataset of the Hub"
        raise ValueError(f"{source} cannot be {kind} ({reason}).{similar_file(path)}") from error
    assert isinstance(data, DatasetDict)
    if split not in data:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(data)}. Pass one of them with --split.")
    if not len(data[split]):
        raise ValueError(f"The split {split!r} of {source} is empty. Pass another one with --split.")
    return data[split]


def _check_file(path: Path) -> None:
    if path.suffix not in DATA_FILES:
        raise ValueError(f"{path} is not a supported file. Pass a file that ends in {', '.join(DATA_FILES)}.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.{similar_file(path)}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty. Pass a file with at least one row.")


def _read(dataset: "Dataset", number: int, source: str) -> dict[str, Any]:
    if not has_images(dataset.column_names):
        return dataset[number]
    from ..step_dpo.images import reading_images  # imports torch

    with reading_images(f"row {number} of {source}"):
        return dataset[number]


def _pair(row: dict[str, Any], name: str, where: str) -> Example:
    if not is_step_data(row):
        return _plain_pair(row, name, where)
    pair = StepPreference.from_row(row, where)
    number = row.get("step_index") or _step_number(pair)
    parts = (
        Part(CHOSEN, "preferred step", pair.chosen, ends=pair.chosen_ends_solution),
        Part(REJECTED, "rejected step", pair.rejected, ends=pair.rejected_ends_solution),
    )
    context = [("prompt", _conversation(pair.prompt))]
    if pair.initial_reason_steps:
        context.append(("initial reasoning steps", pair.initial_reason_steps))
    return Example(name, where, tuple(context), parts, (("step", str(number)),), row, _images(row, where))


def _images(row: Mapping[str, Any], where: str) -> tuple["Image", ...]:
    """Images of a row, loaded as by a processor."""
    columns = {name: row[name] for name in IMAGE_COLUMNS if name in row}
    if not get_images(columns, where):
        return ()
    from ..step_dpo.images import load_images  # imports torch

    return tuple(load_images(row, where))


def _step_number(pair: StepPreference) -> int:
    """Return the number of the step in a pair, counted in the prefix and the first line of the preferred step."""
    step = pair.chosen.lstrip()
    space = pair.chosen[: len(pair.chosen) - len(step)]
    return len(split_steps(pair.initial_reason_steps + space + step.partition("\n")[0]))


def _plain_pair(row: dict[str, Any], name: str, where: str) -> Example:
    check_plain_columns(row, where)
    missing = [column for column in (CHOSEN, REJECTED) if not row.get(column)]
    if missing:
        raise ValueError(
            f"`{missing[0]}` of {where} is missing or empty. Its columns are {sorted(row)}. Step pairs need `prompt`, "
            f"`{PREFIX_COLUMN}`, `chosen` and `rejected`; ordinary preference pairs need `chosen` and `rejected`."
        )
    parts = (
        Part(CHOSEN, "preferred answer", _conversation(row[CHOSEN])),
        Part(REJECTED, "rejected answer", _conversation(row[REJECTED])),
    )
    context = (("prompt", _conversation(row["prompt"])),) if row.get("prompt") else ()
    return Example(name, where, context, parts, (), row, _images(row, where))


def _conversation(text: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a string unchanged, or messages as text with their roles."""
    if isinstance(text, str):
        return text
    contents = ((m["role"], m.get("content")) for m in text)
    lines = (f"{role}: {c if isinstance(c, str) else json.dumps(c, ensure_ascii=False)}" for role, c in contents)
    return "\n".join(lines)


def _solution(solution: Solution, verdicts: Mapping[str, Verdict], prompt: str, name: str, where: str) -> Example:
    steps = split_steps(solution.text, solution.style)
    if not len(steps):
        raise ValueError(f"{where} is blank, so it has no steps. Pass another --row or --solution.")
    parts = []
    for number, span in enumerate(steps.spans, start=1):
        judges = [judge_name for judge_name, verdict in verdicts.items() if verdict.step == number]
        title = f"step {number}" + (f", first wrong step according to {', '.join(judges)}" if judges else "")
        lead = solution.text[steps.spans[number - 2].end : span.begin] if number > 1 else ""
        ends = number == len(steps) and solution.finish_reason == "stop"
        parts.append(Part(FIRST_WRONG_STEP if judges else STEP, title, steps.step(number), lead, ends))
    facts = [("solution", solution.key), ("outcome", f"{solution.outcome}, finish reason: {solution.finish_reason}")]
    facts += [("answer", f"{solution.answer}, gold answer: {solution.problem.answer}")]
    for judge_name, verdict in verdicts.items():
        facts.append((f"verdict of {judge_name}", f"step {verdict.step}" if verdict.step else "abstained"))
        facts.append(("evidence", json.dumps(verdict.evidence, ensure_ascii=False)))
    context = [("prompt", prompt)] + ([("before step 1", steps.prefix(1))] if steps.prefix(1) else [])
    row = {"prompt": prompt, "prefixes": [steps.prefix(number + 1) for number in range(len(steps))]}
    return Example(name, where, tuple(context), tuple(parts), tuple(facts), row)
