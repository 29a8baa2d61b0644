"""Check that training did not diverge."""

import math
from typing import Any

import torch

METRICS = ("loss", "logps/chosen", "logps/rejected")


def check_finite(trainer: Any) -> None:
    """
    Check that the trained weights and the last metrics are finite.

    The Trainer leaves losses of NaN out of its averages (`logging_nan_inf_filter`), so a diverged training ends like
    any other one. With fp16, whose scaler skips such steps, only the metrics show it.

    Args:
        trainer ([`~transformers.Trainer`]):
            A trainer at the end of training.

    Raises:
        FloatingPointError: If a weight or a metric is not finite, in any process.
    """
    model, accelerator = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    broken = [name for name, weight in trained.items() if not _local(weight).isfinite().all()]
    everywhere = accelerator.gather(torch.tensor([len(broken)], device=accelerator.device)).max().item()
    last: dict[str, float] = next((log for log in reversed(trainer.state.log_history) if "loss" in log), {})
    metrics = [f"{name} is {last[name]}" for name in METRICS if not math.isfinite(last.get(name, 0.0))]
    if not everywhere and not metrics:
        return
    found = [f"{everywhere} of {len(trained)} weights are not finite{f', such as {broken[0]}' if broken else ''}"]
    raise FloatingPointError(
        f"Training diverged: {'; '.join((found if everywhere else []) + metrics)}. The model cannot be used. Decrease "
        f"learning_rate (now {trainer.args.learning_rate:g}) or increase warmup, check the model that was trained, "
        "and start again in an empty output_dir."
    )


def _local(weight: Any) -> torch.Tensor:
    """Return the part of a weight that this process holds."""
    if hasattr(weight, "ds_tensor"):  # ZeRO-3
        return weight.ds_tensor
    return weight.to_local() if hasattr(weight, "to_local") else weight  # FSDP2
