"""Make a data set of what was found: the columns of Math-Step-DPO-10K, on which StepDPOTrainer trains."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.prompts import StepPrompt
from ..data.schema import StepPreference
from ..data.steps import split_steps
from ..runs.run_directory import RunDirectory, RunError
from .collect import read_problems_of, read_solutions
from .policy import render_template
from .records import Problem, read_texts
from .rectify import normalize_step

Row = dict[str, Any]
FORMATS = (".jsonl", ".parquet")


def run_directories(path: str | Path) -> list[Path]:
    """
    Find the folders of a run: itself, or its shards.

    Args:
        path (`str` or `Path`):
            The folder given as `--output-dir`.

    Returns:
        `list[Path]`: The folders.

    Raises:
        RunError: If there are none, or some shards are missing.
    """
    path = Path(path)
    shards = sorted(path.glob("shard-*-of-*"))
    if not shards:
        return [path]
    counts = {int(shard.name.rpartition("-")[2]) for shard in shards}
    found = {int(shard.name.split("-")[1]) for shard in shards}
    if len(counts) > 1 or (path / "solutions.jsonl").exists():
        raise RunError(f"{path} holds runs that do not belong together ({', '.join(s.name for s in shards)}).")
    missing = sorted(set(range(counts.pop())) - found)
    if missing:
        raise RunError(f"{path} lacks shards {missing}. Run them, or copy their folders there, before you build.")
    return shards


def make_pairs(run: RunDirectory, judge_name: str | None = None) -> Iterator[Row]:
    """
    Make the pairs of a run.

    Args:
        run (`RunDirectory`):
            The run.
        judge_name (`str`, *optional*):
            Corrections to take, `JUDGE` or `JUDGE.by-MODEL`. Not needed where there is one kind only.

    Returns:
        `Iterator[dict]`: The rows, in the order of the solutions.

    Raises:
        RunError: If there are no corrections of that kind.
    """
    logs = run.logs("corrections")
    if not logs:
        raise RunError(f"{run.path} holds no corrections yet. Run `stepdpo rectify` first.")
    if judge_name is None and len(logs) > 1:
        raise RunError(f"{run.path} holds several kinds of corrections: {', '.join(logs)}. Choose with --corrections.")
    judge_name = next(iter(logs)) if judge_name is None else judge_name
    if judge_name not in logs:
        raise RunError(f"{run.path} holds no corrections {judge_name!r}, only {', '.join(logs)}.")
    settings = run.settings()["collect"]
    prompt = StepPrompt(**settings["prompt"])
    solutions = {solution.key: solution for solution in read_solutions(run)}
    for key in sorted(logs[judge_name]):
        record, solution = logs[judge_name][key], solutions[key]
        wrong = split_steps(solution.text)
        step = record["step"]
        prefix, wrong_span = wrong.prefix(step), wrong.spans[step - 1]
        for found in record["found"]:
            anew = split_steps(found["text"], wrong.style)
            yield {
                "dataset": settings["problems"],
                "prompt": render_template(prompt.user, problem=solution.problem.problem),
                "initial_reason_steps": prefix,
                "chosen": anew.step(step),
                "rejected": wrong.step(step),
                "full_chosen": found["text"][anew.spans[step - 1].begin :],
                "full_rejected": solution.text[wrong_span.begin :],
                "answer": solution.problem.answer,
                "step_index": step,
                "chosen_ends_solution": len(anew) == step and found["finish"] == "stop",
                "rejected_ends_solution": len(wrong) == step and solution.finish_reason == "stop",
                "source": f"{judge_name}:{found['key']}",
                "problem_id": solution.problem.id,
            }


def normalize_problem(text: str) -> str:
    """A problem for comparison: letters, digits and operators."""
    return re.sub(r"[^\w+\-*/^=<>.]|\.(?!\d)", "", text).casefold()


def select_pairs(
    rows: Iterable[Row],
    problems: dict[str, Problem],
    excluded: Iterable[str] = (),
    max_pairs_per_problem: int | None = None,
) -> tuple[list[Row], Counter[str]]:
    """
    Leave out what should not be trained on.

    Args:
        rows (`Iterable[dict]`):
            Pairs.
        problems (`dict[str, Problem]`):
            Their problems, by id.
        excluded (`Iterable[str]`, *optional*):
            Problems of test sets, compared by their letters, digits and operators.
        max_pairs_per_problem (`int`, *optional*):
            Most pairs of a problem. Those of different wrong steps come first.

    Returns:
        `list[dict]`, `Counter[str]`: The pairs, and how many were left out for what.
    """
    tests = {normalize_problem(problem) for problem in excluded}
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    seen = set()
    of_problem: Counter[str] = Counter()
    for row in _different_errors_first(rows):
        identity = (row["prompt"], *(normalize_step(row[c]) for c in ("initial_reason_steps", "chosen", "rejected")))
        if normalize_problem(problems[row["problem_id"]].problem) in tests:
            left_out["in a test set"] += 1
        elif identity in seen:
            left_out["duplicate"] += 1
        elif max_pairs_per_problem is not None and of_problem[row["problem_id"]] >= max_pairs_per_problem:
            left_out["more than enough of a problem"] += 1
        else:
            seen.add(identity)
            of_problem[row["problem_id"]] += 1
            kept.append(row)
    for number, row in enumerate(kept):
        StepPreference.from_row(row, f"pair {number}")
    return kept, left_out


def _different_errors_first(rows: Iterable[Row]) -> list[Row]:
    counts: Counter[tuple[str, str, str]] = Counter()
    ranked = []
    for row in rows:
        error = (row["prompt"], row["initial_reason_steps"], row["rejected"])
        ranked.append((counts[error], row))
        counts[error] += 1
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def build(
    paths: Sequence[Path],
    judge_name: str | None = None,
    exclude: Sequence[str] = (),
    max_pairs_per_problem: int | None = None,
    score: Callable[[list[Row]], None] | None = None,
) -> tuple[list[Row], Counter[str]]:
    """
    Make the pairs of a run and its shards.

    Args:
        paths (`Sequence[Path]`):
            Folders, as from [`run_directories`].
        judge_name (`str`, *optional*):
            Corrections to take.
        exclude (`Sequence[str]`, *optional*):
            Files with test problems.
        max_pairs_per_problem (`int`, *optional*):
            Most pairs of a problem.
        score (`Callable`, *optional*):
            Adds log-probabilities to the rows.

    Returns:
        `list[dict]`, `Counter[str]`: The pairs, and how many were left out for what.

    Raises:
        RunError: If there are no pairs.
    """
    rows: list[Row] = []
    settings: list[Row] = []
    problems: dict[str, Problem] = {}
    for path in paths:
        with RunDirectory(path) as run:
            settings.append({k: v for k, v in run.settings().get("collect", {}).items() if k != "shard"})
            mine = read_problems_of(run)
            if settings[0] != settings[-1] or mine.keys() & problems.keys():
                raise RunError(f"{path} and {paths[0]} do not belong together: other settings, or the same problems.")
            problems.update(mine)
            rows += make_pairs(run, judge_name)
    excluded = [problem for file in exclude for problem in read_texts(file)]
    kept, left_out = select_pairs(rows, problems, excluded, max_pairs_per_problem)
    if not kept:
        raise RunError(
            f"No pairs{f' are left ({dict(left_out)} left out)' if rows else ''}: no wrong step has a right "
            "continuation. Give more --num-samples to `collect`, or easier problems: the model has to solve some of them "
            "now and then."
        )
    if score is not None:
        score(kept)
    return kept, left_out


def save(rows: list[Row], to: str, card: str) -> str:
    """
    Write a data set and its card.

    Args:
        rows (`list[dict]`):
            The pairs.
        to (`str`):
            A file that ends in `.jsonl` or `.parquet`, or `hub:USER/NAME` (private).
        card (`str`):
            Text of the card.

    Returns:
        `str`: Where it is.
    """
    from datasets import Dataset

    check_target(to)
    data = Dataset.from_list(rows)
    if to.startswith("hub:"):
        from huggingface_hub import DatasetCard

        name = to.removeprefix("hub:")
        data.push_to_hub(name, private=True)
        DatasetCard(card).push_to_hub(name)
        return f"https://huggingface.co/datasets/{name}"
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        if path.suffix == ".parquet":
            data.to_parquet(str(unfinished))
        else:
            data.to_json(str(unfinished), force_ascii=False)
        os.replace(unfinished, path)
        path.with_suffix(".card.md").write_text(card, encoding="utf-8")
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written ({error.strerror}). Mend that and build again: the run is safe."
        ) from error
    return str(path)


def check_target(to: str) -> None:
    """
    Check where a data set is to go, before anything is done for it.

    Raises:
        RunError: If it is nowhere.
    """
    hub = to.startswith("hub:") and re.fullmatch(r"hub:[\w.-]+/[\w.-]+", to)
    if not hub and Path(to).suffix not in FORMATS:
        raise RunError(
            f"--output-file {to!r} is not known. Give a file that ends in {' or '.join(FORMATS)}, or hub:USER/NAME."
        )
