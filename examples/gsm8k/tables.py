"""The tables, the picture and the results file of the comparison."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiment_parts import STYLE, compact, draw_bars, markdown
from plan import BASE, STEP, TITLES
from scores import DECODING, Difference, Outcomes, accuracy, difference

from stepdpo_trl.data.files import replacing, write_atomically


@dataclass
class Result:
    """
    Results of a method.

    Args:
        outcomes (`dict[str, list[Outcomes]]`):
            Outcomes of each seed, by the name of the decoding.
        rows (`int`, *optional*):
            Number of rows of its training data.
        tokens (`float`, *optional*, defaults to `0`), data_minutes (`float`, *optional*, defaults to `0`):
            Cost of its training data: sampled tokens, and time.
        training_minutes (`float`, *optional*, defaults to `0`):
            Time of a training, averaged over seeds.
        learning_rate (`float`, *optional*), beta (`float`, *optional*):
            Tuned settings.
        trials (`list[tuple[float, float, float]]`, *optional*):
            Learning rate, beta and accuracy on the tuning problems of each trial.
    """

    outcomes: dict[str, list[Outcomes]]
    rows: int | None = None
    tokens: float = 0.0
    data_minutes: float = 0.0
    training_minutes: float = 0.0
    learning_rate: float | None = None
    beta: float | None = None
    trials: list[tuple[float, float, float]] = field(default_factory=list)


Results = Mapping[str, Result]


def percent(value: float, interval: tuple[float, float] | None, signed: bool = False) -> str:
    """Format a share and its interval in percent, such as "31.2 (28.8 to 33.8)"."""
    sign = "+" if signed else ""
    bounds = "" if interval is None else f" ({100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f})"
    return f"{100 * value:{sign}.1f}{bounds}"


def p_values(found: Difference) -> str:
    """Format the p-values of all seeds."""
    return ", ".join(f"{p:.2g}" for p in found.p)


def accuracies(results: Results) -> str:
    """Format a table of accuracies, and of the differences from the initial model."""
    rows = []
    for name, result in results.items():
        cells = [TITLES[name]]
        for decoding in DECODING:
            seeds = result.outcomes[decoding]
            cells.append(percent(*accuracy(seeds)))
            if name == BASE:
                cells += ["", ""]
            else:
                found = difference(seeds, results[BASE].outcomes[decoding])
                cells += [percent(found.value, found.interval, signed=True), p_values(found)]
        rows.append([*cells, "" if name == BASE else len(result.outcomes["greedy"])])
    head = ["", "greedy, %", "minus before", "p", "sampled, %", "minus before", "p", "seeds"]
    return markdown(head, rows)


def differences(results: Results) -> str:
    """Format a table of the differences between Step-DPO and each other method."""
    rows = []
    for name, result in results.items():
        if name not in (BASE, STEP) and STEP in results:
            cells = [TITLES[name]]
            for decoding in DECODING:
                found = difference(results[STEP].outcomes[decoding], result.outcomes[decoding])
                cells += [percent(found.value, found.interval, signed=True), p_values(found)]
            rows.append(cells)
    return markdown(["Step-DPO minus", "greedy, points", "p", "sampled, points", "p"], rows)


def costs(results: Results) -> str:
    """Format a table of training data, costs and tuned settings."""
    rows = []
    for name, result in results.items():
        if name != BASE:
            settings = "" if result.learning_rate is None else f"{result.learning_rate:g}"
            settings += f", {result.beta:g}" if result.beta else ""
            cost = [f"{result.tokens:,.0f}", f"{result.data_minutes:,.0f}", f"{result.training_minutes:,.1f}"]
            rows.append([TITLES[name], result.rows, *cost, settings])
    head = ["", "rows", "sampled tokens", "minutes of sampling", "minutes of training", "learning rate, beta"]
    return markdown(head, rows)


def solutions(results: Results) -> str:
    """Format a table of the form of the solutions, averaged over seeds."""
    rows = []
    for name, result in results.items():
        cells = [TITLES[name]]
        for decoding in DECODING:
            seeds = result.outcomes[decoding]
            for values, form in (
                ([outcomes.unreadable for outcomes in seeds], ".1f"),
                ([outcomes.cut for outcomes in seeds], ".1f"),
                ([outcomes.tokens for outcomes in seeds], ".0f"),
            ):
                cells.append(format(math.fsum(values) / len(values), form))
        rows.append(cells)
    head = [f"{what}, {decoding}" for decoding in DECODING for what in ("unreadable", "cut", "mean tokens")]
    return markdown(["", *head], rows)


def tuning(results: Results) -> str:
    """Format a table of all tuning trials."""
    rows = []
    for name, result in results.items():
        if result.trials:
            cells = [f"{r:g}{f', {b:g}' if b else ''}: {100 * share:.1f}" for r, b, share in result.trials]
            rows.append([TITLES[name], "; ".join(cells)])
    return markdown(["", "learning rate, beta: greedy accuracy on the tuning problems, %"], rows)


def draw(results: Results, file: Path) -> None:
    """Draw the greedy accuracy of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    bars = []
    for name, result in results.items():
        value, (low, high) = accuracy(result.outcomes["greedy"])
        bars.append((TITLES[name], 100 * value, (100 * low, 100 * high)))
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.36 * len(bars)))
    draw_bars(axis, bars, TITLES[STEP])
    axis.set_xlim(0, min(109, 1.2 * max(high for *_, (_, high) in bars) + 5))
    axis.set_xlabel("test problems solved, greedy, % (95% intervals over problems)")
    with replacing(file) as partial:
        figure.savefig(partial, format="png", bbox_inches="tight", facecolor="white")
    plt.close(figure)


def write_tables(results: Results, facts: Mapping[str, Any], folder: Path) -> str:
    """
    Write the tables, the picture and the results behind them.

    Args:
        results (`Mapping[str, Result]`):
            Results of each method, with the initial model first.
        facts (`Mapping[str, Any]`):
            Settings and versions, for the file of results.
        folder (`Path`):
            Folder of the files.

    Returns:
        `str`: The tables.
    """
    parts = {
        "Accuracy": accuracies(results),
        "Differences": differences(results),
        "Costs": costs(results),
        "Solutions": solutions(results),
        "Tuning": tuning(results),
    }
    text = "\n".join(f"## {title}\n\n{table}\n" for title, table in parts.items())
    folder.mkdir(exist_ok=True)
    stored = {**facts, "results": {name: asdict(result) for name, result in results.items()}}
    write_atomically(folder / "results.json", json.dumps(compact(stored), indent=1) + "\n")
    draw(results, folder / "accuracy.png")
    write_atomically(folder / "tables.md", text)
    return text
