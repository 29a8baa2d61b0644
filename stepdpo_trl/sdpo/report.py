"""Report of an sDPO run: `sdpo_report.json` and `sdpo_report.png`."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger

from ..data.files import write_atomically
from .files import stage_folder
from .stages import Stage

logger = get_logger(__name__)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CURVES = {"loss": "loss", "rewards/accuracies": "reward accuracy"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe-Ito, safe for color blindness


def warn_without_matplotlib() -> None:
    """Warn, before training, that the report will have no figure if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        logger.warning(
            "matplotlib is not installed, so the report will have no figure. Install it with `pip install "
            "'stepdpo_trl[report]'`."
        )


def write_stage_report(
    folder: str | Path,
    stages: Sequence[Stage],
    record: Mapping[str, Any],
    history: list[dict[str, Any]],
    gammas: Mapping[int, np.ndarray],
) -> None:
    """
    Write `sdpo_report.json` and, if matplotlib is installed, `sdpo_report.png`.

    Args:
        folder (`str` or `Path`):
            Folder to write to, the `output_dir` of the run.
        stages (`list[Stage]`):
            All stages. Those that have not been trained have no gamma_ref and no first batch in the report.
        record (`dict[str, Any]`):
            Record of the run, with `schedule` and `reference`.
        history (`list[dict[str, Any]]`):
            `log_history` of the trainer state.
        gammas (`dict[int, np.ndarray]`):
            gamma_ref of the rows of each stage, by its number, each of shape `(rows,)`, in nats. Empty if unknown.
    """
    folder = Path(folder)
    report = {
        **{name: record.get(name) for name in ("schedule", "reference")},
        "stages": [
            {
                "number": stage.number,
                **stage.record(),
                "first_update": stage.first_update,
                "folder": stage_folder(folder, stage.number).name,
                "gamma_ref": _summarize(gammas[stage.number]),
                "first_batch": {
                    name: _first_logged(history, f"sdpo/first_batch_{name}", stage.number)
                    for name in ("loss", "margin", "accuracy")
                },
            }
            for stage in stages
        ],
        "curves": {
            name: [[e["step"], e["sdpo/stage"], e[name]] for e in history if name in e and "sdpo/stage" in e]
            for name in CURVES
        },
    }
    write_atomically(folder / "sdpo_report.json", json.dumps(report, indent=2))
    if find_spec("matplotlib") is not None:
        try:
            plot_report(report, gammas, folder / "sdpo_report.png")
        except Exception as error:  # a failing plot must not fail the training
            logger.warning(f"Could not plot the report: {type(error).__name__}: {error}")
    logger.info(f"Wrote the report of the stages to {folder / 'sdpo_report.json'}.")


def _summarize(gamma: np.ndarray) -> dict[str, Any] | None:
    if not len(gamma):
        return None
    return {
        "rows": len(gamma),
        "mean": float(gamma.mean()),
        "standard_deviation": float(gamma.std()),
        "share_positive": float((gamma > 0).mean()),
        "quantiles": {str(q): float(np.quantile(gamma, q)) for q in QUANTILES},
    }


def _first_logged(history: list[dict[str, Any]], name: str, stage: int) -> float | None:
    return next((entry[name] for entry in history if name in entry and entry.get("sdpo/stage") == stage), None)


def plot_report(report: dict[str, Any], gammas: Mapping[int, np.ndarray], file: Path) -> None:
    """
    Plot gamma_ref of each stage under its reference, as in figure 2 of the sDPO paper, and the training curves.

    Args:
        report (`dict[str, Any]`):
            Content of `sdpo_report.json`.
        gammas (`dict[int, np.ndarray]`):
            gamma_ref of the rows of each stage, by its number, each of shape `(rows,)`, in nats.
        file (`Path`):
            Image file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(CURVES))
    values = np.concatenate([*gammas.values()])
    low, high = np.quantile(values, [0.005, 0.995]) if len(values) else (0.0, 1.0)
    bins = np.linspace(low, high, 41).tolist()
    for stage in report["stages"]:
        number, color = stage["number"], COLORS[(stage["number"] - 1) % len(COLORS)]
        gamma = gammas[number]
        label = f"{number}: {stage['name']}" if stage["name"] != str(number) else f"{number}"
        label = label.replace("$", r"\$")  # matplotlib would render a formula
        if len(gamma):
            label += f" (mean {gamma.mean():.1f})"
            weights = np.full(len(gamma), 1 / len(gamma))
            axes[0].hist(gamma, bins, weights=weights, histtype="stepfilled", alpha=0.4, color=color, label=label)
            axes[0].axvline(gamma.mean(), color=color)
    axes[0].set(title="gamma_ref under the stage's reference", xlabel="gamma_ref (nats)", ylabel="fraction of rows")
    if len(values):
        axes[0].legend(title="stage", fontsize="small")
    for axis, (name, title) in zip(axes[1:], CURVES.items(), strict=True):
        for stage in report["stages"]:
            color = COLORS[(stage["number"] - 1) % len(COLORS)]
            points = [(step, value) for step, number, value in report["curves"][name] if number == stage["number"]]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), color=color, marker=".", markersize=3)
            if stage["number"] > 1:
                axis.axvline(stage["first_update"], color="0.5", linestyle="--", linewidth=1)
        axis.set(title=f"{title} (dashed: start of a stage)", xlabel="global_step")
    figure.savefig(file, dpi=150)
