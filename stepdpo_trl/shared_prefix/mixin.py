"""
Training with shared prefixes: the part of [`StepDPOTrainer`] between a batch and its loss.

`DPOTrainer` computes its loss from rows of labels and what the model says of them. The rows that it is given here are
the labelled tokens alone, and with them goes the tree of the batch for the model (see
[`~stepdpo_trl.shared_prefix.forward`]). Losses, references and metrics are `DPOTrainer`'s.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PretrainedConfig

from .forward import share_prefixes
from .memory import CheckpointingAdvice
from .support import decoder, why_not_shared
from .tree import PrefixTree, build_tree

if TYPE_CHECKING:
    from trl import DPOTrainer
else:
    DPOTrainer = object  # a mixin, put before whichever trainer it serves

logger = get_logger(__name__)

TREE = "prefix_tree"  # the key of a batch, and the argument of a model


@dataclass
class SharedPrefixCollator:
    """
    Adds to a batch the tree of its rows.

    Args:
        collator (`Callable`): Collator of `DPOTrainer`, which pads and truncates the rows.
        max_tokens (`int`, *optional*): Most tokens of a forward.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    max_tokens: int | None = None
    _warned: bool = field(default=False, init=False)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        batch = self.collator(examples)
        present = batch["attention_mask"].bool()
        rows, labelled = (
            [row[mask].numpy() for row, mask in zip(batch[name], present, strict=True)]
            for name in ("input_ids", "completion_mask")
        )
        tree = build_tree(rows, labelled, self.max_tokens)
        longest = max(pack.tokens for pack in tree.packs)
        if self.max_tokens is not None and longest > self.max_tokens and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(  # accelerate's logger does not work in a data loader's process
                f"A sequence of {longest} tokens is longer than max_tokens_per_forward={self.max_tokens}, and is "
                "computed in one forward all the same. Set `max_length` to cut such sequences."
            )
        return {**batch, TREE: tree}


class PrefixSharing(DPOTrainer):
    """Mixin for [`~trl.DPOTrainer`] that shares prefixes once `_start_sharing` has been called."""

    args: Any
    shared_prefix = "off"  # what was asked for
    shares_prefixes: bool | None = None  # what came of it, once that is decided

    def _start_sharing(self) -> None:
        """Share prefixes if that is asked for, and exact."""
        if self.shares_prefixes is not None:
            return
        reason = None if self.shared_prefix == "off" else why_not_shared(self)
        self.shares_prefixes = self.shared_prefix != "off" and reason is None
        if self.shares_prefixes:
            if self.max_tokens_per_forward is not None:
                check_parts(self.args, decoder(self.model).config, self.accelerator.num_processes)
            self.data_collator = SharedPrefixCollator(self.data_collator, self.max_tokens_per_forward)
            if self.args.gradient_checkpointing:
                self.add_callback(CheckpointingAdvice(self))
        elif self.shared_prefix == "on":
            raise ValueError(f"`shared_prefix='on'` is not possible: {reason}. Set it to 'off' or 'auto'.")
        elif reason:
            budget = self.max_tokens_per_forward
            more = f" max_tokens_per_forward={budget} has no effect." if budget is not None else ""
            logger.warning(f"Shared prefixes are computed anew for each sequence, because {reason}.{more}")

    @property
    def max_tokens_per_forward(self) -> int | None:
        """The budget. A stock `DPOConfig` has none."""
        return getattr(self.args, "max_tokens_per_forward", None)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # Those who want outputs want those of the whole sequences
        rows = self._loss_rows(inputs, self.model, self.ref_model, whole=return_outputs)
        return super()._compute_loss(model, rows, return_outputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Compute reference log-probabilities of a batch."""
        return super().compute_ref_log_probs(model, self._loss_rows(inputs, model))

    def _loss_rows(self, inputs: dict[str, Any], *models: Any, whole: bool = False) -> dict[str, Any]:
        """The rows that the loss falls on, for models that are taught to take their tree."""
        tree: PrefixTree | None = inputs.get(TREE)
        if tree is None:
            return inputs
        rest = {name: value for name, value in inputs.items() if name != TREE}
        if whole:
            return rest
        for model in filter(None, models):  # each time: a reference may have been replaced
            share_prefixes(decoder(model))
        # How often a token is used stands for how many there are: the sum is that of all rows, for the metric
        # `num_tokens`, and the load balance of experts weighs tokens as the rows would
        rows = {"input_ids": tree.input_ids, "completion_mask": tree.completion_mask, "attention_mask": tree.uses}
        return {**rest, **rows, TREE: self._in_step(tree)}

    def _in_step(self, tree: PrefixTree) -> PrefixTree:
        """As many packs on every process: those that shard a model wait for each other in every layer."""
        if self.max_tokens_per_forward is None or self.accelerator.num_processes == 1:
            return tree
        packs = torch.tensor([len(tree.packs)], device=self.accelerator.device)
        return tree.padded(int(self.accelerator.gather(packs).max()))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Longest first, so that batches are alike and what does not fit into memory is found at once."""
        self._start_sharing()  # which the trainer, still in the making, has not done yet
        if not self.shares_prefixes or not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        order = longest_first(dataset)
        scored = super()._precompute_ref_logps(dataset.select(order), name, batch_size)
        for column in (column for column in scored.column_names if column not in dataset.column_names):
            dataset = dataset.add_column(column, np.array(scored[column])[np.argsort(order)])
        return dataset


def check_parts(args: Any, config: PretrainedConfig, processes: int) -> None:
    """
    Check that batches can be computed in parts.

    Args:
        args (`DPOConfig`): Configuration of the trainer, as it has become.
        config (`PretrainedConfig`): Config of the model.
        processes (`int`): How many processes train.

    Raises:
        ValueError: If they cannot.
    """
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if reentrant and processes > 1:
        raise ValueError(
            f"`max_tokens_per_forward={args.max_tokens_per_forward}` is not possible with reentrant gradient "
            "checkpointing on several processes: each part of a batch would hand in gradients of its own, which DDP "
            "and ZeRO take once. (DPOTrainer makes it reentrant for adapters under ZeRO-3.) Set "
            "`gradient_checkpointing=False`, since parts bound the memory by themselves, or leave "
            "`max_tokens_per_forward` out."
        )

    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for one in by_layer:
        unchanged: Any = one.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
        if one.get("rope_type") in ("dynamic", "longrope") and not 0 < (args.max_length or 0) <= unchanged:
            raise ValueError(
                f"`max_tokens_per_forward={args.max_tokens_per_forward}` is not possible with positions that depend "
                f"on the longest sequence of a batch (rope_type={one['rope_type']!r}), since each part has a longest "
                f"of its own. Set `max_length` to {unchanged} or less, up to where they do not, or leave it out."
            )


def longest_first(dataset: Dataset) -> np.ndarray:
    """The order of tokenized pairs by their tokens, the most first."""
    columns = [dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    lengths = np.sum([[len(ids) for ids in column] for column in columns], axis=0)
    return np.argsort(-lengths, kind="stable")
