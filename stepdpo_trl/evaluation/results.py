"""Counts, accuracies and comparisons of an evaluation, and the table that is printed."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..data.answers import RIGHT, UNREADABLE, WRONG, cause_of
from .majority import ProblemAnswers
from .statistics import Accuracy, bootstrap, clustered, mcnemar, show

OUTCOMES = (RIGHT, WRONG, UNREADABLE)
NAME_WIDTH = 26  # columns of a name in the table, which then has 80


@dataclass
class Tally:
    """
    Outcomes of a model, without the texts of its answers.

    Args:
        outcomes (`Counter[str]`):
            Number of solutions per outcome.
        reasons (`Counter[str]`):
            Number of unreadable solutions per reason.
        shares (`list[float]`):
            Share of right solutions of each problem.
        majority (`list[str]`):
            Outcome of the majority vote on each problem. Empty if their checker finds no answers.
        varied (`bool`):
            Whether the samples of a problem have different texts.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    shares: list[float] = field(default_factory=list)
    majority: list[str] = field(default_factory=list)
    varied: bool = False

    def add(self, answers: ProblemAnswers) -> None:
        """Add the answers to the next problem."""
        checks = [sample.check for sample in answers.samples]
        self.outcomes.update(check.outcome for check in checks)
        self.reasons.update(cause_of(check.reason) for check in checks if check.outcome == UNREADABLE)
        self.shares.append(sum(check.outcome == RIGHT for check in checks) / len(checks))
        if answers.majority is not None:
            self.majority.append(answers.majority.outcome)
        self.varied = self.varied or len({sample.text for sample in answers.samples}) > 1


def measure_accuracy(model: str, answers: Tally, num_samples: int) -> dict[str, Any]:
    """
    Count the outcomes of a model and compute its accuracy.

    Args:
        model (`str`):
            Name of the model.
        answers ([`Tally`]):
            Its outcomes.
        num_samples (`int`):
            Number of solutions per problem.

    Returns:
        `dict[str, Any]`: Number of solutions by outcome, reasons of unreadable ones, and the mean accuracy with its
        95% interval. With several samples per problem also the outcomes and the accuracy of the majority vote.
    """
    shares = answers.shares
    measured: dict[str, Any] = {
        "model": model,
        "solutions": _count_outcomes(answers.outcomes),
        "unreadable": dict(answers.reasons.most_common()),
        "accuracy": math.fsum(shares) / len(shares),
        "interval": clustered(shares, num_samples),
    }
    if num_samples > 1 and answers.majority:
        outcomes = _count_outcomes(Counter(answers.majority))
        majority = Accuracy(outcomes[RIGHT], len(shares))
        measured["majority"] = {"problems": outcomes, "accuracy": majority.value, "interval": majority.interval}
    return measured


def compare(first: Tally, second: Tally, seed: int = 0) -> dict[str, Any]:
    """
    Compare two models on the same problems, paired by problem.

    Args:
        first ([`Tally`]):
            Outcomes of the first model.
        second ([`Tally`]):
            Outcomes of the second model, in the same order.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict[str, Any]`: Accuracy of the first model minus that of the second, its bootstrap interval, and McNemar's
        test on the problems that each model solves (with several samples, by majority vote; not without one).
    """
    differences = [one - other for one, other in zip(first.shares, second.shares, strict=True)]
    solved = Counter(
        (one == RIGHT, other == RIGHT) for one, other in zip(first.majority, second.majority, strict=True)
    )
    difference: dict[str, Any] = {
        "accuracy": math.fsum(differences) / len(differences),
        "interval": bootstrap(differences, seed),
    }
    if solved:
        discordant = {"only_first": solved[True, False], "only_second": solved[False, True]}
        both, neither = solved[True, True], solved[False, False]
        difference["mcnemar"] = {"both": both, **discordant, "neither": neither, "p": mcnemar(**discordant)}
    return difference


def _count_outcomes(outcomes: Counter[str]) -> dict[str, int]:
    return {outcome: outcomes[outcome] for outcome in OUTCOMES}


def table(results: dict[str, Any]) -> str:
    """
    Format the results of an evaluation for printing.

    Args:
        results (`dict[str, Any]`):
            The content of `results.json`.

    Returns:
        `str`: A table of all models, followed by their difference if there are two.
    """
    num_samples, temperature = results["num_samples"], results["sampling"]["temperature"]
    decoding = "greedy" if not temperature else f"{num_samples} samples each at temperature {temperature:g}"
    header = ("right", "wrong", "unreadable", "accuracy (95% interval)")
    rows = []
    for measured in results["results"]:
        rows.append((measured["model"], measured["solutions"], show(measured["accuracy"], measured["interval"])))
        if "majority" in measured:
            majority = measured["majority"]
            rows.append(("  majority", majority["problems"], show(majority["accuracy"], majority["interval"])))
    width = min(max(len(name) for name, _, _ in rows) + 2, NAME_WIDTH)
    count = results["problems"]["count"]
    lines = [f"{count} problem{'' if count == 1 else 's'} of {results['problems']['name']}, {decoding}", ""]
    lines.append(f"{'':<{width}}{header[0]:>8}{header[1]:>8}{header[2]:>12}   {header[3]}")
    for name, counts, accuracy in rows:
        if len(name) > width - 2:  # too long to fit into 80 columns beside its figures
            lines.append(name)
            name = ""
        lines.append(f"{name:<{width}}{counts[RIGHT]:>8}{counts[WRONG]:>8}{counts[UNREADABLE]:>12}   {accuracy}")
    for measured in results["results"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in measured["unreadable"].items())
        lines += [f"Unreadable, {measured['model']}: {reasons}"] if reasons else []
    if num_samples > 1 and not any("majority" in measured for measured in results["results"]):
        lines.append(f"No majority vote: the checker {results['checker']!r} returns no answers to vote on.")
    if "difference" in results:
        lines += ["", *_difference(results)]
    return "\n".join(lines)


def _difference(results: dict[str, Any]) -> list[str]:
    first, second = (measured["model"] for measured in results["results"])
    difference, test = results["difference"], results["difference"].get("mcnemar")
    points, interval = 100 * difference["accuracy"], difference["interval"]
    shown = f"{points:+.1f} percentage points (no interval: the same difference on every problem)"
    if interval:
        low, high = interval
        shown = f"{show(points, (100 * low, 100 * high), '+.1f')} percentage points (paired bootstrap)"
    solved = "Solved by majority vote" if results["num_samples"] > 1 else "Solved"
    title = f"{first} minus {second}:"
    lines = [f"{title} {shown}" if len(title) + len(shown) < 80 else f"{title}\n  {shown}"]
    if test is None:
        return lines
    return [
        *lines,
        f"McNemar's exact test: p = {test['p']:.2g}",
        f"{solved}: both {test['both']}, first only {test['only_first']}, second only {test['only_second']}, "
        f"neither {test['neither']}",
    ]
