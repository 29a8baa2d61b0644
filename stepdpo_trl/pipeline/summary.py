"""What a run has given so far, in numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runs.run_directory import RunDirectory
from .collect import read_problems_of, read_solutions
from .localize import agreement
from .policy import why_no_answer


@dataclass
class Summary:
    """
    Counts of a run and its shards.

    Args:
        problems (`int`):
            Problems.
        unsolved (`int`):
            Problems without a right solution.
        outcomes (`Counter[str]`):
            Solutions by outcome.
        unreadable (`Counter[str]`):
            Why solutions could not be read.
        verdicts (`dict[str, Counter[str]]`):
            For each judge: `"located"`, and why not.
        places (`dict[str, Counter[int]]`):
            For each judge: first wrong steps by their number.
        agreement (`dict[tuple[str, str], dict[str, int]]`):
            For each two judges: solutions on which both speak, and on which they say the same.
        corrections (`dict[str, Counter[str]]`):
            For each set of corrections: solutions, rectified ones, pairs, samples, pairs that a judge dropped.
        usage (`dict[str, Counter[str]]`):
            For each model: calls, prompt tokens, tokens.
        settings (`dict[str, Any]`):
            What each stage was run with.
    """

    problems: int = 0
    unsolved: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    verdicts: dict[str, Counter[str]] = field(default_factory=dict)
    places: dict[str, Counter[int]] = field(default_factory=dict)
    agreement: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    corrections: dict[str, Counter[str]] = field(default_factory=dict)
    usage: dict[str, Counter[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def summarize(paths: Sequence[Path]) -> Summary:
    """Count what stands in the folders of a run."""
    summary = Summary()
    for path in paths:
        with RunDirectory(path) as run:
            _add(summary, run)
    return summary


def _add(summary: Summary, run: RunDirectory) -> None:
    summary.settings.update(run.settings())
    summary.problems += len(read_problems_of(run))
    solved, tried = set(), set()
    checks = {key.partition("/")[2]: record for key, record in run.log("checks").items()}
    for solution in read_solutions(run):
        summary.outcomes[solution.outcome] += 1
        tried.add(solution.problem.id)
        if solution.outcome == "right":
            solved.add(solution.problem.id)
        if solution.outcome == "unreadable":
            reason = why_no_answer(solution.finish_reason, solution.text)
            summary.unreadable[reason or checks.get(solution.key, {}).get("reason", "not recorded")] += 1
    summary.unsolved += len(tried - solved)
    for judge_name, log in run.logs("verdicts").items():
        counts = summary.verdicts.setdefault(judge_name, Counter())
        places = summary.places.setdefault(judge_name, Counter())
        for record in log.values():
            counts["located" if record["step"] else _reason(record)] += 1
            if record["step"]:
                places[record["step"]] += 1
    for pair, both in agreement(run).items():
        summary.agreement.setdefault(pair, Counter()).update(both)
    for judge_name, log in run.logs("corrections").items():
        counts = summary.corrections.setdefault(judge_name, Counter())
        for record in log.values():
            found = len(record["found"])
            counts.update(solutions=1, rectified=found > 0, pairs=found)
            counts.update(samples=record["samples"], dropped=record["dropped"])
    for name, log in run.logs("generations").items():
        usage = summary.usage.setdefault(name, Counter())
        for record in log.values():
            usage.update(calls=1, prompt_tokens=record["prompt_tokens"], tokens=record["tokens"])


def _reason(record: dict[str, Any]) -> str:
    """Why there is no verdict: of the judge that was asked last."""
    evidence = record["evidence"]
    named = [value for value in evidence.values() if isinstance(value, dict) and "step" in value]
    last = named[-1] if named else evidence
    return str(last.get("reason", "the judges name different steps"))


def rows_of(summary: Summary) -> list[tuple[str, str, int]]:
    """The counts as a table: stage, what, how many."""
    rows = [("collect", "problems", summary.problems), ("collect", "without a right solution", summary.unsolved)]
    rows += [("collect", f"solutions, {outcome}", count) for outcome, count in summary.outcomes.items()]
    rows += [("collect", f"unreadable: {reason}", count) for reason, count in summary.unreadable.most_common()]
    for judge_name, counts in summary.verdicts.items():
        rows += [(f"localize {judge_name}", what, count) for what, count in counts.most_common()]
    for judge_name, counts in summary.corrections.items():
        rows += [(f"rectify {judge_name}", what, count) for what, count in counts.items()]
    for name, usage in summary.usage.items():
        rows += [(f"model {name}", what.replace("_", " "), count) for what, count in usage.items()]
    return rows
