"""Sample solutions, and find the wrong ones (Step-DPO, section 3.2, "error collection")."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..data.answers import RIGHT, UNREADABLE, WRONG
from ..data.steps import split_steps
from ..runs.run_directory import Log, RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .policy import Policy
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
            Solutions of each.

    Returns:
        `Counter[str]`: Number of solutions by outcome.
    """

    def task(problem: Problem) -> Task[list[Solution]]:
        sampled = yield from policy.sample(problem, policy.prompt.response_prefix, range(num_samples))
        return [Solution(s.key, problem, s.text, s.check.outcome, s.finish_reason, s.check.answer) for s in sampled]

    counts: Counter[str] = Counter()
    different = 0
    log = runner.run.log("solutions")
    for solutions in runner.results(map(task, problems), len(problems), "problems", counts):
        records = ((solution.key, _record(solution)) for solution in solutions)
        log.extend((key, record) for key, record in records if key not in log)
        counts.update(solution.outcome for solution in solutions)
        different += len({solution.text for solution in solutions}) > 1
    if num_samples > 1 and not different:
        logger.warning(not_sampled(num_samples))
    return counts


def not_sampled(num_samples: int) -> str:
    """What to say where samples do not differ."""
    return (
        f"All {num_samples} samples of each problem are the same text: the model is not sampled. Raise --temperature; "
        "a server may ignore it (`transformers serve` samples where the model's generation_config.json says "
        '"do_sample": true).'
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


def keep_problems(run: RunDirectory, problems: Sequence[Problem]) -> None:
    """
    Write down the problems of a run, or check that they are the same where it goes on.

    Raises:
        RunError: If one is another.
    """
    log = run.log("problems")
    for problem in problems:
        if log.get(problem.id, write_problem(problem)) != write_problem(problem):
            raise RunError(
                f"Problem {problem.id!r} is another one than when {run.path} was begun. Take a new --output-dir."
            )
    log.extend((problem.id, write_problem(problem)) for problem in problems if problem.id not in log)


def read_problems_of(run: RunDirectory) -> dict[str, Problem]:
    """The problems of a run, by id."""
    return {key: Problem(key, **record) for key, record in run.log("problems").items()}


def read_solutions(run: RunDirectory) -> Iterator[Solution]:
    """The solutions of a run."""
    problems = read_problems_of(run)
    log: Log = run.log("solutions")
    for key, record in log.items():
        yield Solution(
            key,
            problems[record["problem"]],
            record["text"],
            record["outcome"],
            record["finish_reason"],
            record["answer"],
        )


def wrong_solutions(run: RunDirectory) -> list[Solution]:
    """
    The wrong solutions of a run.

    Raises:
        RunError: If there are none, unless this is a shard.
    """
    solutions = list(read_solutions(run))
    counts = Counter(solution.outcome for solution in solutions)
    wrong = [solution for solution in solutions if solution.outcome == WRONG]
    if not solutions:
        raise RunError(f"{run.path} holds no solutions yet. Run `stepdpo collect` first.")
    if not wrong:
        if run.settings()["collect"]["shard"] == [0, 1]:
            raise RunError(no_wrong_answers(counts))
        logger.warning(f"{run.path}: {no_wrong_answers(counts)}")  # other shards may have some
    return wrong


def no_wrong_answers(counts: Mapping[str, int]) -> str:
    """What to say where nothing is wrong."""
    if counts[UNREADABLE] > counts[RIGHT]:
        return (
            f"No wrong answers: {counts[RIGHT]} right and {counts[UNREADABLE]} unreadable ones. Unreadable solutions "
            "teach nothing: give a --prompt that asks for the answer in \\boxed{}, or more --max-new-tokens."
        )
    return (
        f"No wrong answers among {sum(counts.values())}: there is nothing to learn from. Give harder problems, or "
        "more --num-samples."
    )
