"""Where pairs and solutions come from: files, data sets of the Hub, and folders of runs."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import DATA_FILES
from ..data.schema import PREFIX_COLUMN, StepPreference, check_plain_columns, is_step_data
from ..data.steps import split_steps
from ..pipeline.build import run_directories
from ..pipeline.collect import read_solutions
from ..pipeline.localize import read_verdicts
from ..pipeline.policy import render_template
from ..pipeline.records import Solution, Verdict
from ..runs.run_directory import RunDirectory, RunError
from .example import CHOSEN, REJECTED, STEP, WRONG, Example, Part

if TYPE_CHECKING:
    from datasets import Dataset

Found = tuple[Solution, dict[str, Verdict], str]  # a solution, what judges say of it, and what was asked


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run of the pipeline, or of its shards."""
    return path.is_dir() and any(found for name in ("settings.jsonl", "shard-*-of-*") for found in path.glob(name))


def read_pairs(source: str, split: str, numbers: Sequence[int]) -> list[Example]:
    """
    Read rows of a data set of pairs.

    Args:
        source (`str`):
            A file that ends in `.jsonl`, `.json` or `.parquet`, or what `datasets.load_dataset` takes.
        split (`str`):
            Split of a data set that is no file.
        numbers (`Sequence[int]`):
            Which rows, from 0; the first if none is named.

    Returns:
        `list[Example]`: The pairs.

    Raises:
        ValueError: If the data cannot be read, or a row is not there or not a pair.
    """
    dataset = _load(source, split)
    rows = _choose(len(dataset), numbers or [0], source, "rows")
    return [_pair(dataset[number], f"row {number}", f"row {number} of {source}") for number in rows]


def read_run(path: Path, numbers: Sequence[int], key: str | None = None) -> list[Example]:
    """
    Read solutions of a run, with the verdicts on them.

    Args:
        path (`Path`):
            The folder.
        numbers (`Sequence[int]`):
            Which solutions, from 0. If none is named, the first with a first wrong step, else the first.
        key (`str`, *optional*):
            Name of the solution instead.

    Returns:
        `list[Example]`: The solutions.

    Raises:
        RunError: If the run holds no such solution.
        ValueError: If there are not so many.
    """
    found = [item for folder in run_directories(path) for item in _solutions(folder)]
    if not found:
        if (path / "results.json").exists():
            raise RunError(
                f"{path} is the folder of an evaluation; its solutions stand in {path / 'records.jsonl'}. Here are "
                "shown runs of `stepdpo collect`, and pairs."
            )
        raise RunError(f"{path} holds no solutions yet. Run `stepdpo collect` first.")
    if key is not None:
        keys = [solution.key for solution, _, _ in found]
        if key not in keys:
            raise RunError(f"{path} has {len(keys)} solutions, none with the key {key!r}. The first is {keys[0]!r}.")
        numbers = [keys.index(key)]
    located = (n for n, (_, verdicts, _) in enumerate(found) if any(v.step for v in verdicts.values()))
    numbers = _choose(len(found), numbers or [next(located, 0)], str(path), "solutions")
    return [_solution(*found[number], f"solution {number}", f"solution {number} of {path}") for number in numbers]


def _choose(count: int, numbers: Sequence[int], source: str, what: str) -> list[int]:
    for number in numbers:
        if number >= count:
            raise ValueError(f"--row {number}: {source} has {count} {what}, from 0 to {count - 1}.")
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
            return load_dataset(DATA_FILES[path.suffix], data_files={"train": source}, split="train")
        data = load_dataset(source)
    except (DatasetGenerationError, FileNotFoundError, ConnectionError, ValueError) as error:
        reason = f"{type(error).__name__}: {error.__cause__ or error}".splitlines()[0]
        kind = "read" if is_file else "found as a file, as the folder of a run or as a data set of the Hub"
        raise ValueError(f"{source} cannot be {kind} ({reason}).{_nearest(path)}") from error
    assert isinstance(data, DatasetDict)
    if split not in data:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(data)}. Choose one with --split.")
    if not len(data[split]):
        raise ValueError(f"The split {split!r} of {source} is empty.")
    return data[split]


def _check_file(path: Path) -> None:
    if path.suffix not in DATA_FILES:
        raise ValueError(f"{path} is not of a known kind: pairs are read from {', '.join(DATA_FILES)}.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.{_nearest(path)}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has no rows to look at.")


def _nearest(path: Path) -> str:
    beside = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near and not path.exists() else ""


def _pair(row: dict[str, Any], name: str, where: str) -> Example:
    if not is_step_data(row):
        return _plain_pair(row, name, where)
    pair = StepPreference.from_row(row, where)
    number = row.get("step_index") or _step_number(pair)
    parts = (
        Part(CHOSEN, "preferred step", pair.chosen, ends=pair.chosen_ends_solution),
        Part(REJECTED, "undesirable step", pair.rejected, ends=pair.rejected_ends_solution),
    )
    context = [("prompt", _conversation(pair.prompt))]
    if pair.initial_reason_steps:
        context.append(("initial reasoning steps", pair.initial_reason_steps))
    return Example(name, where, tuple(context), parts, (("step", str(number)),), row)


def _step_number(pair: StepPreference) -> int:
    """Which step of the solution is preferred and undesirable: the one that the first line of the preferred is in."""
    step = pair.chosen.lstrip()
    space = pair.chosen[: len(pair.chosen) - len(step)]
    return len(split_steps(pair.initial_reason_steps + space + step.partition("\n")[0]))


def _plain_pair(row: dict[str, Any], name: str, where: str) -> Example:
    check_plain_columns(row, where)
    missing = [column for column in (CHOSEN, REJECTED) if not row.get(column)]
    if missing:
        raise ValueError(
            f"`{missing[0]}` of {where} is missing or empty. It has {sorted(row)}; step pairs have `prompt`, "
            f"`{PREFIX_COLUMN}`, `chosen` and `rejected`, ordinary preference pairs `prompt`, `chosen` and `rejected`."
        )
    parts = (
        Part(CHOSEN, "preferred answer", _conversation(row[CHOSEN])),
        Part(REJECTED, "undesirable answer", _conversation(row[REJECTED])),
    )
    context = (("prompt", _conversation(row["prompt"])),) if row.get("prompt") else ()
    return Example(name, where, context, parts, (), row)


def _conversation(text: str | Sequence[Mapping[str, Any]]) -> str:
    """A text, or messages with their roles."""
    if isinstance(text, str):
        return text
    contents = ((m["role"], m.get("content")) for m in text)
    lines = (f"{role}: {c if isinstance(c, str) else json.dumps(c, ensure_ascii=False)}" for role, c in contents)
    return "\n".join(lines)


def _solutions(folder: Path) -> list[Found]:
    with RunDirectory(folder) as run:
        if "collect" not in run.settings():
            return []
        verdicts = {judge_name: read_verdicts(run, judge_name)[1] for judge_name in run.logs("verdicts")}
        user = run.settings()["collect"]["prompt"]["user"]
        return [
            (
                solution,
                {judge_name: known[solution.key] for judge_name, known in verdicts.items() if solution.key in known},
                render_template(user, problem=solution.problem.problem),
            )
            for solution in read_solutions(run)
        ]


def _solution(solution: Solution, verdicts: Mapping[str, Verdict], prompt: str, name: str, where: str) -> Example:
    steps = split_steps(solution.text, solution.style)
    if not len(steps):
        raise ValueError(f"{where} is blank.")
    parts = []
    for number, span in enumerate(steps.spans, start=1):
        judges = [judge_name for judge_name, verdict in verdicts.items() if verdict.step == number]
        title = f"step {number}" + (f", the first wrong one by {', '.join(judges)}" if judges else "")
        lead = solution.text[steps.spans[number - 2].end : span.begin] if number > 1 else ""
        ends = number == len(steps) and solution.finish_reason == "stop"
        parts.append(Part(WRONG if judges else STEP, title, steps.step(number), lead, ends))
    facts = [("solution", solution.key), ("outcome", f"{solution.outcome}, finished by {solution.finish_reason}")]
    facts += [("answer", f"{solution.answer}; right is {solution.problem.answer}")]
    for judge_name, verdict in verdicts.items():
        facts.append((f"verdict of {judge_name}", f"step {verdict.step}" if verdict.step else "none"))
        facts.append(("evidence", json.dumps(verdict.evidence, ensure_ascii=False)))
    context = [("prompt", prompt)] + ([("opening", steps.prefix(1))] if steps.prefix(1) else [])
    row = {"prompt": prompt, "prefixes": [steps.prefix(number + 1) for number in range(len(steps))]}
    return Example(name, where, tuple(context), tuple(parts), tuple(facts), row)
