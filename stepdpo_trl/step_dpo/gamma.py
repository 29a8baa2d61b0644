"""Log-ratio of chosen and rejected under the initial model, which orders data from easy to hard."""

import copy
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig

from ..shared_prefix.columns import numbers
from .trainer import StepDPOTrainer


def measure_gamma(
    model: Any,
    dataset: Dataset,
    args: DPOConfig,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> np.ndarray:
    r"""
    Compute \\( \gamma(x) = \log \pi(y_w|x) - \log \pi(y_l|x) \\) of each row (sDPO, arXiv 2403.19270, section 4.2).

    Args:
        model (`str` or `PreTrainedModel`):
            Model to be trained, as for [`StepDPOTrainer`].
        dataset (`Dataset`):
            Step pairs or ordinary preference pairs.
        args ([`StepDPOConfig`] or [`~trl.DPOConfig`]):
            Configuration of the training run. Its lengths, prompt options and batch sizes apply here as well.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Tokenizer or processor of the model. If `None`, it is loaded by the model's name.

    Returns:
        `np.ndarray`: gamma of shape `(rows,)`, in nats.

    Raises:
        ValueError: If overlong rows are dropped, so that not every row has a gamma.
    """
    args = copy.copy(args)
    args.precompute_ref_log_probs = True
    trainer = StepDPOTrainer(model, args=args, train_dataset=dataset, processing_class=processing_class)
    scored: Any = trainer.train_dataset
    if len(scored) != len(dataset):
        raise ValueError(
            f"{len(dataset) - len(scored)} of {len(dataset)} rows are longer than max_length={args.max_length} and "
            "were dropped, so they have no gamma. Increase `max_length`, or remove these rows first."
        )
    chosen, rejected = (numbers(scored, f"ref_{name}_logps").astype(np.float64) for name in ("chosen", "rejected"))
    return chosen - rejected
