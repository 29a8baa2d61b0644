"""Log-probabilities of the two steps of a pair under a model."""

import inspect
from typing import Any

import torch
from tqdm.auto import tqdm

from ..generation import ModelSpec
from ..generation.chat import render
from ..generation.transformers import TransformersGenerator


@torch.no_grad()
def add_logps(rows: list[dict[str, Any]], model: str, batch_size: int = 8) -> None:
    """
    Add `chosen_logps` and `rejected_logps` to pairs: the log-probability of each step's text after its prefix.

    Args:
        rows (`list[dict]`):
            The pairs; changed.
        model (`str`):
            Id or folder of the model.
        batch_size (`int`, *optional*, defaults to `8`):
            Steps scored at once.
    """
    generator = TransformersGenerator.load(ModelSpec(model))
    tokenizer, causal = generator.tokenizer, generator.model

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    jobs = []
    for row in rows:
        prefix = ids(render(tokenizer, [{"role": "user", "content": row["prompt"]}], row["initial_reason_steps"]))
        jobs += [(row, name, prefix, ids(row[name])) for name in ("chosen", "rejected")]
    cuts = "logits_to_keep" in inspect.signature(causal.forward).parameters  # as nearly all models can
    jobs.sort(key=lambda job: len(job[2]) + len(job[3]))
    for start in tqdm(range(0, len(jobs), batch_size), "log-probabilities", unit=" batches"):
        part = jobs[start : start + batch_size]
        width = max(len(prefix) + len(step) for _, _, prefix, step in part)
        tokens = [prefix + step + [generator.pad] * (width - len(prefix) - len(step)) for _, _, prefix, step in part]
        mask = [[1] * (len(p) + len(s)) + [0] * (width - len(p) - len(s)) for _, _, p, s in part]
        # Logits are needed where a token of a step comes next, and of one row at a time in float32: those of all
        # positions would take gigabytes with a large vocabulary
        places = sorted({place for _, _, p, s in part for place in range(len(p) - 1, len(p) + len(s) - 1)})
        places = places if cuts else list(range(width))
        options = {"logits_to_keep": torch.tensor(places, device=causal.device)} if cuts else {}
        input_ids = torch.tensor(tokens, device=causal.device)
        attention_mask = torch.tensor(mask, device=causal.device)
        logits = causal(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        for (row, name, prefix, step), of_row in zip(part, logits, strict=True):
            first = places.index(len(prefix) - 1)
            logps = of_row[first : first + len(step)].float().log_softmax(-1)
            row[f"{name}_logps"] = logps.gather(-1, torch.tensor(step, device=logps.device)[:, None]).sum().item()
