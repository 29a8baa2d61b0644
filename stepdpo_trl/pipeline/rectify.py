"""Let the model write the first wrong step anew until the answer is right (Step-DPO, section 3.2)."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..data.answers import RIGHT
from ..data.steps import split_steps
from ..runs.run_directory import RunDirectory
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .collect import wrong_solutions
from .judges.llm import undecided
from .judges.protocol import Judge
from .localize import read_verdicts
from .policy import Policy
from .records import Solution


def normalize_step(step: str) -> str:
    """A step for comparison: without case, white space, markup and a full stop at the end."""
    return re.sub(r"[\s*_`$\\]+", "", step).casefold().rstrip(".")


def rectify(
    runner: TaskRunner,
    policy: Policy,
    judge_name: str | None,
    name: str | None,
    num_corrections: int = 1,
    max_attempts: int = 20,
    judge: Judge | None = None,
) -> Counter[str]:
    """
    Sample from the last right prefix, in rounds, until there are enough right continuations.

    Rounds are of 1, 1, 2, 4, 8 ... samples. The first step of a continuation is a preferred step if its final answer
    is right and the step differs from the undesirable one and from those found before.

    Args:
        runner (`TaskRunner`):
            The run and its services.
        policy (`Policy`):
            The model that writes.
        judge_name (`str`, *optional*):
            Judge whose verdicts are taken.
        name (`str`, *optional*):
            Name of a model other than the one that wrote the solutions.
        num_corrections (`int`, *optional*, defaults to `1`):
            Preferred steps for each wrong solution.
        max_attempts (`int`, *optional*, defaults to `20`):
            Samples for each wrong solution at most.
        judge (`Judge`, *optional*):
            Looks at the preferred step; one that it finds wrong is dropped.

    Returns:
        `Counter[str]`: Solutions with a preferred step (`"rectified"`) and without (`"given up"`), pairs, samples,
        and preferred steps that the judge dropped (`"dropped"`).
    """
    found_in, verdicts = read_verdicts(runner.run, judge_name)
    log = runner.run.log(f"corrections.{found_in}{f'.by-{name}' if name else ''}")
    solutions = [s for s in wrong_solutions(runner.run) if s.key in verdicts and verdicts[s.key].step is not None]

    def task(solution: Solution) -> Task[tuple[Solution, dict[str, Any]]]:
        step = verdicts[solution.key].step
        assert step is not None
        found: list[dict[str, Any]] = []
        tried = dropped = 0
        steps = split_steps(solution.text)
        seen = {normalize_step(steps.step(step))}
        while len(found) < num_corrections and tried < max_attempts:
            numbers = range(tried, min(max_attempts, max(1, 2 * tried)))
            sampled = yield from policy.sample(solution.problem, steps.prefix(step), numbers)
            tried += len(sampled)
            for continuation in sampled:
                anew = split_steps(continuation.text, steps.style)
                if (
                    continuation.check.outcome != RIGHT
                    or len(found) == num_corrections
                    or len(anew) < step
                    or (len(anew) == step and continuation.finish_reason != "stop")  # cut within the step
                    or anew.spans[step - 1].begin != steps.spans[step - 1].begin
                    or normalize_step(anew.step(step)) in seen
                ):
                    continue
                seen.add(normalize_step(anew.step(step)))
                evidence: dict[str, Any] = {}
                if judge is not None:
                    # Only what the judge has not seen yet is new: the prefix was found right
                    whole = Solution(
                        continuation.key, solution.problem, continuation.text, RIGHT, "stop", style=steps.style
                    )
                    verdict = yield from judge(whole)
                    if undecided(verdict) or (verdict.step is not None and verdict.step <= step):
                        dropped += 1
                        continue
                    evidence = verdict.evidence
                found.append(
                    {
                        "key": continuation.key,
                        "text": continuation.text,
                        "finish": continuation.finish_reason,
                        "check": evidence,
                    }
                )
        return solution, {"step": step, "samples": tried, "dropped": dropped, "found": found}

    counts: Counter[str] = Counter()
    log.extend([])  # so that it is there where nothing is found
    for solution, record in runner.results(map(task, solutions), len(solutions), "solutions", counts):
        if solution.key not in log:
            log.append(solution.key, record)
        counts["rectified" if record["found"] else "given up"] += 1
        counts["pairs"] += len(record["found"])
        counts["samples"] += record["samples"]
        counts["dropped"] += record["dropped"]
    return counts


def read_corrections(run: RunDirectory) -> dict[str, Sequence[Any]]:
    """All corrections of a run, by the way they were made."""
    return {judge_name: list(log.items()) for judge_name, log in run.logs("corrections").items()}
