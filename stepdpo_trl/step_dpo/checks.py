"""Checks of the arguments and datasets of [`StepDPOTrainer`], before training starts."""

import inspect
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.schema import PREFIX_COLUMN, check_columns, check_plain_columns, has_images, is_step_data
from .dataset import get_first_row

logger = get_logger(__name__)


def check_first_row(row: dict[str, Any], where: str) -> None:
    """
    Check the columns of a dataset.

    Args:
        row (`dict[str, Any]`):
            First row of the dataset.
        where (`str`):
            Name of the dataset in messages.

    Raises:
        ValueError: If a column is missing or misspelled.
    """
    if not is_step_data(row):
        check_plain_columns(row, f"the {where}")
        if "prefix" in row:  # written by the released Step-DPO scripts
            logger.warning(
                f"The {where} has no column `{PREFIX_COLUMN}`, so its rows are treated as ordinary preference pairs "
                f"and its column `prefix` is ignored. Rename `prefix` to `{PREFIX_COLUMN}` if it contains reasoning "
                "steps."
            )
        return
    check_columns(row, f"the {where}")


def find_step_images(train_row: dict[str, Any], eval_dataset: Any) -> bool:
    """
    Return whether any dataset of a trainer has step pairs with images.

    Args:
        train_row (`dict[str, Any]`):
            First row of the train dataset, which has step data.
        eval_dataset (`Dataset`, `IterableDataset`, `dict` or `None`):
            Evaluation data, as passed to the trainer.
    """
    if has_images(train_row):
        return True
    datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    rows = [
        get_first_row(dataset, f"{name} dataset")
        for name, dataset in datasets.items()
        if dataset is not None and not isinstance(dataset, str)
    ]
    return any(is_step_data(row) and has_images(row) for row in rows)


def check_images(
    where: str, row: dict[str, Any], processing_class: Any, trainer_has_steps: bool, trainer_has_images: bool
) -> None:
    """
    Check that a trainer of step pairs can use the images of a dataset.

    Args:
        where (`str`):
            Name of the dataset in messages.
        row (`dict[str, Any]`):
            First row of the dataset.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer or processor of the policy.
        trainer_has_steps (`bool`):
            Whether the trainer was created for step pairs.
        trainer_has_images (`bool`):
            Whether the trainer was created for step pairs with images.

    Raises:
        ValueError: If the processor or the trainer cannot process images, or if the rows are not step pairs.
    """
    if not has_images(row):
        return
    if not is_step_data(row):
        if not trainer_has_steps:  # as in `DPOTrainer`
            return
        raise ValueError(
            f"The {where} has ordinary preference pairs with images, but the train dataset has `{PREFIX_COLUMN}`. "
            "Evaluate on them with a separate trainer."
        )
    if not isinstance(processing_class, ProcessorMixin) or not hasattr(processing_class, "image_processor"):
        raise ValueError(
            f"The {where} has images, but a {type(processing_class).__name__} cannot process them. Train a "
            "vision-language model and pass its processor as `processing_class`, or remove the images."
        )
    if not trainer_has_images:
        raise ValueError(
            f"The {where} has images, but the data that the trainer was created with has none. Create the trainer "
            "with this dataset as `eval_dataset`."
        )


def check_vision_model(model: Any, padding: int | None) -> None:
    """
    Check that a model accepts images.

    Args:
        model (`PreTrainedModel`):
            Model, without the wrapper of PEFT.
        padding (`int`, *optional*):
            `pad_to_multiple_of` of the training configuration, which TRL does not support for images.

    Raises:
        ValueError: If the model is a text-only model, or if `padding` is set.
    """
    if "pixel_values" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            f"The data has images, but {type(model).__name__} is a text-only model: its forward has no argument "
            "`pixel_values`. Pass a vision-language model, or remove the images."
        )
    if padding is not None:
        raise ValueError(
            f"`pad_to_multiple_of={padding}` is not supported for data with images. Remove `pad_to_multiple_of`."
        )


def check_no_step_data(eval_dataset: Any) -> None:
    """
    Check that there is no step data to evaluate on when the train dataset has plain pairs with images.

    Args:
        eval_dataset (`Dataset`, `IterableDataset`, `dict` or `None`):
            Evaluation data, as passed to the trainer.

    Raises:
        ValueError: If an evaluation dataset has step data, which [`~trl.DPOTrainer`] would not prepare.
    """
    datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in datasets.items():
        if dataset is not None and is_step_data(get_first_row(dataset, f"{name} dataset")):
            raise ValueError(
                f"The {name} dataset has `{PREFIX_COLUMN}`, but the train dataset has ordinary preference pairs with "
                "images. Evaluate on step pairs with a separate trainer."
            )


def check_order(args: Any, train_dataset: Any) -> None:
    """
    Check that `group_by_prompt` can determine the order of training.

    Args:
        args ([`StepDPOConfig`] or [`~trl.DPOConfig`]):
            Training configuration.
        train_dataset (`Dataset` or `IterableDataset`):
            Training data.

    Raises:
        ValueError: If the data is a stream, or another order is requested.
    """
    if not getattr(args, "group_by_prompt", False):
        return
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "`group_by_prompt=True` needs all rows at once, but the train dataset is a stream. Load it without "
            "streaming, or set `group_by_prompt=False`."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`group_by_prompt=True` and train_sampling_strategy={args.train_sampling_strategy!r} request two "
            "different orders. Remove one of the two."
        )


def check_special_tokens(processing_class: PreTrainedTokenizerBase | ProcessorMixin | None) -> None:
    """
    Check that batches can be padded.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Tokenizer or processor, as passed to the trainer.

    Raises:
        ValueError: If the tokenizer has neither a pad token nor an EOS token.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has neither a pad token nor an EOS token, so batches cannot be padded. Set a pad token "
            "before passing it as `processing_class`: `tokenizer.pad_token = ...` with a token of its vocabulary."
        )


def warn_about_repacking() -> None:
    """Log a warning if bitsandbytes repacks 4-bit weights on this CPU, which breaks gradients after an evaluation."""
    if torch.cuda.is_available():
        return
    from bitsandbytes.nn import modules

    if getattr(modules, "has_avx512bf16", lambda: False)():
        logger.warning(
            "On this CPU (AVX512-BF16), bitsandbytes repacks 4-bit weights in the first forward pass in evaluation "
            "mode, and all later gradients are wrong. Do not evaluate, generate or set `precompute_ref_log_probs` "
            "before the end of training, or train on a GPU."
        )
