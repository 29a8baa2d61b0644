"""Sample solutions and check their answers (Step-DPO, section 3.2, "error collection")."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from ..data.answers import RIGHT, UNREADABLE, WRONG
from ..data.checkers import ANSWER_CHECKERS, MATH
from ..data.messages import counted
from ..data.prompts import StepPrompt
from ..data.steps import split_steps
from ..generation import ModelSpec, Sampling
from ..runs.log import RunError
from ..runs.log_view import LogView
from ..runs.run_directory import RunDirectory
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .policy import Policy
from .reading import reading
from .records import Problem, Solution, write_problem
from .stage_directory import ResultWriter

logger = logging.getLogger(__name__)


SOLUTIONS_BEFORE_CHECK = 32  # of --steps


def collect(
    runner: TaskRunner, policy: Policy, problems: Sequence[Problem], num_samples: int, style: str | None = None
) -> Counter[str]:
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
        style (`str`, *optional*):
            How solutions are split into steps, see [`~stepdpo_trl.data.steps.split_steps`].

    Returns:
        `Counter[str]`: Number of solutions per outcome.

    Raises:
        RunError: If `style` splits none of the first solutions.
    """

    def task(problem: Problem) -> Task[list[Solution]]:
        sampled = yield from policy.sample(problem, policy.prompt.response_prefix, range(num_samples))
        return [
            Solution(s.key, problem, s.text, s.check.outcome, s.finish_reason, s.check.answer, style) for s in sampled
        ]

    counts: Counter[str] = Counter()
    different = split = 0
    log = runner.run.log("solutions")
    tasks = runner.results(map(task, problems), len(problems), "problems", counts)
    with ResultWriter(log) as writer, closing(tasks) as results:
        for solutions in results:
            records = [(solution.key, _record(solution)) for solution in solutions]
            for key, record in records:
                writer.add(key, record)
            counts.update(solution.outcome for solution in solutions)
            split += sum(record["steps"] > 1 for _, record in records)
            if style is not None and not split and counts.total() >= SOLUTIONS_BEFORE_CHECK:
                raise RunError(not_split(style, counts.total()))
            different += len({solution.text for solution in solutions}) > 1
    if style is not None and not split and counts:
        raise RunError(not_split(style, counts.total()))
    if num_samples > 1 and not different:
        logger.warning(not_sampled(num_samples))
    return counts


def not_split(style: str, solutions: int) -> str:
    """Return the error for solutions in which no step was found."""
    return (
        f"--steps {style!r} splits none of the first {counted(solutions, 'solution')} into several steps. Read one "
        "with `stepdpo inspect`, and use other --steps with another --output-dir."
    )


def not_sampled(num_samples: int) -> str:
    """Return the warning for samples that are all the same."""
    return (
        f"All {num_samples} samples of each problem have the same text: the model is not sampled. Increase "
        "--temperature. If it is set, the server may ignore it (`transformers serve` samples only if the model's "
        'generation_config.json contains "do_sample": true).'
    )


def _record(solution: Solution) -> dict[str, Any]:
    return {
        "problem": solution.problem.id,
        "outcome": solution.outcome,
        "answer": solution.answer,
        "finish_reason": solution.finish_reason,
        "steps": len(split_steps(solution.text, solution.style)),
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
    log.extend((problem.id, write_problem(problem)) for problem in problems if problem.id not in log)


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


def read_problems_of(run: RunDirectory) -> Mapping[str, Problem]:
    """Return the problems of a run by id. They are read when they are used."""
    log = run.log("problems")

    def problem(key: str, record: dict[str, Any]) -> Problem:
        with reading(f"The problem {key!r}", log.path, _RESTORE):
            return Problem(key, **record)

    return LogView(log, problem)


def solutions_by_key(run: RunDirectory) -> Mapping[str, Solution]:
    """Return the solutions of a run by key. They are read when they are used."""
    problems, log = read_problems_of(run), run.log("solutions")
    problem_of = lru_cache(maxsize=64)(problems.__getitem__)  # the solutions of a problem mostly follow each other
    style = run.settings().get("collect", {}).get("steps")
    names = ("text", "outcome", "finish_reason", "answer")

    def solution(key: str, record: dict[str, Any]) -> Solution:
        with reading(f"The solution {key!r}", log.path, _RESTORE):
            try:
                problem = problem_of(record["problem"])
            except KeyError:
                if "problem" not in record:
                    raise
                raise RunError(
                    f"The problem {record['problem']!r} of the solution {key!r} is not in "
                    f"{run.path / 'problems.jsonl'}. {_RESTORE}"
                ) from None
            text, outcome, reason, answer = (record[name] for name in names)
            if not isinstance(text, str):
                raise TypeError("its text is not a string")
            return Solution(key, problem, text, outcome, reason, answer, style)

    return LogView(log, solution)


def read_solutions(run: RunDirectory) -> Iterator[Solution]:
    """Read the solutions of a run."""
    return iter(solutions_by_key(run).values())


@dataclass(frozen=True)
class SelectedSolutions(Iterable[Solution]):
    """
    Some solutions of a run, read whenever they are iterated.

    Args:
        count (`int`):
            Their number.
        read (`Callable[[], Iterator[Solution]]`):
            Function that reads them.
    """

    count: int
    read: Callable[[], Iterator[Solution]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Solution]:
        return self.read()


def wrong_solutions(run: RunDirectory) -> SelectedSolutions:
    """
    Read the wrong solutions of a run.

    Args:
        run (`RunDirectory`):
            The run.

    Returns:
        [`SelectedSolutions`]: The wrong solutions. There may be none in a shard.

    Raises:
        RunError: If there are no solutions, or none of them is wrong in a run that is not a shard.
    """
    counts = Counter(record["outcome"] for record in run.log("solutions").values())
    if not counts:
        raise RunError(f"{run.path} holds no solutions yet. Run `stepdpo collect` first.")
    if not counts[WRONG]:
        settings = read_settings(run)
        message = no_wrong_answers(counts, settings.get("checker", MATH.name))
        if settings["shard"] == [0, 1]:
            raise RunError(message)
        logger.warning(f"{run.path}: {message}")  # other shards may have wrong solutions
    return SelectedSolutions(counts[WRONG], lambda: (s for s in read_solutions(run) if s.outcome == WRONG))


def no_wrong_answers(counts: Mapping[str, int], checker: str = MATH.name) -> str:
    """
    Return the message for a run without wrong answers.

    Args:
        counts (`Mapping[str, int]`):
            Number of solutions per outcome.
        checker (`str`, *optional*, defaults to `"math"`):
            Name of the checker of the solutions.
    """
    if counts[UNREADABLE] > counts[RIGHT]:
        advice = (
            "Use a --prompt that asks for the final answer in \\boxed{}"
            if checker in ANSWER_CHECKERS
            else f"Use a --prompt that asks for solutions as {checker} reads them, fix that function"
        )
        return (
            f"No wrong answers, but {counts[UNREADABLE]} unreadable and {counts[RIGHT]} right ones. Unreadable "
            f"solutions cannot be used. `stepdpo report` counts the reasons. {advice}, or increase --max-new-tokens."
        )
    return (
        f"No wrong answers among {counted(sum(counts.values()), 'solution')}, so there is nothing to learn from. Use "
        "harder problems, or increase --num-samples."
    )
