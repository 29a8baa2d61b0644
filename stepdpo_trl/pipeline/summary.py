"""Counts, costs and settings of a run."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.answers import cause_of
from ..generation.protocol import token_count
from ..runs.log_index import digest
from ..runs.run_directory import RunDirectory
from .build_record import BuildRecord, choose_examples
from .collect import read_problems_of, read_solutions
from .localize import agreement, read_verdicts
from .pairs import make_pairs
from .policy import why_no_answer
from .records import Verdict
from .rectify import current_corrections
from .stage_directory import read_times

# Counts of corrections, in the words of the tables
_CORRECTIONS = {
    "solutions": "solutions to correct",
    "rectified": "corrected",
    "given up": "given up: no right continuation",
    "samples": "samples",
    "dropped": "dropped: preferred step failed the check",
    "pairs": "pairs",
}


@dataclass
class Summary:
    """
    Counts of a run, summed over its shards.

    Args:
        problems (`int`):
            Number of problems.
        unsolved (`int`):
            Number of problems without a right solution.
        outcomes (`Counter[str]`):
            Number of solutions per outcome.
        unreadable (`Counter[str]`):
            Number of unreadable solutions per reason.
        verdicts (`dict[str, Counter[str]]`):
            For each judge expression, the number of solutions with a verdict (`"located"`), and without, per reason.
        places (`dict[str, Counter[int]]`):
            For each judge expression, the number of solutions per first wrong step.
        agreement (`dict[tuple[str, str], Counter[str]]`):
            For each pair of judges, the number of solutions that both have located, and on which they agree.
        corrections (`dict[str, Counter[str]]`):
            For each set of corrections, the number of solutions, of corrected ones (`"rectified"`), of uncorrected
            ones (`"given up"`), pairs, samples, and preferred steps dropped by a judge.
        usage (`dict[str, Counter[str]]`):
            For each model, the number of requests, prompt tokens and sampled tokens, and of answers whose tokens the
            server has not reported (`"uncounted"`).
        stages (`dict[str, Counter[str]]`):
            The same for each pipeline stage.
        seconds (`dict[str, float]`):
            For each pipeline stage, the time in seconds, over all resumes.
        examples (`list[dict[str, str]]`):
            Example pairs.
        settings (`dict[str, Any]`):
            Settings of each pipeline stage.
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
    stages: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def summarize(paths: Sequence[Path], examples: bool = True) -> Summary:
    """
    Count the records of a run.

    Args:
        paths (`Sequence[Path]`):
            Folders of the run, as returned by [`~stepdpo_trl.pipeline.build.run_directories`].
        examples (`bool`, *optional*, defaults to `True`):
            Whether to choose example pairs. The record of a build has them already.

    Returns:
        [`Summary`]: The counts.
    """
    summary = Summary()
    for path in paths:
        with RunDirectory(path) as run:
            _add(summary, run)
            if examples and summary.corrections and not summary.examples:
                summary.examples = choose_examples(make_pairs(run, next(iter(summary.corrections))))
    return summary


def _add(summary: Summary, run: RunDirectory) -> None:
    # The address of a server and the folder of a checker are nothing to publish
    settings = run.settings().items()
    summary.settings.update((name, stage) for name, stage in settings if name not in ("server", "checker"))
    summary.problems += len(read_problems_of(run))
    problems, solved = bytearray(), bytearray()  # digests of their ids
    checks = run.log("checks")
    for solution in read_solutions(run):
        outcome, problem = solution.outcome, digest(solution.problem.id.encode())
        summary.outcomes[outcome] += 1
        problems += problem
        solved += problem if outcome == "right" else b""
        if outcome == "unreadable":
            reason = why_no_answer(solution.finish_reason, solution.text)
            summary.unreadable[reason or cause_of(checks.get(f"policy/{solution.key}", {}).get("reason"))] += 1
    summary.unsolved += _count_distinct(problems) - _count_distinct(solved)
    for judge_name in run.logs("verdicts"):
        counts = summary.verdicts.setdefault(judge_name, Counter(located=0))
        places = summary.places.setdefault(judge_name, Counter())
        for verdict in read_verdicts(run, judge_name)[1].values():
            counts["located" if verdict.step else _reason(verdict)] += 1
            if verdict.step:
                places[verdict.step] += 1
    for pair, both in agreement(run).items():
        summary.agreement.setdefault(pair, Counter()).update(both)
    for corrections in run.logs("corrections"):
        counts = summary.corrections.setdefault(corrections, Counter(dict.fromkeys(_CORRECTIONS, 0)))
        for _, record in current_corrections(run, corrections):
            found = len(record["found"])
            counts.update({"solutions": 1, "rectified": found > 0, "given up": found == 0, "pairs": found})
            counts.update(samples=record["samples"], dropped=record["dropped"])
    _add_costs(summary, run)


def _count_distinct(digests: bytearray) -> int:
    import numpy as np

    return len(np.unique(np.frombuffer(digests, np.uint64)))


def _add_costs(summary: Summary, run: RunDirectory) -> None:
    for model, log in run.logs("generations").items():
        usage = summary.usage.setdefault(model, Counter())
        for record in log.values():
            stage = summary.stages.setdefault(_stage_of(record), Counter())
            read, sampled = (token_count(record[name]) for name in ("prompt_tokens", "tokens"))
            uncounted = record["finish_reason"] != "refused" and (not read or (not sampled and record["text"] != ""))
            for counts in (usage, stage):
                counts.update(requests=1, prompt_tokens=read, tokens=sampled, uncounted=uncounted)
    for name, seconds in read_times(run.path).items():
        summary.seconds[name] = summary.seconds.get(name, 0.0) + seconds


def _stage_of(record: dict[str, Any]) -> str:
    """Return the pipeline stage that requested an answer. Records name `collect` with its number of samples."""
    stage = str(record.get("stage", "unknown"))
    return "collect" if stage.startswith("collect ") else stage


def _reason(verdict: Verdict) -> str:
    """Return why the last judge of an expression abstained."""
    evidence = verdict.evidence
    named = [value for value in evidence.values() if isinstance(value, dict) and "step" in value]
    last = named[-1] if named else evidence
    return str(last.get("reason", "the judges name different steps"))


def _counts(summary: Summary, build: BuildRecord | None) -> list[tuple[str, list[tuple[str, int]]]]:
    """Return the counts of each pipeline stage, in order."""
    rows = [("problems", summary.problems), ("problems without a right solution", summary.unsolved)]
    rows += [(f"solutions, {outcome}", count) for outcome, count in summary.outcomes.items()]
    rows += [(f"unreadable: {reason}", count) for reason, count in summary.unreadable.most_common()]
    stages = [("collect", rows)]
    for judge_name, counts in summary.verdicts.items():
        located = [("located", counts["located"])]
        reasons = [(f"dropped: {why}", count) for why, count in counts.most_common() if why != "located"]
        stages.append((f"localize {judge_name}", located + reasons))
    for corrections, counts in summary.corrections.items():
        title = f"rectify {corrections.replace('.by-', ' by ')}"
        stages.append((title, [(words, counts[name]) for name, words in _CORRECTIONS.items()]))
    if build is not None:
        dropped = [(f"dropped: {why}", count) for why, count in build.left_out.items()]
        stages.append(("build", [*dropped, ("pairs", build.pairs)]))
    return stages


def rows_of(summary: Summary, build: BuildRecord | None = None) -> list[tuple[str, str, int]]:
    """
    List the counts of a run.

    Args:
        summary ([`Summary`]):
            The counts.
        build ([`BuildRecord`], *optional*):
            The last build.

    Returns:
        `list[tuple[str, str, int]]`: Pipeline stage, name of the count, and count.
    """
    return [(stage, what, count) for stage, rows in _counts(summary, build) for what, count in rows]


def costs_of(summary: Summary) -> list[tuple[str, int, int, int, float | None]]:
    """
    List the costs of each pipeline stage, and their sum.

    Args:
        summary ([`Summary`]):
            The counts.

    Returns:
        `list[tuple]`: Pipeline stage, requests, prompt tokens, sampled tokens, and minutes (`None` if not recorded).
    """
    names = dict.fromkeys([stage for stage, _ in _counts(summary, None)] + [*summary.stages, *summary.seconds])
    rows: list[tuple[str, int, int, int, float | None]] = []
    for name in names:
        counts = summary.stages.get(name, Counter())
        minutes = summary.seconds[name] / 60 if name in summary.seconds else None
        rows.append((name, counts["requests"], counts["prompt_tokens"], counts["tokens"], minutes))
    total = sum(summary.stages.values(), Counter())
    minutes = sum(summary.seconds.values()) / 60 if summary.seconds else None
    return [*rows, ("total", total["requests"], total["prompt_tokens"], total["tokens"], minutes)]


def uncounted(summary: Summary) -> str:
    """Return a sentence about answers whose tokens are unknown, or `""` if there are none."""
    total = sum(summary.stages.values(), Counter())
    if not total["uncounted"]:
        return ""
    return (
        f"The tokens are incomplete: for {total['uncounted']:,} of {total['requests']:,} requests, the server did not "
        "report them."
    )


def table_of(summary: Summary, build: BuildRecord | None = None, width: int = 80) -> str:
    """
    Format the counts and costs of a run as a table.

    Args:
        summary ([`Summary`]):
            The counts.
        build ([`BuildRecord`], *optional*):
            The last build.
        width (`int`, *optional*, defaults to `80`):
            Maximum width in characters. Long labels are wrapped.

    Returns:
        `str`: The table.
    """
    counts = dict(_counts(summary, build))
    costs = {name: rest for name, *rest in costs_of(summary)}
    rows: list[tuple[str, ...]] = [("", "count", "tokens", "requests", "minutes")]
    for stage in dict.fromkeys([*counts, *costs]):
        requests, _, tokens, minutes = costs.get(stage, (0, 0, 0, None))
        cells = [f"{n:,}" if n else "" for n in (tokens, requests)]
        rows.append((stage, "", *cells, "" if minutes is None else f"{minutes:,.1f}"))
        rows += [(f"  {what}", f"{count:,}", "", "", "") for what, count in counts.get(stage, [])]
    # The total is the last of the costs, but `build` has none and comes before it
    total = next(index for index, row in enumerate(rows) if row[0] == "total")
    rows.append(rows.pop(total))
    note = textwrap.fill(uncounted(summary), width)
    return _format(rows, width) + (f"\n\n{note}" if note else "")


def _format(rows: Iterable[Sequence[str]], width: int) -> str:
    """Align a table whose first column is text and whose other columns are numbers."""
    rows = list(rows)
    numbers = [max(map(len, column)) for column in list(zip(*rows, strict=True))[1:]]
    label = max(16, min(max(len(row[0]) for row in rows), width - sum(numbers) - 2 * len(numbers)))
    lines = []
    for text, *cells in rows:
        indent = " " * (len(text) - len(text.lstrip()))
        parts = textwrap.wrap(text.strip(), label, initial_indent=indent, subsequent_indent=indent + "  ") or [""]
        values = "".join(f"  {cell:>{size}}" for cell, size in zip(cells, numbers, strict=True))
        lines += [*parts[:-1], f"{parts[-1]:<{label}}{values}".rstrip()]
    return "\n".join(lines)
