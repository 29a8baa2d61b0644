"""Find the first wrong step of each wrong solution (Step-DPO, section 3.2, "step localization")."""

from collections import Counter
from typing import Any

from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .collect import wrong_solutions
from .judges.expressions import canonical
from .judges.protocol import Judge
from .records import Solution, Verdict


def localize(runner: TaskRunner, judge: Judge, judge_name: str) -> Counter[str]:
    """
    Ask a judge about each wrong solution of a run.

    Args:
        runner (`TaskRunner`):
            The run and its services.
        judge (`Judge`):
            The judge.
        judge_name (`str`):
            Name of the judge, under which verdicts are kept: there may be several.

    Returns:
        `Counter[str]`: Number of solutions with a verdict (`"located"`) and without (`"silent"`).
    """
    solutions = wrong_solutions(runner.run)
    log = runner.run.log(f"verdicts.{canonical(judge_name)}")

    def task(solution: Solution) -> Task[tuple[Solution, Verdict]]:
        return solution, (yield from judge(solution))

    counts: Counter[str] = Counter()
    log.extend([])  # so that it is there where there is nothing to say
    for solution, verdict in runner.results(map(task, solutions), len(solutions), "solutions", counts):
        if solution.key not in log:
            log.append(solution.key, vars(verdict))
        counts["silent" if verdict.step is None else "located"] += 1
    return counts


def read_verdicts(run: RunDirectory, judge_name: str | None = None) -> tuple[str, dict[str, Verdict]]:
    """
    Read the verdicts of a judge.

    Args:
        run (`RunDirectory`):
            The run.
        judge_name (`str`, *optional*):
            Name of the judge. Not needed where there is one only.

    Returns:
        `str`, `dict[str, Verdict]`: The name as it is in files, and the verdicts by solution.

    Raises:
        RunError: If there are none of that name, or several and none is named.
    """
    logs = run.logs("verdicts")
    if not logs:
        raise RunError(f"{run.path} holds no verdicts yet. Run `stepdpo localize` first.")
    if judge_name is None and len(logs) > 1:
        raise RunError(f"{run.path} holds verdicts of several judges: {', '.join(logs)}. Choose one with --judge.")
    name = next(iter(logs)) if judge_name is None else canonical(judge_name)
    if name not in logs:
        raise RunError(f"{run.path} holds no verdicts of {judge_name!r}, only of {', '.join(logs)}.")
    return name, {key: Verdict(**record) for key, record in logs[name].items()}


def agreement(run: RunDirectory) -> dict[tuple[str, str], dict[str, Any]]:
    """For each two judges: on how many solutions both speak, and on how many of these they name the same step."""
    verdicts = {judge_name: read_verdicts(run, judge_name)[1] for judge_name in run.logs("verdicts")}
    table = {}
    for first in verdicts:
        for second in verdicts:
            if first < second:
                shared = [key for key in verdicts[first] if key in verdicts[second]]
                both = [
                    (verdicts[first][key].step, verdicts[second][key].step)
                    for key in shared
                    if None not in (verdicts[first][key].step, verdicts[second][key].step)
                ]
                table[first, second] = {"both": len(both), "same": sum(a == b for a, b in both)}
    return table
