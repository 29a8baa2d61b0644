"""Outcomes of evaluations, and paired comparisons of methods over seeds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepdpo_trl.data.answers import RIGHT, UNREADABLE
from stepdpo_trl.evaluation.statistics import Interval, bootstrap, clustered, mcnemar
from stepdpo_trl.generation.protocol import token_count
from stepdpo_trl.runs.log import Log, RunError

DECODING = ("greedy", "sampled")  # the evaluations of a model on the test problems


@dataclass(frozen=True)
class Outcomes:
    """
    Outcomes of one evaluation with one solution per problem.

    Args:
        solved (`list[int]`):
            1 for each solved problem, otherwise 0.
        unreadable (`int`):
            Number of solutions without a final answer.
        cut (`int`):
            Number of solutions that reached the maximum number of tokens.
        tokens (`float`):
            Mean number of tokens of a solution.
    """

    solved: list[int]
    unreadable: int
    cut: int
    tokens: float


def read_records(folder: Path) -> list[dict[str, Any]]:
    """
    Read the solutions of an evaluation of one model.

    Args:
        folder (`Path`):
            Output folder of `stepdpo eval`.

    Returns:
        `list[dict]`: `id`, `problem`, `gold`, and `outcome`, `answer` and `text` of the solution of each problem.
    """
    records = []
    with (folder / "records.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            (answers,) = row.pop("models").values()
            records.append({**row, **answers["samples"][0]})
    return records


def read_outcomes(folder: Path) -> Outcomes:
    """
    Read the outcomes of an evaluation of one model.

    Args:
        folder (`Path`):
            Output folder of `stepdpo eval`.

    Returns:
        [`Outcomes`]: The outcomes, in the order of the problems.
    """
    outcomes = [record["outcome"] for record in read_records(folder)]
    (answers,) = (Log(path) for path in folder.glob("answers.*.jsonl"))
    replies = list(answers.values())
    return Outcomes(
        solved=[int(outcome == RIGHT) for outcome in outcomes],
        unreadable=outcomes.count(UNREADABLE),
        cut=sum(reply["finish_reason"] == "length" for reply in replies),
        tokens=float(np.mean([token_count(reply["tokens"]) for reply in replies])),
    )


def accuracy_of(folder: Path) -> float:
    """Return the accuracy of an evaluation of one model."""
    return float(json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"][0]["accuracy"])


def shares_of(seeds: Sequence[Outcomes]) -> np.ndarray:
    """Return the share of seeds that solve each problem, of shape `(problems,)`."""
    return np.mean([outcomes.solved for outcomes in seeds], axis=0)


def accuracy(seeds: Sequence[Outcomes]) -> tuple[float, Interval]:
    """
    Average the accuracy of a method over its seeds.

    Args:
        seeds (`Sequence[Outcomes]`):
            Outcomes of each seed.

    Returns:
        `tuple[float, tuple[float, float]]`: The accuracy, and its 95% interval over problems.
    """
    shares = shares_of(seeds)
    return float(shares.mean()), clustered(shares.tolist(), len(seeds))


@dataclass(frozen=True)
class Difference:
    """
    Difference between two methods on the same problems.

    Args:
        value (`float`):
            Accuracy of the first minus that of the second, averaged over seeds.
        interval (`tuple[float, float]` or `None`):
            95% paired bootstrap interval over problems. `None` if the difference is the same on each problem.
        p (`list[float]`):
            McNemar's exact test, for each pair of seeds.
    """

    value: float
    interval: Interval | None
    p: list[float]


def difference(first: Sequence[Outcomes], second: Sequence[Outcomes]) -> Difference:
    """
    Compare two methods. The seeds are paired in order, and a single one is paired with each of the other method.

    Args:
        first (`Sequence[Outcomes]`):
            Outcomes of each seed of the first method.
        second (`Sequence[Outcomes]`):
            Outcomes of each seed of the second method.

    Returns:
        [`Difference`]: The difference.

    Raises:
        RunError: If the methods were evaluated on different numbers of problems.
    """
    if len(first[0].solved) != len(second[0].solved):
        raise RunError(
            f"The evaluations have {len(first[0].solved)} and {len(second[0].solved)} problems. Remove the folder "
            "that does not belong to this comparison."
        )
    count = min(len(first), len(second))
    one, two = (list(seeds if count == 1 else seeds[:count]) for seeds in (first, second))
    pairs = [(one[i % len(one)], two[i % len(two)]) for i in range(max(len(one), len(two)))]
    differences = (shares_of(first) - shares_of(second)).tolist()
    tests = []
    for a, b in pairs:
        solved = list(zip(a.solved, b.solved, strict=True))
        tests.append(mcnemar(solved.count((1, 0)), solved.count((0, 1))))
    return Difference(float(np.mean(differences)), bootstrap(differences), tests)
