"""Problems, and the run folders with the solutions and step pairs of the initial model."""

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment_parts import random_judge, write_rows
from plan import Settings

from stepdpo_trl.cli.problems import load_training_problems
from stepdpo_trl.data.files import partial_path, write_atomically
from stepdpo_trl.evaluation.problems import load_problems
from stepdpo_trl.generation.protocol import token_count
from stepdpo_trl.pipeline.build import build
from stepdpo_trl.pipeline.collect import read_settings, read_solutions, solutions_by_key
from stepdpo_trl.pipeline.judge_options import DEFAULT_CHECK
from stepdpo_trl.pipeline.localize import localize
from stepdpo_trl.pipeline.policy import render_template
from stepdpo_trl.pipeline.records import Problem, Solution
from stepdpo_trl.pipeline.rectify import current_corrections
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.pipeline.stage_directory import read_times
from stepdpo_trl.runs.run_directory import RunDirectory, RunError
from stepdpo_trl.runs.runner import TaskRunner

_SHARD = re.compile(r"shard-(\d+)-of-\d+")
_COPIED = ("settings.jsonl", "problems.jsonl", "solutions.jsonl", "checks.jsonl")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ProblemFiles:
    """
    Files of problems.

    Args:
        train (`Path`):
            Problems whose solutions are sampled.
        tuning (`Path`):
            Held-out training problems.
        test (`Path`):
            Test problems.
    """

    train: Path
    tuning: Path
    test: Path

    @property
    def excluded(self) -> list[Path]:
        """Files with problems that must not be trained on."""
        return [self.tuning, self.test]


def problem_files(folder: Path) -> ProblemFiles:
    """Return the files of problems in a folder."""
    return ProblemFiles(*(folder / f"{name}.jsonl" for name in ("train", "tuning", "test")))


def write_problems(settings: Settings, folder: Path) -> None:
    """
    Load the problems and write them to files.

    Args:
        settings (`Settings`):
            The settings.
        folder (`Path`):
            Folder of the files.

    Raises:
        RunError: If they cannot be loaded, or there are too few to hold some out.
    """
    train = list(load_training_problems(settings.train, settings.train_limit))
    test = list(load_problems(settings.test, settings.test_limit))
    if not 0 < settings.held_out < len(train):
        raise RunError(
            f"--held-out {settings.held_out} must be between 1 and {len(train) - 1}: {settings.train!r} has "
            f"{len(train)} training problems, and the others are sampled."
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = problem_files(folder)
    parts = (train[: -settings.held_out], train[-settings.held_out :], test)
    for file, problems in zip((files.train, files.tuning, files.test), parts, strict=True):
        rows = ({"id": p.id, "problem": p.problem, "answer": p.answer, "solution": p.solution} for p in problems)
        write_rows(file, rows)


def started_folders(path: Path) -> list[Path]:
    """
    Return the folders of a run that hold corrections. Unlike for `stepdpo build`, shards may be missing.

    Args:
        path (`Path`):
            Folder passed as `--output-dir` to `stepdpo data`.

    Returns:
        `list[Path]`: The folders, in the order of the shards.
    """
    shards = [(int(match[1]), shard) for shard in path.glob("shard-*") if (match := _SHARD.fullmatch(shard.name))]
    return [folder for _, folder in sorted(shards) or [(0, path)] if any(folder.glob("corrections.*.jsonl"))]


def read_step_pairs(folders: Sequence[Path], excluded: Sequence[Path]) -> Rows:
    """
    Build the step pairs of the folders of a run.

    Args:
        folders (`Sequence[Path]`):
            The folders.
        excluded (`Sequence[Path]`):
            Files with problems to leave out.

    Returns:
        `list[dict]`: The pairs. Empty if there are none yet.
    """
    filled = [folder for folder in folders if _has_pairs(folder)]
    return list(build(filled, exclude=[str(file) for file in excluded])[0]) if filled else []


def _has_pairs(folder: Path) -> bool:
    with RunDirectory(folder) as run:
        return any(record["found"] for log in run.logs("corrections").values() for record in log.values())


@dataclass(frozen=True)
class Sample:
    """
    Solution that the initial model was asked for, with its cost.

    Args:
        solution (`Solution`):
            The solution.
        prompt (`str`):
            The user message.
        prefix (`str`):
            The response prefix, with which the solution starts.
        tokens (`int`):
            Number of sampled tokens.
    """

    solution: Solution
    prompt: str
    prefix: str
    tokens: int


def read_samples(folders: Sequence[Path], excluded: Collection[str]) -> Iterator[Sample]:
    """
    Read the solutions that `stepdpo collect` has sampled.

    Args:
        folders (`Sequence[Path]`):
            Folders of runs.
        excluded (`Collection[str]`):
            Texts of problems to leave out.

    Yields:
        `Sample`: The solutions.
    """
    for folder in folders:
        with RunDirectory(folder) as run:
            prompt, log = read_settings(run)["prompt"], run.log("generations.policy")
            for solution in read_solutions(run):
                text = solution.problem.problem
                if text not in excluded:
                    tokens = token_count(log[solution.key]["tokens"])
                    yield Sample(
                        solution, render_template(prompt["user"], problem=text), prompt["response_prefix"], tokens
                    )


def read_corrected(folders: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """
    Read the corrected solutions of runs.

    Args:
        folders (`Sequence[Path]`):
            Folders of runs.

    Yields:
        `tuple[str, str, str]`: Id of the problem, text of the solution, and finish reason.
    """
    for folder in folders:
        with RunDirectory(folder) as run:
            solutions = solutions_by_key(run)
            for name in run.logs("corrections"):
                for key, record in current_corrections(run, name):
                    for found in record["found"]:
                        yield solutions[key].problem.id, found["text"], found["finish"]


def costs(folders: Sequence[Path], stages: Sequence[str] = ("",)) -> tuple[int, float]:
    """
    Add up the costs of runs.

    Args:
        folders (`Sequence[Path]`):
            Folders of runs.
        stages (`Sequence[str]`, *optional*):
            First words of the pipeline stages to count. Defaults to all.

    Returns:
        `tuple[int, float]`: Sampled tokens and minutes.
    """
    tokens, seconds = 0, 0.0
    for folder in folders:
        with RunDirectory(folder) as run:
            for log in run.logs("generations").values():
                found = (r for r in log.values() if str(r.get("stage", "")).startswith(tuple(stages)))
                tokens += sum(token_count(record["tokens"]) for record in found)
        seconds += sum(spent for stage, spent in read_times(folder).items() if stage.startswith(tuple(stages)))
    return tokens, seconds / 60


def correct_at_random(source: Path, target: Path, changes: dict[str, Any], max_attempts: int) -> int:
    """
    Localize the wrong solutions of a run at random, and correct them.

    Args:
        source (`Path`):
            Folder of the run. Only its solutions are used.
        target (`Path`):
            Folder of the copy to work in.
        changes (`dict[str, Any]`):
            Fields of `ModelSpec` that have changed since the solutions were sampled.
        max_attempts (`int`):
            Maximum number of samples per wrong solution.

    Returns:
        `int`: Number of pairs.
    """
    if not target.exists():
        _copy_solutions(source, target)
    with RunDirectory(target) as run:
        localize(TaskRunner(run, "localize random"), random_judge, "random")
    with Session() as session:
        found = session.rectify(target, "random", max_attempts=max_attempts, check=DEFAULT_CHECK, model=changes)
    return int(found["pairs"])


def _copy_solutions(source: Path, target: Path) -> None:
    """Copy the records of `collect`, so that the samples of other stages count as costs once more."""
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in _COPIED:
        shutil.copyfile(source / name, partial / name)
    with (source / "generations.policy.jsonl").open(encoding="utf-8") as file:
        kept = [line for line in file if '"stage": "collect' in line]
    write_atomically(partial / "generations.policy.jsonl", "".join(kept))
    partial.rename(target)


def write_more_problems(samples: Sequence[Sample], file: Path) -> None:
    """Write the problems of solutions to a file, to sample more solutions of them."""
    problems: dict[str, Problem] = {sample.solution.problem.id: sample.solution.problem for sample in samples}
    write_rows(file, ({"id": key, "problem": p.problem, "answer": p.answer} for key, p in problems.items()))
