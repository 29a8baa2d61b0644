"""Figures of an evaluation, and how they are printed."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..data.answers import RIGHT, UNREADABLE, WRONG
from .majority import ProblemAnswers
from .statistics import Accuracy, bootstrap, clustered, mcnemar, show

OUTCOMES = (RIGHT, WRONG, UNREADABLE)


def measure(model: str, answers: Sequence[ProblemAnswers]) -> dict[str, Any]:
    """
    Count what a model made of the problems.

    Args:
        model (`str`):
            Its name.
        answers (`Sequence[ProblemAnswers]`):
            One for each problem.

    Returns:
        `dict[str, Any]`: Solutions by outcome, why some are unreadable, the mean accuracy with its interval, and with
        several samples the same of the majority.
    """
    samples = len(answers[0].samples)
    checks = [sample.check for each in answers for sample in each.samples]
    shares = [_share(each) for each in answers]
    measured: dict[str, Any] = {
        "model": model,
        "solutions": _outcomes([check.outcome for check in checks]),
        "unreadable": dict(Counter(check.reason for check in checks if check.outcome == UNREADABLE).most_common()),
        "accuracy": math.fsum(shares) / len(shares),
        "interval": clustered(shares, samples),
    }
    if samples > 1:
        outcomes = _outcomes([each.majority.outcome for each in answers])
        majority = Accuracy(outcomes[RIGHT], len(answers))
        measured["majority"] = {"problems": outcomes, "accuracy": majority.value, "interval": majority.interval}
    return measured


def compare(first: Sequence[ProblemAnswers], second: Sequence[ProblemAnswers], seed: int = 0) -> dict[str, Any]:
    """
    Compare two models on the same problems, of which each is its own control.

    Args:
        first (`Sequence[ProblemAnswers]`):
            One for each problem.
        second (`Sequence[ProblemAnswers]`):
            The same of the other model.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict[str, Any]`: Accuracy of the first less that of the second, with its bootstrap interval, and McNemar's
        test on the problems that they solve (with several samples by majority).
    """
    differences = [_share(one) - _share(other) for one, other in zip(first, second, strict=True)]
    solved = Counter(
        (one.majority.outcome == RIGHT, other.majority.outcome == RIGHT)
        for one, other in zip(first, second, strict=True)
    )
    only = {"only_first": solved[True, False], "only_second": solved[False, True]}
    return {
        "accuracy": math.fsum(differences) / len(differences),
        "interval": bootstrap(differences, seed),
        "mcnemar": {"both": solved[True, True], **only, "neither": solved[False, False], "p": mcnemar(**only)},
    }


def _share(answers: ProblemAnswers) -> float:
    return sum(sample.check.outcome == RIGHT for sample in answers.samples) / len(answers.samples)


def _outcomes(found: Sequence[str]) -> dict[str, int]:
    return {outcome: found.count(outcome) for outcome in OUTCOMES}


def table(results: dict[str, Any]) -> str:
    """The figures, to be printed."""
    samples, temperature = results["num_samples"], results["sampling"]["temperature"]
    how = "greedy" if not temperature else f"{samples} samples each at temperature {temperature:g}"
    heads = ("right", "wrong", "unreadable", "accuracy, with 95 % interval")
    rows = []
    for each in results["results"]:
        rows.append((each["model"], each["solutions"], show(each["accuracy"], each["interval"])))
        if "majority" in each:
            majority = each["majority"]
            rows.append(("  majority", majority["problems"], show(majority["accuracy"], majority["interval"])))
    width = max(len(row[0]) for row in rows) + 2
    lines = [f"{results['problems']['count']} problems of {results['problems']['name']}, {how}", ""]
    lines.append(f"{'':<{width}}{heads[0]:>8}{heads[1]:>8}{heads[2]:>12}   {heads[3]}")
    for name, counts, accuracy in rows:
        lines.append(f"{name:<{width}}{counts[RIGHT]:>8}{counts[WRONG]:>8}{counts[UNREADABLE]:>12}   {accuracy}")
    for each in results["results"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in each["unreadable"].items())
        lines += [f"Unreadable, {each['model']}: {reasons}"] if reasons else []
    if "difference" in results:
        lines += ["", *_difference(results)]
    return "\n".join(lines)


def _difference(results: dict[str, Any]) -> list[str]:
    first, second = (each["model"] for each in results["results"])
    difference, test = results["difference"], results["difference"]["mcnemar"]
    interval, accuracy = difference["interval"], 100 * difference["accuracy"]
    bootstrapped = f"{accuracy:+.1f} percentage points (no interval: it is the same on every problem)"
    if interval:
        low, high = interval
        bootstrapped = f"{show(accuracy, (100 * low, 100 * high), '+.1f')} percentage points (paired bootstrap)"
    solved = "solved by majority" if results["num_samples"] > 1 else "solved"
    return [
        f"{first} less {second}: {bootstrapped}",
        f"McNemar's exact test: p = {test['p']:.2g}; {solved} by the first alone {test['only_first']}, by the second "
        f"alone {test['only_second']}, by both {test['both']}, by neither {test['neither']}",
    ]
