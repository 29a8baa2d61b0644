"""Sample preferred steps for the first wrong steps (Step-DPO, section 3.2, "rectification")."""

import re
from collections import Counter
from contextlib import AbstractContextManager, closing
from typing import Any

from ..data.answers import RIGHT
from ..data.steps import Steps, split_steps
from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .collect import wrong_solutions
from .judges.llm import undecided
from .judges.protocol import Judge
from .localize import read_verdicts
from .policy import Continuation, Policy
from .reading import reading
from .records import Solution
from .stage_directory import append_changed


def normalize_step(step: str) -> str:
    """Normalize a step for comparison: ignore case, white space, markup and a final period."""
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
    Sample continuations of the last right prefix, in rounds, until enough of them are right.

    Rounds have 1, 1, 2, 4, 8 ... samples. The first step of a continuation is a preferred step if the final answer is
    right and the step differs from the rejected step and from the preferred steps found before.

    Samples are named by problem, prefix and number, and their answers are kept. So a later call with larger
    `num_corrections` or `max_attempts` only samples what is missing, with the result of a run from scratch.

    Args:
        runner (`TaskRunner`):
            The run and its services.
        policy (`Policy`):
            The model that writes the continuations.
        judge_name (`str`, *optional*):
            Judge expression whose verdicts are used. Required if the run has several.
        name (`str`, *optional*):
            Name of the model, if it is not the one that wrote the solutions.
        num_corrections (`int`, *optional*, defaults to `1`):
            Preferred steps per wrong solution.
        max_attempts (`int`, *optional*, defaults to `20`):
            Maximum number of samples per wrong solution.
        judge (`Judge`, *optional*):
            Judge of the preferred steps. A step that it finds wrong, or cannot decide on, is dropped.

    Returns:
        `Counter[str]`: Number of solutions with a preferred step (`"rectified"`) and without (`"given up"`), of
        `"pairs"`, of `"samples"`, and of preferred steps dropped by the judge (`"dropped"`).
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
        if not 1 <= step <= len(steps):
            raise RunError(
                f"The verdict of {solution.key!r} in {runner.run.path / f'verdicts.{found_in}.jsonl'} is step {step}, "
                f"but the solution has {len(steps)} steps. Remove its line and run `stepdpo localize` again."
            )
        seen = {normalize_step(steps.step(step))}
        while len(found) < num_corrections and tried < max_attempts:
            numbers = range(tried, min(max_attempts, max(1, 2 * tried)))
            sampled = yield from policy.sample(solution.problem, steps.prefix(step), numbers)
            tried += len(sampled)
            for continuation in sampled:
                corrected = _preferred_step(continuation, steps, step)
                if len(found) == num_corrections or corrected is None or normalize_step(corrected) in seen:
                    continue
                seen.add(normalize_step(corrected))
                evidence: dict[str, Any] = {}
                if judge is not None:
                    # Only errors up to this step count: later steps are not part of the pair
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
    with closing(runner.results(map(task, solutions), len(solutions), "solutions", counts)) as results:
        for solution, record in results:
            append_changed(log, solution.key, record)
            counts["rectified" if record["found"] else "given up"] += 1
            counts["pairs"] += len(record["found"])
            counts["samples"] += record["samples"]
            counts["dropped"] += record["dropped"]
    if not log:
        log.extend([])  # creates the file: `build` finds no pairs rather than a missing stage
    return counts


def _preferred_step(continuation: Continuation, wrong: Steps, number: int) -> str | None:
    """Return step `number` of a continuation whose answer is right, or `None` if it cannot replace the wrong step."""
    steps = split_steps(continuation.text, wrong.style)
    if continuation.check.outcome != RIGHT or len(steps) < number:
        return None
    if len(steps) == number and continuation.finish_reason != "stop":  # truncated within the step
        return None
    if steps.spans[number - 1].begin != wrong.spans[number - 1].begin:
        return None
    return steps.step(number)


def current_corrections(run: RunDirectory) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Read the corrections of a run that belong to its current verdicts.

    A verdict may change when `localize` is run again with more rollouts. Corrections of another step are ignored.

    Args:
        run (`RunDirectory`):
            The run.

    Returns:
        `dict[str, dict[str, dict]]`: For each set of corrections, the records by solution key.
    """
    current: dict[str, dict[str, dict[str, Any]]] = {}
    for name, log in run.logs("corrections").items():
        steps, current[name] = _located_steps(run, name), {}
        for key, record in log.items():
            with reading_correction(run, name, key):
                step, _, _ = record["step"], record["samples"] + record["dropped"], len(record["found"])
                if steps.get(key, step) == step:
                    current[name][key] = record
    return current


def reading_correction(run: RunDirectory, name: str, key: str) -> AbstractContextManager[None]:
    """Return a context in which a correction is read; see [`~stepdpo_trl.pipeline.reading.reading`]."""
    path = run.path / f"corrections.{name}.jsonl"
    return reading(f"The correction of {key!r}", path, "Remove its line and run `stepdpo rectify` again.")


def outdated_corrections(run: RunDirectory, name: str) -> list[str]:
    """
    List the solutions whose verdict names another step than their correction.

    Args:
        run (`RunDirectory`):
            The run.
        name (`str`):
            Set of corrections.

    Returns:
        `list[str]`: Keys of the solutions.
    """
    steps = _located_steps(run, name)
    log = run.log(f"corrections.{name}")
    return [key for key, record in log.items() if steps.get(key) not in (None, record["step"])]


def _located_steps(run: RunDirectory, corrections: str) -> dict[str, int | None]:
    judge_name = corrections.partition(".by-")[0]
    if judge_name not in run.logs("verdicts"):
        return {}
    return {key: verdict.step for key, verdict in read_verdicts(run, judge_name)[1].items()}
