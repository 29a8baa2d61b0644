"""Preparation of step data: rows become the columns `prompt_ids`, `chosen_ids` and `rejected_ids`."""

from contextlib import nullcontext
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig

from .. import __version__
from ..data.schema import has_images
from ..shared_prefix.columns import numbers
from .config import STEP_OPTIONS, StepDPOConfig
from .images import image_placeholder, media_tokens, reading_images, without_decoding
from .tokenization import StepTokenizer
from .vision import VisionStepTokenizer

logger = get_logger(__name__)


def make_step_tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, args: DPOConfig, images: bool = False
) -> StepTokenizer:
    """
    Create the tokenizer of step pairs that is used in training.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer or processor of the policy.
        args ([`StepDPOConfig`] or [`~trl.DPOConfig`]):
            Training configuration. A [`~trl.DPOConfig`] has the default options for step data.
        images (`bool`, *optional*, defaults to `False`):
            Whether the data has images. `processing_class` must be a processor then.

    Returns:
        [`StepTokenizer`]: Tokenizer of step pairs.
    """
    multimodal = isinstance(processing_class, ProcessorMixin)
    tokenizer: Any = processing_class.tokenizer if multimodal else processing_class
    # A processor can have a chat template when its tokenizer has none
    chat_template: Any = processing_class.chat_template if multimodal else None
    options = {
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "multimodal": multimodal,
        "placeholder": image_placeholder(processing_class) if multimodal else None,
        "media_tokens": media_tokens(processing_class) if multimodal else {},
        "max_length": args.max_length,
        **{name: getattr(args, name) for name in STEP_OPTIONS if isinstance(args, StepDPOConfig)},
    }
    return VisionStepTokenizer(processor=processing_class, **options) if images else StepTokenizer(**options)


def prepare_step_dataset(
    dataset: Dataset | IterableDataset, encode: StepTokenizer, where: str, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """
    Tokenize step data and handle overlong rows.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Step pairs.
        encode ([`StepTokenizer`]):
            Tokenizer of step pairs.
        where (`str`):
            Name of the dataset in messages, such as `"train dataset"`.
        num_proc (`int`, *optional*):
            Number of processes. Not used for streaming datasets.

    Returns:
        `Dataset` or `IterableDataset`: The dataset with the additional columns `prompt_ids`, `chosen_ids` and
        `rejected_ids`.

    Raises:
        ValueError: If a row is invalid, or if no row is left. Rows of a streaming dataset are checked when they are
            drawn.
    """
    with_images = isinstance(encode, VisionStepTokenizer)
    if isinstance(dataset, IterableDataset):
        stream = _StreamEncoder(encode, where)
        dataset = dataset.map(stream, with_indices=True).filter(stream.keeps).remove_columns("overlong")
        get_first_row(dataset, f"{where}, without the rows longer than max_length={encode.max_length},")
        return dataset

    with PartialState().main_process_first():  # the other processes read its cache
        encoded = dataset.map(
            _encode_row,
            with_indices=True,
            # The fingerprint of the cache covers the arguments but not the code of `encode`, so it needs the version
            fn_kwargs={"encode": encode, "where": where, "version": __version__},
            num_proc=num_proc,
            remove_columns=dataset.column_names if with_images else None,
            desc=f"Tokenizing {where}",
        )
        if with_images:  # the cache has the new columns only, because images are large
            unchanged = [name for name in dataset.column_names if name not in encoded.column_names]
            encoded = concatenate_datasets([dataset.select_columns(unchanged), encoded], axis=1)
        dataset = encoded
        overlong = np.count_nonzero(numbers(dataset, "overlong"))
        if overlong and encode.overlong_prefix == "drop":
            dataset = dataset.filter(_fits, input_columns="overlong", desc=f"Dropping overlong rows from {where}")
    if overlong:
        logger.warning(_overlong_message(encode, f"{overlong} rows", where))
    if len(dataset) == 0:
        raise ValueError(
            f"The {where} is empty after dropping all of its {overlong} rows, which are longer than "
            f"max_length={encode.max_length}. Increase `max_length`, or set `overlong_prefix='truncate'`."
        )
    return dataset.remove_columns("overlong")


def get_first_row(dataset: Dataset | IterableDataset, where: str) -> dict[str, Any]:
    """
    Return the first row of a dataset.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The dataset.
        where (`str`):
            Name of the dataset in the error message.

    Returns:
        `dict[str, Any]`: The row.

    Raises:
        ValueError: If the dataset is empty, or if an image of the row cannot be decoded.
    """
    decodes = isinstance(dataset, Dataset) and has_images(dataset.column_names)
    if isinstance(dataset, IterableDataset):
        dataset = without_decoding(dataset)
    with reading_images(f"row 0 of the {where}") if decodes else nullcontext():
        for row in dataset:
            return row
    raise ValueError(f"The {where} is empty. Check how it was loaded and filtered.")


class _StreamEncoder:
    """
    Tokenizes the rows of a streaming dataset.

    The length of a stream is unknown, so overlong rows are logged at the 1st, 2nd, 4th, 8th, ... of them. Each worker
    counts the rows that it has drawn.
    """

    def __init__(self, encode: StepTokenizer, where: str) -> None:
        self.encode = encode
        self.where = where
        self.drawn = 0
        self.overlong = 0

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        self.drawn += 1
        # The index is the order in which this worker draws, not a position in the data, so errors quote the prompt too
        prompt = str(row.get("prompt"))[:80]
        where = f"the row of the {self.where} with the prompt {prompt!r} (drawn as number {index + 1})"
        if has_images(row) and not isinstance(self.encode, VisionStepTokenizer):
            raise ValueError(
                f"{where} has images, but the first row has neither `image` nor `images`. Add the column `images` to "
                "all rows, with an empty list for rows without an image."
            )
        row = self.encode(row, where)
        if row["overlong"]:
            self.overlong += 1
            if self.overlong.bit_count() == 1:
                rows = f"{self.overlong} of the {self.drawn} rows drawn so far"
                logger.warning(_overlong_message(self.encode, rows, self.where))
        return row

    def keeps(self, row: dict[str, Any]) -> bool:
        return _fits(row["overlong"]) or self.encode.overlong_prefix != "drop"


def _encode_row(row: dict[str, Any], index: int, encode: StepTokenizer, where: str, version: str) -> dict[str, Any]:
    return encode(row, f"row {index} of the {where}")


def _fits(overlong: int) -> bool:
    return overlong == 0


def _overlong_message(encode: StepTokenizer, rows: str, where: str) -> str:
    action = "dropped" if encode.overlong_prefix == "drop" else encode.TRUNCATION
    return (
        f"{rows} of the {where} are longer than max_length={encode.max_length} and have been {action} "
        f"(overlong_prefix={encode.overlong_prefix!r})."
    )
