"""Write the report of the experiments: tables with means and intervals, and figures."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiment_parts import compact, markdown
from joined import KINDS
from training import ARMS

from stepdpo_trl.runs.log import Log

METHODS = ("SFT", "DPO", "DPOTrainer on steps", "Step-DPO", "Step-DPO, other model's steps")
LOCALIZERS = {"arithmetic": "Step-DPO", "rollout": "Step-DPO, rollout", "random": "Step-DPO, random step"}
STAGED = ("Step-DPO", "sDPO", "sDPO, reversed", "sDPO, random split", "sDPO, stage 2 from S")
HOW = ("greedy", "sampled")


def best_settings(log: Log, arm: str) -> tuple[float, float]:
    """Return the learning rate and beta with the highest validation accuracy, or the lowest of them if tied."""
    return max(trials(log, ARMS[arm].tuned_as or arm), key=lambda trial: trial[1])[0]


def trials(log: Log, arm: str) -> list[tuple[tuple[float, float], float]]:
    """Return the settings of an arm in ascending order, with the validation accuracy averaged over seeds."""
    found: dict[tuple[float, float], list[float]] = {}
    for key in log:
        kind, *names = key.split("/")
        if kind == "tune" and names[0] == arm:
            solved = log[key]["result"]["greedy"]["solved"]
            found.setdefault((float(names[1]), float(names[2])), []).append(float(np.mean(solved)))
    return sorted((settings, float(np.mean(shares))) for settings, shares in found.items())


def results_of(log: Log, arm: str) -> list[dict[str, Any]]:
    """Return the test results of each seed of an arm with its best settings."""
    if arm == "before":
        return [log["test/before"]["result"]]
    rate, beta = best_settings(log, arm)
    return [log[key]["result"] for key in sorted(log) if key.startswith(f"test/{arm}/{rate:g}/{beta:g}/")]


def solved(results: Iterable[dict[str, Any]], how: str) -> np.ndarray:
    """Return whether each problem was solved, as an array of shape `(seeds, problems)`."""
    return np.array([result[how]["solved"] for result in results], dtype=float)


def mean_and_half(table: np.ndarray) -> tuple[float, float]:
    """
    Return the mean of an array of shape `(seeds, problems)` and the half-width of its 95% interval, in percent.

    Both seeds and problems are random samples, so the variance is the sum of the variances over seeds and over
    problems.
    """
    squared = sum(np.var(means, ddof=1) / len(means) for means in (table.mean(0), table.mean(1)) if len(means) > 1)
    return 100 * float(table.mean()), 196 * math.sqrt(squared)


def percent(table: np.ndarray, signed: bool = False) -> str:
    """Format the mean and half-width of the interval, such as "81.2 +- 1.4"."""
    mean, half = mean_and_half(table)
    return f"{mean:{'+' if signed else ''}.1f} +- {half:.1f}"


def comparison(log: Log, arms: Sequence[str], against: str) -> str:
    """Format a table of accuracies and paired differences from the arm `against`."""
    rows = []
    base = {how: solved(results_of(log, against), how) for how in HOW}
    for arm in arms:
        results = results_of(log, arm)
        tables = {how: solved(results, how) for how in HOW}
        row = [arm, *(percent(tables[how]) for how in HOW)]
        row += ["" if arm == against else percent(tables[how] - base[how], signed=True) for how in HOW]
        unanswered = np.mean([result["sampled"]["no answer"] for result in results]) / len(tables["sampled"][0])
        rows.append([*row, f"{unanswered:.1%}", "" if arm == "before" else settings_of(log, arm)])
    head = ["", "greedy, %", "sampled, %", f"minus {against}, greedy", "sampled", "no final answer", "settings"]
    return markdown(head, rows)


def settings_of(log: Log, arm: str) -> str:
    """Format the learning rate and beta of an arm."""
    rate, beta = best_settings(log, arm)
    return f"{rate:g}" + (f", beta {beta:g}" if beta else "")


def localizers(log: Log) -> str:
    """Format a table of the verdicts, pairs and resulting accuracy of each judge."""
    facts = log["facts"]["result"]
    rows = []
    for source, arm in LOCALIZERS.items():
        fact, results = facts[source], results_of(log, arm)
        rows.append(
            [
                source if source != "random" else "random step",
                f"{fact['named right'] / max(fact['named'], 1):.1%} of {fact['named']}",
                fact["pairs"],
                f"{fact['samples to rectify'] / max(fact['pairs'], 1):.1f}",
                *(percent(solved(results, how)) for how in HOW),
            ]
        )
    head = ["judge of the first wrong step", "right", "pairs", "samples per pair", "greedy, %", "sampled, %"]
    return markdown(head, rows)


def credit(log: Log) -> str:
    """Format a table of the margin growth on held-out pairs, within the step and after it."""
    rows = []
    for arm in ("DPO", "Step-DPO"):
        found = [result["margins"] for result in results_of(log, arm)]
        step, whole = (np.mean([margins[name] for margins in found]) for name in ("step", "whole"))
        rows.append([arm, f"{step:+.2f}", f"{whole - step:+.2f}"])
    return markdown(["growth of log p(chosen) - log p(rejected), nats", "in the step", "after the step"], rows)


def stages(log: Log) -> str:
    """Format a table of the mean gamma_ref of the second stage's pairs under each model."""
    rows = []
    for arm in STAGED[1:4]:
        seen: dict[str, list[float]] = {}
        for result in results_of(log, arm):
            gammas = [entry["sdpo/gamma_ref"] for entry in result["log"] if "sdpo/gamma_ref" in entry]
            ends = {name: entry[name] for entry in result["log"] for name in entry if name.startswith("gamma_")}
            for name, value in (("start", ends["gamma_start"]), ("middle", gammas[1]), ("end", ends["gamma_end"])):
                seen.setdefault(name, []).append(value)
        rows.append([arm, *(f"{np.mean(seen[name]):+.2f}" for name in ("start", "middle", "end"))])
    return markdown(["mean gamma_ref of the second stage's pairs under", "S", "M_1", "M_2, trained on them"], rows)


def loop(log: Log) -> str:
    """Format a table of the accuracy after each stage of the loop."""
    rows = []
    for kind in KINDS:
        runs = [log[key]["result"] for key in sorted(log) if key.startswith(f"loop/{kind}/")]
        row = [percent(solved([run[stage] for run in runs], "greedy")) for stage in range(len(runs[0]))]
        rows.append([kind, percent(solved(results_of(log, "before"), "greedy")), *row])
    return markdown(["greedy, %, after stage", "0", *(str(n) for n in range(1, len(rows[0]) - 1))], rows)


def tuning(log: Log) -> str:
    """Format a table of all tuning trials."""
    rows = []
    for arm in (arm for arm in ARMS if not ARMS[arm].tuned_as):
        found = trials(log, arm)
        cells = [f"{rate:g}{f', beta {beta:g}' if beta else ''}: {100 * share:.1f}" for (rate, beta), share in found]
        rows.append([arm, "; ".join(cells)])
    return markdown(["", "greedy accuracy on validation problems, %"], rows)


def used(log: Log) -> dict[str, Any]:
    """Return the results behind the tables. Solved problems are encoded as strings of 0 and 1."""
    tests = {arm: results_of(log, arm) for arm in ("before", *ARMS)}
    others = {key: log[key]["result"] for key in log if key.split("/")[0] in ("facts", "tune", "loop")}
    return compact({"test": tests, **others})


def write_report(log: Log, out: Path) -> str:
    """Write tables, results and figures, and return the tables with a summary."""
    from pictures import draw

    parts = {
        "Methods": comparison(log, ("before", *METHODS), "DPO"),
        "Credit": credit(log),
        "Localization": localizers(log),
        "sDPO": comparison(log, STAGED, "Step-DPO"),
        "References": stages(log),
        "Loop": loop(log),
        "Tuning": tuning(log),
    }
    text = "\n".join(f"## {title}\n\n{table}\n" for title, table in parts.items())
    (out / "tables.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(used(log)))
    draw(log, out)
    minutes = log["minutes"]["result"]
    return f"{text}\nThe experiments took {minutes:.0f} minutes. Tables, figures and all runs are in {str(out)!r}."
