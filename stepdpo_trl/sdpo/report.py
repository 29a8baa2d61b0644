"""What happened in the stages of an sDPO run: `sdpo_report.json` and `sdpo_report.png`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.logging import get_logger

from .files import read_scores, scores_file

if TYPE_CHECKING:
    from .training import StagedTraining

logger = get_logger(__name__)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CURVES = {"loss": "loss", "rewards/accuracies": "reward accuracy"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers too


def check_plotting() -> None:
    """Say before training, and not after it, that the picture will be missing."""
    if find_spec("matplotlib") is None:
        logger.warning(
            "matplotlib is not installed: the report will have no picture. Get it with `pip install "
            "'stepdpo_trl[report]'`."
        )


def write_report(trainer: "StagedTraining") -> None:
    """Write the report of a run, or of as much of it as has been trained, into `output_dir`."""
    assert trainer.sdpo is not None
    folder = Path(trainer._output_dir)
    history = trainer.state.log_history
    gammas = {stage.number: _gamma(trainer, stage) for stage in trainer.stages}
    report = {
        **{name: trainer.sdpo.record.get(name) for name in ("schedule", "reference")},
        "stages": [
            {
                "number": stage.number,
                **stage.record(),
                "first_update": stage.first_update,
                "folder": f"stage-{stage.number}",
                "gamma_ref": _summary(gammas[stage.number]),
                "first_batch": {
                    name: _logged(history, f"sdpo/first_batch_{name}", stage.number)
                    for name in ("loss", "margin", "accuracy")
                },
            }
            for stage in trainer.stages
        ],
        "curves": {
            name: [[e["step"], e["sdpo/stage"], e[name]] for e in history if name in e and "sdpo/stage" in e]
            for name in CURVES
        },
    }
    (folder / "sdpo_report.json").write_text(json.dumps(report, indent=2))
    if find_spec("matplotlib") is not None:
        try:
            plot_report(report, gammas, folder / "sdpo_report.png")
        except Exception as error:  # the training is worth more than its picture
            logger.warning(f"The report has no picture: {type(error).__name__}: {error}")
    logger.info(f"Report of the stages: {folder / 'sdpo_report.json'}")


def _gamma(trainer: "StagedTraining", stage: Any) -> np.ndarray:
    assert trainer.sdpo is not None
    if stage.number > len(trainer.sdpo.record["ids"]):  # training ended before
        return np.array([])
    scores = read_scores(
        scores_file(trainer._output_dir, stage.number, "train"), trainer._scores_id(stage, stage.dataset)
    )
    return np.array([]) if scores is None else scores[0] - scores[1]


def _summary(gamma: np.ndarray) -> dict[str, Any] | None:
    if not len(gamma):
        return None
    return {
        "rows": len(gamma),
        "mean": float(gamma.mean()),
        "standard_deviation": float(gamma.std()),
        "share_positive": float((gamma > 0).mean()),
        "quantiles": {str(q): float(np.quantile(gamma, q)) for q in QUANTILES},
    }


def _logged(history: list[dict[str, Any]], name: str, stage: int) -> float | None:
    return next((entry[name] for entry in history if name in entry and entry.get("sdpo/stage") == stage), None)


def plot_report(report: dict[str, Any], gammas: dict[int, np.ndarray], file: Path) -> None:
    """
    Plot gamma_ref of each stage's data under its reference (as in figure 2 of sDPO), and the curves of training.

    Args:
        report (`dict`): What `sdpo_report.json` holds.
        gammas (`dict[int, np.ndarray]`): gamma_ref of the rows of each stage, by its number.
        file (`Path`): The picture.
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
        label = label.replace("$", r"\$")  # which would begin a formula
        if len(gamma):
            label += f" (mean {gamma.mean():.1f})"
            weights = np.full(len(gamma), 1 / len(gamma))
            axes[0].hist(gamma, bins, weights=weights, histtype="stepfilled", alpha=0.4, color=color, label=label)
            axes[0].axvline(gamma.mean(), color=color)
    axes[0].set(title="gamma_ref under the stage's reference", xlabel="gamma_ref (nats)", ylabel="share of rows")
    if len(values):
        axes[0].legend(title="stage", fontsize="small")
    for axis, (name, title) in zip(axes[1:], CURVES.items(), strict=True):
        for stage in report["stages"]:
            color = COLORS[(stage["number"] - 1) % len(COLORS)]
            points = [(update, value) for update, number, value in report["curves"][name] if number == stage["number"]]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), color=color, marker=".", markersize=3)
            if stage["number"] > 1:
                axis.axvline(stage["first_update"], color="0.5", linestyle="--", linewidth=1)
        axis.set(title=f"{title} (dashed: swap)", xlabel="global_step")
    figure.savefig(file, dpi=150)
