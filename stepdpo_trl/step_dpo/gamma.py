"""How well a model tells chosen from rejected before it is aligned, which is what orders data from easy to hard."""

import copy
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from .trainer import StepDPOTrainer


def measure_gamma(
    model: Any, dataset: Dataset, args: DPOConfig, processing_class: PreTrainedTokenizerBase | None = None
) -> np.ndarray:
    r"""
    Measure \\( \gamma(x) = \log \pi(y_w|x) - \log \pi(y_l|x) \\) of each row (sDPO, arXiv 2403.19270, section 4.2).

    Args:
        model (`str` or `PreTrainedModel`):
            The model to be trained, as for [`StepDPOTrainer`].
        dataset (`Dataset`):
            Step pairs or plain preference pairs.
        args ([`StepDPOConfig`] or [`~trl.DPOConfig`]):
            The configuration of the training to come: lengths, prompts and batch sizes are taken from it.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer, where it is not loaded by the model's name.

    Returns:
        `np.ndarray`: gamma of shape `(rows,)`, in nats.

    Raises:
        ValueError: If rows are left out as overlong, so that not every row has a gamma.
    """
    args = copy.copy(args)
    args.precompute_ref_log_probs = True
    trainer = StepDPOTrainer(model, args=args, train_dataset=dataset, processing_class=processing_class)
    scored: Any = trainer.train_dataset
    if len(scored) != len(dataset):
        raise ValueError(
            f"{len(dataset) - len(scored)} of {len(dataset)} rows are left out as longer than max_length="
            f"{args.max_length}. Raise it, or leave them out before."
        )
    return np.asarray(scored[:]["ref_chosen_logps"]) - np.asarray(scored[:]["ref_rejected_logps"])
