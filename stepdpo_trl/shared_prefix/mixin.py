"""
Training with shared prefixes: the part of [`StepDPOTrainer`] between a batch and its loss.

`DPOTrainer` computes its loss from rows of tokens and the log-probabilities that the model returns for them. Here
these rows contain only the labeled tokens, and the model also receives the prefix tree of the batch (see
[`~stepdpo_trl.shared_prefix.forward`]). Losses, reference models and metrics are those of `DPOTrainer`.
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

from .columns import numbers
from .forward import share_prefixes
from .memory import CHECKPOINTING, CheckpointingAdvice, count_tokens
from .repeated_images import encode_images_once, image_arguments, images_are_repeated, images_processed_once
from .support import decoder, encodes_images_once, why_not_shared
from .tree import PrefixTree, build_tree
from .vision import IMAGE_KEYS, TYPE_KEYS, ImageLayout, with_image_positions

if TYPE_CHECKING:
    from trl import DPOTrainer
else:
    DPOTrainer = object  # a mixin: the trainer that uses it adds DPOTrainer to its bases

logger = get_logger(__name__)

TREE = "prefix_tree"  # key in a batch and argument of the model


@dataclass
class SharedPrefixCollator:
    """
    Data collator that adds the prefix tree of the rows to a batch.

    Args:
        collator (`Callable`):
            Collator of `DPOTrainer`, which pads and truncates the rows.
        max_tokens (`int`, *optional*):
            Maximum number of tokens in a forward pass. If `None`, the batch is not split.
        layout (`ImageLayout`, *optional*):
            Layout of the images in a batch. `None` for models without images.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    max_tokens: int | None = None
    layout: ImageLayout | None = None
    _warned: bool = field(default=False, init=False)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples into a batch."""
        with images_processed_once(self.collator):
            batch = self.collator(examples)
        present = batch["attention_mask"].bool()
        rows, labels = (
            [row[mask].numpy() for row, mask in zip(batch[name], present, strict=True)]
            for name in ("input_ids", "completion_mask")
        )
        if self.layout is not None and "pixel_values" in batch:
            tree = self.layout.build_tree(batch, rows, labels, self.max_tokens)
        else:
            tree = build_tree(rows, labels, self.max_tokens)
        longest = max(pack.tokens for pack in tree.packs)
        if self.max_tokens is not None and longest > self.max_tokens and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(  # accelerate's logger does not work in data loader workers
                f"A sequence has {longest} tokens, more than max_tokens_per_forward={self.max_tokens}. It is computed "
                "in one forward pass. Set `max_length` to truncate such sequences."
            )
        return {**batch, TREE: tree}


class PrefixSharing(DPOTrainer):
    """
    Mixin for [`~trl.DPOTrainer`] that shares prefixes after `_start_sharing` has been called.

    Attributes:
        shared_prefix (`str`):
            Requested mode, `"auto"`, `"on"` or `"off"`. See [`StepDPOConfig`].
        shares_prefixes (`bool` or `None`):
            Whether prefixes are shared. `None` before `_start_sharing` has decided it.
    """

    args: Any
    shared_prefix = "off"
    shares_prefixes: bool | None = None
    _encodes_images_once = False

    def _start_sharing(self) -> None:
        """Share prefixes if requested and exact."""
        if self.shares_prefixes is not None:
            return
        reason = None if self.shared_prefix == "off" else why_not_shared(self)
        self.shares_prefixes = self.shared_prefix != "off" and reason is None
        if self.shares_prefixes:
            config = decoder(self.model).config
            if self.max_tokens_per_forward is not None:
                check_parts(self.args, config.get_text_config(), self.accelerator.num_processes)
            layout = ImageLayout.of(config) if hasattr(config, "vision_config") else None
            self.data_collator = SharedPrefixCollator(self.data_collator, self.max_tokens_per_forward, layout)
            if getattr(self.args, CHECKPOINTING):
                self.add_callback(CheckpointingAdvice(self))
        elif self.shared_prefix == "on":
            raise ValueError(f"`shared_prefix='on'` is not possible because {reason}. Use 'auto' or 'off'.")
        elif reason:
            budget = self.max_tokens_per_forward
            no_budget = f" max_tokens_per_forward={budget} has no effect." if budget is not None else ""
            self._encodes_images_once = encodes_images_once(self)
            once = " Each image is still encoded only once." if self._encodes_images_once else ""
            logger.warning(f"Prefixes are not shared because {reason}.{once}{no_budget}")

    @property
    def max_tokens_per_forward(self) -> int | None:
        """Maximum number of tokens in a forward pass. `None` with a plain `DPOConfig`, which lacks the option."""
        return getattr(self.args, "max_tokens_per_forward", None)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # Requested outputs must cover the whole sequences
        rows = self._loss_rows(inputs, self.model, self.ref_model, whole=return_outputs)
        return super()._compute_loss(model, rows, return_outputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Compute the reference log-probabilities of a batch."""
        return super().compute_ref_log_probs(model, self._loss_rows(inputs, model))

    def _loss_rows(self, inputs: dict[str, Any], *models: Any, whole: bool = False) -> dict[str, Any]:
        """Replace the padded rows of a batch by their labeled tokens, and make the models accept its tree."""
        tree: PrefixTree | None = inputs.get(TREE)
        if tree is None:
            return inputs if whole else self._with_images_once(inputs, *models)
        rest = {name: value for name, value in inputs.items() if name != TREE}
        if whole:
            return rest
        rest = {name: value for name, value in rest.items() if name not in IMAGE_KEYS + TYPE_KEYS}
        for model in filter(None, models):  # in each call, because the reference model can be replaced
            share_prefixes(decoder(model))
        # The mask counts the rows that contain each token, so that `num_tokens` and the load balancing of experts are
        # those of the rows
        rows = {"input_ids": tree.input_ids, "completion_mask": tree.completion_mask, "attention_mask": tree.uses}
        tree = with_image_positions(tree, inputs, decoder(models[0]).base_model)
        return {**rest, **rows, TREE: self._in_step(tree)}

    def _with_images_once(self, inputs: dict[str, Any], *models: Any) -> dict[str, Any]:
        """Make the models encode each image once if the batch repeats its images for the rejected rows."""
        if not self._encodes_images_once or not images_are_repeated(inputs, image_arguments(decoder(models[0]))):
            return inputs
        for model in filter(None, models):
            encode_images_once(decoder(model))
        return {**inputs, "repeated_images": True}

    def _in_step(self, tree: PrefixTree) -> PrefixTree:
        """Pad the tree to the same number of packs on all processes, because sharded models synchronize per layer."""
        if self.max_tokens_per_forward is None or self.accelerator.num_processes == 1:
            return tree
        packs = torch.tensor([len(tree.packs)], device=self.accelerator.device)
        return tree.padded(int(self.accelerator.gather(packs).max()))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Score the longest pairs first, so that batches have similar lengths and memory errors occur early."""
        self._start_sharing()  # DPOTrainer.__init__ precomputes before the end of StepDPOTrainer.__init__
        tokenized = isinstance(dataset, Dataset) and "prompt_ids" in dataset.column_names  # not with images
        if not self.shares_prefixes or not tokenized:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        order = longest_first(dataset)
        scored = super()._precompute_ref_logps(dataset.select(order), name, batch_size)
        for column in (column for column in scored.column_names if column not in dataset.column_names):
            dataset = dataset.add_column(column, numbers(scored, column)[np.argsort(order)])
        return dataset


def check_parts(args: Any, config: PretrainedConfig, processes: int) -> None:
    """
    Check that batches can be split with `max_tokens_per_forward`.

    Args:
        args (`DPOConfig`):
            Configuration of the trainer, after `DPOTrainer.__init__` has updated it.
        config (`PretrainedConfig`):
            Config of the model.
        processes (`int`):
            Number of processes.

    Raises:
        ValueError: If reentrant gradient checkpointing is used on several processes, or if the position embeddings
            depend on the longest sequence of a batch.
    """
    # TRL sets the older name, which it uses after each forward pass of the reference
    options = {**(getattr(args, f"{CHECKPOINTING}_kwargs") or {}), **(args.gradient_checkpointing_kwargs or {})}
    reentrant = getattr(args, CHECKPOINTING) and options.get("use_reentrant")
    if reentrant and processes > 1:
        raise ValueError(
            f"`max_tokens_per_forward={args.max_tokens_per_forward}` is not possible with reentrant gradient "
            "checkpointing on several processes: each part of a batch would report its own gradients, but DDP and "
            "ZeRO accept them only once. (DPOTrainer enables reentrant checkpointing for adapters under ZeRO-3.) Set "
            f"`{CHECKPOINTING}=False`, since splitting already limits the memory, or remove `max_tokens_per_forward`."
        )

    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for parameters in by_layer:
        original: Any = parameters.get("original_max_position_embeddings")
        limit: Any = original or getattr(config, "max_position_embeddings", 0)
        if parameters.get("rope_type") in ("dynamic", "longrope") and not 0 < (args.max_length or 0) <= limit:
            raise ValueError(
                f"`max_tokens_per_forward={args.max_tokens_per_forward}` is not possible with position embeddings "
                f"that depend on the longest sequence of a batch (rope_type={parameters['rope_type']!r}), because the "
                f"longest sequence differs between the parts of a batch. Set `max_length` to {limit} or less, where "
                "the position embeddings do not change, or remove `max_tokens_per_forward`."
            )


def longest_first(dataset: Dataset) -> np.ndarray:
    """Return the row indices of a tokenized dataset, sorted by the number of tokens in descending order."""
    return np.argsort(-count_tokens(dataset), kind="stable")
