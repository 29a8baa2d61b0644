"""Metrics at the start of a stage, with warnings if they are not as sDPO (arXiv 2403.19270) expects."""

import math
from typing import Any

import numpy as np
from accelerate.logging import get_logger

from .stages import Stage

logger = get_logger(__name__)

# Tolerances of margin / beta (in nats) and of the loss at the first batch, by whether training uses 16-bit types
TOLERANCES = {False: (0.01, 0.001), True: (0.5, 0.05)}
# Above both, the reference has probably been trained on the rows. The paper measures a mean gamma_ref of 84 for such a
# reference, and of -25 and -39 for others.
SEEN_ACCURACY, SEEN_GAMMA = 0.95, 20


def gamma_metrics(stage: Stage, gamma: np.ndarray) -> dict[str, float]:
    """
    Return the metrics of gamma_ref, and warn if the reference seems to have been trained on the rows.

    Args:
        stage (`Stage`):
            Stage that starts.
        gamma (`np.ndarray`):
            log π_ref(chosen) - log π_ref(rejected) of rows of the stage, of shape `(rows,)`, in nats.

    Returns:
        `dict[str, float]`: The metrics to log.
    """
    accuracy = float((gamma > 0).mean())
    if accuracy >= SEEN_ACCURACY and gamma.mean() >= SEEN_GAMMA:
        logger.warning(
            f"The reference of stage {stage.number} ({stage.name!r}) prefers the chosen answer in {accuracy:.1%} of "
            f"{len(gamma)} rows, with a mean gamma_ref of {gamma.mean():.1f}. It seems to have been trained on these "
            "rows, which leaves little to learn. Check that the stages share no data with each other or with the data "
            "that the model was trained on before."
        )
    return {"sdpo/gamma_ref": float(gamma.mean()), "sdpo/ref_accuracy": accuracy}


def first_batch_metrics(trainer: Any, loss: float, margin: float, accuracy: float) -> dict[str, float]:
    """
    Return the metrics of the first batch of a stage, and warn if policy and reference differ.

    Args:
        trainer ([`StagedTraining`]):
            Trainer, in the stage that starts.
        loss (`float`):
            Loss of the first batch, averaged over all processes.
        margin (`float`):
            Its reward margin.
        accuracy (`float`):
            Its reward accuracy.

    Returns:
        `dict[str, float]`: The metrics to log.
    """
    stage, args = trainer.stage, trainer.args
    is_sigmoid = trainer.loss_types == ["sigmoid"] and not trainer.use_weighting and args.loss_weights is None
    is_16_bit = args.bf16 or args.fp16 or any(p.dtype.itemsize == 2 for p in trainer.model.parameters())
    margin_tolerance, loss_tolerance = TOLERANCES[is_16_bit]
    loss_is_off = is_sigmoid and abs(loss - math.log(2)) > loss_tolerance
    if args.disable_dropout and (loss_is_off or abs(margin) > margin_tolerance * stage.beta):
        logger.warning(
            f"Stage {stage.number} ({stage.name!r}) does not start from its reference: at its first batch the loss is "
            f"{loss:.4f} (expected: ln 2 = 0.6931) and the reward margin is {margin:.4f} (expected: 0). In the first "
            "stage, this is expected if you pass a `ref_model` that differs from the model. Otherwise, check the "
            "model for dropout and for layers that behave differently in training and evaluation."
        )
    return {
        "sdpo/first_batch_loss": loss,
        "sdpo/first_batch_margin": margin,
        "sdpo/first_batch_accuracy": accuracy,
    }
