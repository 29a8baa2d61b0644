"""Log-probabilities of the two steps of a pair under a model."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..runs.progress import progress_bar
from ..runs.run_directory import RunError


@torch.no_grad()
def add_logps(
    rows: list[dict[str, Any]],
    model: PreTrainedModel,
    encode: Callable[[Mapping[str, Any], str], Mapping[str, Any]],
    batch_size: int = 8,
) -> None:
    """
    Add the columns `chosen_logps` and `rejected_logps`: the log-probability of each step given its prefix, in nats.

    With the tokens of the trainer, these are the `logps/chosen` and `logps/rejected` that it logs for the model.

    Args:
        rows (`list[dict]`):
            Step pairs. They are modified in place.
        model (`PreTrainedModel`):
            The model.
        encode (`Callable[[Mapping, str], Mapping]`):
            Function that tokenizes a row, given the name of the row for error messages, into `prompt_ids`,
            `chosen_ids` and `rejected_ids`, such as [`~stepdpo_trl.step_dpo.tokenization.StepTokenizer`].
        batch_size (`int`, *optional*, defaults to `8`):
            Number of steps per forward pass.

    Raises:
        RunError: If a log-probability is not finite.
    """
    jobs = []
    for number, row in enumerate(rows):
        ids = encode(row, f"pair {number}")
        jobs += [(row, name, ids["prompt_ids"], ids[f"{name}_ids"]) for name in ("chosen", "rejected")]
    jobs.sort(key=lambda job: len(job[2]) + len(job[3]))
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters  # of nearly all models
    device = model.device
    for start in progress_bar(range(0, len(jobs), batch_size), "log-probabilities", unit=" batches"):
        part = jobs[start : start + batch_size]
        width = max(len(prefix) + len(step) for _, _, prefix, step in part)
        tokens = [prefix + step + [0] * (width - len(prefix) - len(step)) for _, _, prefix, step in part]
        mask = [[1] * (len(p) + len(s)) + [0] * (width - len(p) - len(s)) for _, _, p, s in part]
        # Logits of all positions would take gigabytes with a large vocabulary
        places = sorted({place for _, _, p, s in part for place in range(len(p) - 1, len(p) + len(s) - 1)})
        places = places if keeps else list(range(width))
        options = {"logits_to_keep": torch.tensor(places, device=device)} if keeps else {}
        input_ids, attention_mask = torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        for (row, name, prefix, step), of_row in zip(part, logits, strict=True):
            first = places.index(len(prefix) - 1)
            logps = of_row[first : first + len(step)].float().log_softmax(-1)
            logp = logps.gather(-1, torch.tensor(step, device=logps.device)[:, None]).sum().item()
            if not math.isfinite(logp):
                raise RunError(
                    f"The log-probability of a {name} step is {logp} under the model {model.config.name_or_path!r}. "
                    "Its training may have diverged. Use another model."
                )
            row[f"{name}_logps"] = logp
