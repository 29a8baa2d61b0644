"""Sample preferred steps for the first wrong steps (Step-DPO, section 3.2, "rectification")."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from typing import Any

from ..data.answers import RIGHT
from ..data.steps import Steps, split_steps
from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import Task
from .collect import SelectedSolutions, wrong_solutions
from .judges.llm import undecided
from .judges.protocol import Judge
from .localize import read_verdicts
from .policy import Continuation, Policy
from .reading import reading
from .records import Solution, Verdict, is_of, text_digest
from .stage_directory import ResultWriter

logger = logging.getLogger(__name__)


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
    normalize: Callable[[str], str] = normalize_step,
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
        normalize (`Callable[[str], str]`, *optional*, defaults to `normalize_step`):
            Function that returns the same for steps that do not differ.

    Returns:
        `Counter[str]`: Number of solutions with a preferred step (`"rectified"`) and without (`"given up"`), of
        `"pairs"`, of `"samples"`, and of preferred steps dropped by the judge (`"dropped"`).
    """
    found_in, verdicts = read_verdicts(runner.run, judge_name)
    log = runner.run.log(f"corrections.{found_in}{f'.by-{name}' if name else ''}")
    wrong = wrong_solutions(runner.run)

    def located() -> Iterator[Solution]:
        return (s for s in wrong if s.key in verdicts and verdicts[s.key].step is not None)

    def current() -> Iterator[Solution]:
        return (s for s in located() if is_of(s, verdicts[s.key].solution))

    counted = Counter(is_of(s, verdicts[s.key].solution) for s in located())
    if counted[False]:
        logger.warning(
            f"{counted[False]} verdicts in {runner.run.path} belong to solutions that `collect` has replaced since, "
            "and are left out. Run `stepdpo localize` again."
        )
    solutions = SelectedSolutions(counted[True], current)

    def task(solution: Solution) -> Task[tuple[Solution, dict[str, Any]]]:
        step = verdicts[solution.key].step
        assert step is not None
        found: list[dict[str, Any]] = []
        tried = dropped = 0
        steps = split_steps(solution.text, solution.style)
        if not 1 <= step <= len(steps):
            raise RunError(
                f"The verdict of {solution.key!r} in {runner.run.path / f'verdicts.{found_in}.jsonl'} is step {step}, "
                f"but the solution has {len(steps)} steps. Remove its line and run `stepdpo localize` again."
            )
        seen = {normalize(steps.step(step))}
        while len(found) < num_corrections and tried < max_attempts:
            numbers = range(tried, min(max_attempts, max(1, 2 * tried)))
            sampled = yield from policy.sample(solution.problem, steps.prefix(step), numbers)
            tried += len(sampled)
            for continuation in sampled:
                corrected = _preferred_step(continuation, steps, step)
                if len(found) == num_corrections or corrected is None or normalize(corrected) in seen:
                    continue
                seen.add(normalize(corrected))
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
        digest = text_digest(solution.text)
        return solution, {"step": step, "samples": tried, "dropped": dropped, "found": found, "solution": digest}

    counts: Counter[str] = Counter()
    tasks = runner.results(map(task, solutions), len(solutions), "solutions", counts)
    with ResultWriter(log) as writer, closing(tasks) as results:
        for solution, record in results:
            writer.add(solution.key, record)
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


def current_corrections(run: RunDirectory, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Read the corrections that belong to the current verdicts of a run.

    A verdict may change when `localize` is run again with more rollouts. Corrections of another step are ignored.

    Args:
        run (`RunDirectory`):
            The run.
        name (`str`):
            Set of corrections.

    Yields:
        `tuple[str, dict]`: Key of the solution, and record.
    """
    verdicts = _verdicts_of(run, name)
    for key, record in run.log(f"corrections.{name}").items():
        with reading_correction(run, name, key):
            step, _, _ = record["step"], record["samples"] + record["dropped"], len(record["found"])
        if key not in verdicts or verdicts[key].step == step:
            yield key, record


def reading_correction(run: RunDirectory, name: str, key: str) -> AbstractContextManager[None]:
    """Return a context in which a correction is read; see [`~stepdpo_trl.pipeline.reading.reading`]."""
    path = run.path / f"corrections.{name}.jsonl"
    return reading(f"The correction of {key!r}", path, "Remove its line and run `stepdpo rectify` again.")


def count_outdated(run: RunDirectory, name: str) -> int:
    """
    Count the solutions whose verdict names another step than their correction.

    Args:
        run (`RunDirectory`):
            The run.
        name (`str`):
            Set of corrections.

    Returns:
        `int`: Number of solutions.
    """
    verdicts = _verdicts_of(run, name)
    outdated = 0
    for key, record in run.log(f"corrections.{name}").items():
        with reading_correction(run, name, key):
            outdated += key in verdicts and verdicts[key].step not in (None, record["step"])
    return outdated


def _verdicts_of(run: RunDirectory, corrections: str) -> Mapping[str, Verdict]:
    judge_name = corrections.partition(".by-")[0]
    return read_verdicts(run, judge_name)[1] if judge_name in run.logs("verdicts") else {}
