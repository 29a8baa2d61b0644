"""Advice on whether gradient checkpointing is needed with shared prefixes, from an estimate of activation memory."""

from typing import Any

import numpy as np
import psutil
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from transformers import PretrainedConfig, TrainerCallback, TrainingArguments

from .columns import list_lengths
from .support import has_images

logger = get_logger(__name__)

# Option of training arguments, which transformers 5.23 has renamed
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
MARGIN = 1.3  # required ratio of free to estimated memory


def activation_bytes(config: PretrainedConfig, element_size: int) -> int:
    """
    Estimate the activation memory of a decoder per token, without gradient checkpointing.

    The estimate counts the tensors that PyTorch keeps for the backward of a Llama-like layer: the input and the
    normalized input of both norms, which compute in float32, the inputs of the projections, the queries, keys, values
    and output of attention, and the four intermediates of the MLP.

    Args:
        config (`PretrainedConfig`):
            Config of the decoder.
        element_size (`int`):
            Bytes per activation, e.g. 2 for bfloat16.

    Returns:
        `int`: Bytes per token.
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


def count_tokens(dataset: Dataset) -> np.ndarray:
    """
    Count the tokens of each pair, with its prefix once.

    Args:
        dataset (`Dataset`):
            Tokenized pairs.

    Returns:
        `np.ndarray`: Number of tokens, of shape `(rows,)`.
    """
    return np.sum([list_lengths(dataset, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")], axis=0)


def most_tokens(trainer: Any) -> int | None:
    """
    Return an upper bound of the tokens in one forward pass of training, where the prefix of a pair counts once.

    Args:
        trainer (`PrefixSharing`):
            The trainer.

    Returns:
        `int` or `None`: Number of tokens, `None` if it is unknown because the train dataset is a stream or has images,
        whose encoders need memory as well.
    """
    dataset = trainer.train_dataset
    if has_images(trainer):
        return None
    if trainer.max_tokens_per_forward is not None:
        return int(trainer.max_tokens_per_forward)
    if not isinstance(dataset, Dataset):
        return None
    return int(np.sort(count_tokens(dataset))[-trainer.args.per_device_train_batch_size :].sum())


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, in bytes, including memory that PyTorch has reserved but not allocated."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


class CheckpointingAdvice(TrainerCallback):
    """
    Callback that logs whether the activations would fit into memory without gradient checkpointing.

    It logs once, after the first update, when weights, gradients and optimizer states are allocated. Training is not
    changed.

    Args:
        trainer (`PrefixSharing`):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer: Any = trainer

    def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
        """Log the advice after the first update."""
        trainer, self.trainer = self.trainer, None
        tokens = most_tokens(trainer) if trainer is not None and getattr(args, CHECKPOINTING) else None
        if tokens is None:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        half = args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16)
        needed = tokens * activation_bytes(model.config.get_text_config(), 2 if half else 4)
        free = free_bytes(trainer.accelerator.device)
        if needed * MARGIN > free:
            return
        # In units of a forward: policy, recomputation, backward (twice as much if all weights are trained), reference
        backward = 1 if isinstance(model, PeftModel) else 2
        share = 1 / (2 + backward + (not trainer.precompute_ref_logps))
        logger.warning(
            f"Gradient checkpointing is enabled but may not be needed. Without it, the activations of the largest "
            f"batch ({tokens} tokens) take about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. "
            f"`{CHECKPOINTING}=False` would save about {share:.0%} of the computation."
        )
