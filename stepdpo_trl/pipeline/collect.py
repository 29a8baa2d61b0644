"""Sample solutions and check their answers (Step-DPO, section 3.2, "error collection")."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from ..data.answers import RIGHT, UNREADABLE, WRONG
from ..data.prompts import StepPrompt
from ..data.steps import split_steps
from ..generation import ModelSpec, Sampling
from ..runs.run_directory import Log, RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .policy import Policy
from .reading import reading
from .records import Problem, Solution, write_problem

logger = logging.getLogger(__name__)


def collect(runner: TaskRunner, policy: Policy, problems: Sequence[Problem], num_samples: int) -> Counter[str]:
    """
    Sample solutions of each problem and check their answers.

    Args:
        runner (`TaskRunner`):
            The run and its services.
        policy (`Policy`):
            The model.
        problems (`Sequence[Problem]`):
            The problems.
        num_samples (`int`):
            Solutions per problem.

    Returns:
        `Counter[str]`: Number of solutions per outcome.
    """

    def task(problem: Problem) -> Task[list[Solution]]:
        sampled = yield from policy.sample(problem, policy.prompt.response_prefix, range(num_samples))
        return [Solution(s.key, problem, s.text, s.check.outcome, s.finish_reason, s.check.answer) for s in sampled]

    counts: Counter[str] = Counter()
    different = 0
    log = runner.run.log("solutions")
    with closing(runner.results(map(task, problems), len(problems), "problems", counts)) as results:
        for solutions in results:
            records = ((solution.key, _record(solution)) for solution in solutions)
            if missing := [(key, record) for key, record in records if key not in log]:
                log.extend(missing)
            counts.update(solution.outcome for solution in solutions)
            different += len({solution.text for solution in solutions}) > 1
    if num_samples > 1 and not different:
        logger.warning(not_sampled(num_samples))
    return counts


def not_sampled(num_samples: int) -> str:
    """Return the warning for samples that are all the same."""
    return (
        f"All {num_samples} samples of each problem have the same text: the model is not sampled. Increase "
        "--temperature. If it is set, the server may ignore it (`transformers serve` samples only if the model's "
        'generation_config.json contains "do_sample": true).'
    )


def _record(solution: Solution) -> dict[str, object]:
    return {
        "problem": solution.problem.id,
        "outcome": solution.outcome,
        "answer": solution.answer,
        "finish_reason": solution.finish_reason,
        "steps": len(split_steps(solution.text)),
        "text": solution.text,
    }


def check_problems(run: RunDirectory, problems: Sequence[Problem]) -> None:
    """
    Check that the problems do not contradict those of a run.

    Args:
        run (`RunDirectory`):
            The run.
        problems (`Sequence[Problem]`):
            The problems.

    Raises:
        RunError: If a problem has another text, answer or solution than the one with the same id in the run.
    """
    log = run.log("problems")
    for problem in problems:
        if log.get(problem.id, write_problem(problem)) != write_problem(problem):
            raise RunError(
                f"Problem {problem.id!r} differs from the problem with the same id in {run.path}. Restore the file of "
                "problems, or use another --output-dir."
            )


def keep_problems(run: RunDirectory, problems: Sequence[Problem]) -> None:
    """
    Write the problems of a run, or check that they are the same if the run is resumed.

    Args:
        run (`RunDirectory`):
            The run.
        problems (`Sequence[Problem]`):
            The problems.

    Raises:
        RunError: As for [`check_problems`].
    """
    check_problems(run, problems)
    log = run.log("problems")
    if missing := [(problem.id, write_problem(problem)) for problem in problems if problem.id not in log]:
        log.extend(missing)


_RESTORE = "Restore the file, or remove the line and run the same `stepdpo collect` command again, which adds it."


def read_settings(run: RunDirectory) -> dict[str, Any]:
    """
    Read the settings of `collect`.

    Args:
        run (`RunDirectory`):
            The run.

    Returns:
        `dict`: The settings, as passed to [`~stepdpo_trl.pipeline.session.Session.collect`].

    Raises:
        RunError: If they are missing, or were edited or written by another release.
    """
    log = run.settings()
    if "collect" not in log:
        raise RunError(f"{run.path} holds no solutions yet. Run `stepdpo collect` first.")
    settings = log["collect"]
    fix = "Restore the line, or start a new run. Runs of other releases can have other settings."
    with reading("The record 'collect'", log.path, fix):
        StepPrompt(**settings["prompt"]), Sampling(**settings["sampling"])
        unknown = settings["model"].keys() - {field.name for field in fields(ModelSpec)}
        if unknown:
            raise TypeError(f"`model` has an unknown field {min(unknown)!r}")
        missing = [f"model.{name}" for name in ("model", "backend") if name not in settings["model"]]
        missing += [name for name in ("problems", "num_samples", "seed", "shard") if name not in settings]
        if missing:
            raise KeyError(missing[0])
    return settings


def read_problems_of(run: RunDirectory) -> dict[str, Problem]:
    """Read the problems of a run, by id."""
    log, problems = run.log("problems"), {}
    for key, record in log.items():
        with reading(f"The problem {key!r}", log.path, _RESTORE):
            problems[key] = Problem(key, **record)
    return problems


def read_solutions(run: RunDirectory) -> Iterator[Solution]:
    """Read the solutions of a run."""
    problems = read_problems_of(run)
    log: Log = run.log("solutions")
    names = ("text", "outcome", "finish_reason", "answer")
    for key, record in log.items():
        with reading(f"The solution {key!r}", log.path, _RESTORE):
            if record["problem"] not in problems:
                raise RunError(
                    f"The problem {record['problem']!r} of the solution {key!r} is not in "
                    f"{run.path / 'problems.jsonl'}. {_RESTORE}"
                )
            solution = Solution(key, problems[record["problem"]], *(record[name] for name in names))
            if not isinstance(solution.text, str):
                raise TypeError("its text is not a string")
        yield solution


def wrong_solutions(run: RunDirectory) -> list[Solution]:
    """
    Read the wrong solutions of a run.

    Args:
        run (`RunDirectory`):
            The run.

    Returns:
        `list[Solution]`: The wrong solutions. They may be empty for a shard.

    Raises:
        RunError: If there are no solutions, or none of them is wrong in a run that is not a shard.
    """
    solutions = list(read_solutions(run))
    counts = Counter(solution.outcome for solution in solutions)
    wrong = [solution for solution in solutions if solution.outcome == WRONG]
    if not solutions:
        raise RunError(f"{run.path} holds no solutions yet. Run `stepdpo collect` first.")
    if not wrong:
        if read_settings(run)["shard"] == [0, 1]:
            raise RunError(no_wrong_answers(counts))
        logger.warning(f"{run.path}: {no_wrong_answers(counts)}")  # other shards may have wrong solutions
    return wrong


def no_wrong_answers(counts: Mapping[str, int]) -> str:
    """
    Return the message for a run without wrong answers.

    Args:
        counts (`Mapping[str, int]`):
            Number of solutions per outcome.
    """
    if counts[UNREADABLE] > counts[RIGHT]:
        return (
            f"No wrong answers, but {counts[UNREADABLE]} unreadable and {counts[RIGHT]} right ones. Unreadable "
            "solutions cannot be used. Use a --prompt that asks for the answer in \\boxed{}, or increase "
            "--max-new-tokens."
        )
    return (
        f"No wrong answers among {sum(counts.values())} solutions, so there is nothing to learn from. Use harder "
        "problems, or increase --num-samples."
    )
