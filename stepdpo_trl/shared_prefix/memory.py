"""Whether gradient checkpointing is still needed once prefixes are shared: an estimate, and what it would gain."""

from typing import Any

import numpy as np
import psutil
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from transformers import PretrainedConfig, TrainerCallback

logger = get_logger(__name__)

MARGIN = 1.3  # of what is free over what is estimated


def activation_bytes(config: PretrainedConfig, element_size: int) -> int:
    """
    Estimate what the backward of a decoder needs of each token where no layer is checkpointed.

    Counted is what PyTorch keeps of a Llama-like layer: both norms compute in float32 and keep what they are given and
    what they normalized, the projections their input, attention its queries, keys, values and output, and the MLP its
    four intermediates.

    Args:
        config (`PretrainedConfig`): Config of the decoder.
        element_size (`int`): Bytes of an activation, 2 for bfloat16.

    Returns:
        `int`: Bytes a token.
    """
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries = config.num_attention_heads * head
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    experts = getattr(config, "num_experts_per_tok", None)
    mlp = experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size) if experts else None
    norms = 2 * hidden * (4 + element_size)
    rest = 2 * hidden + 2 * queries + 2 * keys + 4 * (mlp or config.intermediate_size)
    return config.num_hidden_layers * (norms + element_size * rest)


def most_tokens(trainer: Any) -> int | None:
    """The most tokens that a forward of training computes; shared prefixes count once. `None` for streams."""
    dataset = trainer.train_dataset
    if trainer.max_tokens_per_forward is not None:
        return int(trainer.max_tokens_per_forward)
    if not isinstance(dataset, Dataset):
        return None
    columns = [dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    pairs = np.sort(np.sum([[len(ids) for ids in column] for column in columns], axis=0))
    return int(pairs[-trainer.args.per_device_train_batch_size :].sum())


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


class CheckpointingAdvice(TrainerCallback):
    """
    Says after the first update, when weights, gradients and optimizer have their memory, whether the activations would
    fit without gradient checkpointing. Changes nothing.

    Args:
        trainer (`PrefixSharing`): The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer: Any = trainer

    def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
        """Say it once."""
        trainer, self.trainer = self.trainer, None
        tokens = most_tokens(trainer) if trainer is not None and args.gradient_checkpointing else None
        if tokens is None:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        half = args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16)
        needed = tokens * activation_bytes(model.config.get_text_config(), 2 if half else 4)
        free = free_bytes(trainer.accelerator.device)
        if needed * MARGIN > free:
            return
        # In forwards: one of the policy, one again for checkpointing, the backward (of the weights too where these
        # are trained), and the reference
        backward = 1 if isinstance(model, PeftModel) else 2
        share = 1 / (2 + backward + (not trainer.precompute_ref_logps))
        logger.warning(
            f"Gradient checkpointing is on and may not be needed: without it a batch of {tokens} tokens, the most "
            f"there are, keeps about {needed / 2**30:.1f} GiB of activations, and {free / 2**30:.1f} GiB are free. "
            f"`gradient_checkpointing=False` would save about {share:.0%} of the arithmetic."
        )
