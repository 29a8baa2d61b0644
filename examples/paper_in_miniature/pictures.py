"""Draw the figures of the report."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from experiment_parts import BLUE, GREEN, GREY, ORANGE, STYLE, draw_bars
from joined import KINDS
from report import METHODS, STAGED, mean_and_half, results_of, solved, trials

from stepdpo_trl.runs.log import Log

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(log: Log, out: Path) -> None:
    """Draw all figures and save them to a folder."""
    plt.rcParams.update(STYLE)
    for name, picture in PICTURES:
        figure = picture(log)
        figure.savefig(out / f"{name}.png", bbox_inches="tight", facecolor="white")
        plt.close(figure)


def methods(log: Log) -> Any:
    """Plot the greedy accuracy of each method."""
    figure, axis = plt.subplots(figsize=(7, 2.8))
    bars = []
    for arm in ("before", *METHODS):
        mean, half = mean_and_half(solved(results_of(log, arm), "greedy"))
        bars.append((arm, mean, (mean - half, mean + half)))
    draw_bars(axis, bars, "Step-DPO")
    axis.set_xlim(0, 109)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel("test problems solved, greedy, % (five seeds, 95% intervals)")
    return figure


def tuning(log: Log) -> Any:
    """Plot the validation accuracy over the learning rate, with the better beta for each rate."""
    figure, axis = plt.subplots(figsize=(6, 3))
    colors = {"SFT": GREEN, "DPO": GREY, "DPOTrainer on steps": ORANGE, "Step-DPO": BLUE}
    for arm, color in colors.items():
        best: dict[float, float] = {}
        for (rate, _), share in trials(log, arm):
            best[rate] = max(best.get(rate, 0.0), 100 * share)
        axis.plot(list(best), list(best.values()), marker="o", markersize=4, color=color, label=arm)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("validation problems solved, greedy, %")
    axis.legend(frameon=False)
    return figure


def curves(log: Log) -> Any:
    """Plot reward accuracy and margin on held-out pairs during training, as in figure 2 of Step-DPO."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    for arm, color in (("DPO", GREY), ("Step-DPO", BLUE)):
        runs = [[entry for entry in r["log"] if "eval_rewards/margins" in entry] for r in results_of(log, arm)]
        steps = [entry["step"] for entry in runs[0]]
        for axis, name in zip(axes, ("accuracies", "margins"), strict=True):
            values = np.array([[entry[f"eval_rewards/{name}"] for entry in run] for run in runs])
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
            axis.plot(steps, values.mean(0), color=color, label=arm)
    for axis, title in zip(axes, ("reward accuracy", "reward margin"), strict=True):
        axis.set_title(f"{title} on held-out pairs", loc="left")
        axis.set_xlabel("updates")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    return figure


def stages(log: Log) -> Any:
    """Plot the loss of stage 2 when started from S and from the reference, as in figure 3 of sDPO, and accuracies."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    for arm, color, name in (("sDPO", BLUE, "from M₁, the reference"), (STAGED[-1], ORANGE, "from S")):
        runs = [[entry["loss"] for entry in r["log"] if "loss" in entry] for r in results_of(log, arm)]
        second = np.array([run[len(run) // 2 :] for run in runs])
        left.plot(range(1, second.shape[1] + 1), second.mean(0), color=color, label=name)
    left.axhline(np.log(2), color="#222", linewidth=0.8, linestyle=":")
    left.text(8, np.log(2) + 0.03, "ln 2", ha="right")
    left.set_title("loss in stage 2", loc="left")
    left.set_xlabel("updates")
    left.legend(frameon=False)
    for place, arm in enumerate(reversed(STAGED)):
        mean, half = mean_and_half(solved(results_of(log, arm), "greedy"))
        right.errorbar(mean, place, xerr=half, fmt="o", color=GREY if arm == "Step-DPO" else BLUE, capsize=3)
    right.set_yticks(range(len(STAGED)), reversed(STAGED))
    right.set_title("test problems solved, greedy, %", loc="left")
    figure.tight_layout()
    return figure


def turns(log: Log) -> Any:
    """Plot the accuracy after each stage of the loop, with fresh and with fixed pairs."""
    figure, axis = plt.subplots(figsize=(6, 3))
    first = mean_and_half(solved(results_of(log, "before"), "greedy"))[0]
    for kind, color in zip(KINDS, (GREEN, BLUE, GREY), strict=True):
        runs = [log[key]["result"] for key in sorted(log) if key.startswith(f"loop/{kind}/")]
        found = [mean_and_half(solved([run[stage] for run in runs], "greedy")) for stage in range(len(runs[0]))]
        places = range(len(found) + 1)
        axis.errorbar(
            places, [first, *(m for m, _ in found)], [0, *(h for _, h in found)], color=color, capsize=3, label=kind
        )
    axis.set_xticks(list(places))
    axis.set_xlabel("stage")
    axis.set_ylabel("test problems solved, greedy, %")
    axis.legend(frameon=False)
    return figure


PICTURES = (("methods", methods), ("tuning", tuning), ("curves", curves), ("stages", stages), ("turns", turns))
