"""Find the first wrong step of each wrong solution (Step-DPO, section 3.2, "step localization")."""

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import combinations
from typing import Any

from ..runs.log import RunError
from ..runs.log_view import LogView
from ..runs.run_directory import RunDirectory
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .collect import wrong_solutions
from .judges.expressions import canonical
from .judges.protocol import Judge
from .reading import reading
from .records import Solution, Verdict, text_digest
from .stage_directory import ResultWriter


def localize(runner: TaskRunner, judge: Judge, judge_name: str) -> Counter[str]:
    """
    Find the first wrong step of each wrong solution of a run.

    Judging again with more rollouts replaces the verdicts that change.

    Args:
        runner (`TaskRunner`):
            The run and its services.
        judge (`Judge`):
            The judge.
        judge_name (`str`):
            Name under which the verdicts are kept, in canonical spelling.

    Returns:
        `Counter[str]`: Number of solutions with a verdict (`"located"`) and without (`"abstained"`).
    """
    solutions = wrong_solutions(runner.run)
    log = runner.run.log(f"verdicts.{judge_name}")

    def task(solution: Solution) -> Task[tuple[Solution, Verdict]]:
        verdict = yield from judge(solution)
        return solution, replace(verdict, solution=text_digest(solution.text))

    counts: Counter[str] = Counter()
    tasks = runner.results(map(task, solutions), len(solutions), "solutions", counts)
    with ResultWriter(log) as writer, closing(tasks) as results:
        for solution, verdict in results:
            writer.add(solution.key, vars(verdict))
            counts["abstained" if verdict.step is None else "located"] += 1
    if not log:
        log.extend([])  # creates the file: later stages find no verdicts rather than a missing stage
    return counts


def read_verdicts(run: RunDirectory, judge_name: str | None = None) -> tuple[str, Mapping[str, Verdict]]:
    """
    Read the verdicts of a judge.

    Args:
        run (`RunDirectory`):
            The run.
        judge_name (`str`, *optional*):
            Judge expression. Required if the run has verdicts of several.

    Returns:
        `str`, `Mapping[str, Verdict]`: The judge expression in canonical spelling, and the verdicts by solution key,
            which are read when they are used.

    Raises:
        RunError: If the run has no such verdicts, or several and `judge_name` is not given.
    """
    logs = run.logs("verdicts")
    if not logs:
        raise RunError(f"{run.path} holds no verdicts yet. Run `stepdpo localize` first.")
    if judge_name is None and len(logs) > 1:
        raise RunError(f"{run.path} holds verdicts of several judges: {', '.join(logs)}. Choose one with --judge.")
    name = next(iter(logs)) if judge_name is None else judge_name
    if name not in logs:
        name = canonical(name)
    if name not in logs:
        raise RunError(f"{run.path} holds no verdicts of {judge_name!r}, only of {', '.join(logs)}.")
    fix = f"Remove its line and run `stepdpo localize {run.path} --judge {name}` again."

    def verdict(key: str, record: dict[str, Any]) -> Verdict:
        with reading(f"The verdict of {key!r}", logs[name].path, fix):
            found = Verdict(**record)
            if type(found.step) not in (int, type(None)) or not isinstance(found.evidence, dict):
                raise TypeError("its step is not a number, or its evidence is not an object")
            return found

    return name, LogView(logs[name], verdict)


def agreement(run: RunDirectory) -> dict[tuple[str, str], dict[str, Any]]:
    """
    Compare the verdicts of each two judges of a run.

    Args:
        run (`RunDirectory`):
            The run.

    Returns:
        `dict[tuple[str, str], dict]`: For each pair of judges, the number of solutions that both have located
        (`"both"`) and the number on which they name the same step (`"same"`).
    """
    logs = run.logs("verdicts")
    table = {}
    for first, second in combinations(sorted(logs), 2):
        both = same = 0
        for key, record in logs[first].items():
            if record["step"] is not None:
                other = logs[second].get(key, {}).get("step")
                both += other is not None
                same += other == record["step"]
        table[first, second] = {"both": both, "same": same}
    return table
