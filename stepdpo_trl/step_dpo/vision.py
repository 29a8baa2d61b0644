"""
Step pairs with images: tokenization and batches.

The processor of the model expands the placeholders of the images, so it receives prompt and initial reasoning steps as
one rendered text. The steps are tokenized as without images. `DataCollatorForVisionPreference` of TRL joins both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import PIL.Image
import torch
from transformers import ProcessorMixin
from trl import prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from ..data.schema import StepPreference
from ..data.steps import split_steps
from ..shared_prefix.support import COLLATORS
from .images import (
    check_placeholders,
    digest_images,
    framed_placeholder,
    image_placeholder,
    load_images,
    warn_about_bare_placeholders,
)
from .tokenization import StepTokenizer, check_different, steps_of

# Column with the text that the processor tokenizes: prompt and initial reasoning steps. Only rows that were tokenized
# with images have it, so the name must not be one that data has
PROMPT_TEXT = "prompt_text_with_placeholders"
# Column that distinguishes rows with equal tokens and different images
IMAGES_DIGEST = "images_digest"


@dataclass(frozen=True)
class VisionStepTokenizer(StepTokenizer):
    """
    Tokenizer of step pairs with images.

    Args:
        processor (`ProcessorMixin`):
            Processor of the policy.
        tokenizer, chat_template, multimodal, system_prompt, prompt_suffix, prompt_template, max_length, placeholder,
        media_tokens:
            As for [`StepTokenizer`].
        overlong_prefix (`str`, *optional*, defaults to `"truncate"`):
            As for [`StepTokenizer`], except that `"truncate"` removes whole reasoning steps, because truncating the
            prefix from the left would cut the images.

    Raises:
        ValueError: If an option has an invalid value.
    """

    COUNTED: ClassVar[str] = "prefix tokens (with those of its images)"
    TRUNCATION: ClassVar[str] = "shortened by removing their first reasoning steps, with images and steps kept whole"

    processor: Any = None

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """
        Tokenize one step pair.

        Args:
            row (`Mapping[str, Any]`):
                Row with the columns of [`StepPreference`] and `image` or `images`.
            where (`str`):
                Name of the row in error messages.

        Returns:
            `dict`: As from [`StepTokenizer`], and the columns `PROMPT_TEXT` and `IMAGES_DIGEST`.

        Raises:
            ValueError: If the row is not a valid step pair, if an image cannot be read or has no placeholder, or if
                the row is too long and cannot be shortened.
        """
        pair = StepPreference.from_row(row, where)
        images = load_images(row, where)
        messages, prefix = self.split_prompt(_without_nulls(pair.prompt), pair.initial_reason_steps, where)
        if self.placeholder is not None and self.placeholder in prefix:
            raise ValueError(
                f"The initial reasoning steps of {where} contain the image placeholder {self.placeholder!r}. Images "
                "are only supported in its prompt. Move the placeholder there, or remove the row."
            )
        messages = self._place_images(messages, images, where)

        text = self._render_prefix(messages, prefix, where, row)
        text_ids = self._encode(text)
        if self.placeholder is not None:
            has_template = self.uses_chat_template
            check_placeholders(text, len(images), self.placeholder, self.tokenizer, has_template, where)
            warn_about_bare_placeholders(text_ids, self.placeholder, self.tokenizer, where)
        self._check_media(text_ids, f"The prefix of {where}", allowed=self.placeholder)
        prefix_ids = self._process(text, images, where)
        step_ids = self._encode_steps_after(text, text_ids, messages, steps_of(pair), where, row)
        check_different(step_ids, where)

        overlong = self._overlong(prefix_ids, step_ids, where)
        if overlong and self.overlong_prefix == "truncate":
            limit = len(prefix_ids) - overlong
            rests = shorter_prefixes(prefix, [pair.chosen, pair.rejected])
            shorter = (self._render_prefix(messages, rest, where, row) for rest in rests)
            text, prefix_ids = self._first_that_fits(shorter, limit, len(prefix_ids) - len(text_ids), images, where)
        return {
            "prompt_ids": prefix_ids,
            "chosen_ids": step_ids["chosen"],
            "rejected_ids": step_ids["rejected"],
            PROMPT_TEXT: text,
            IMAGES_DIGEST: digest_images(images),
            "overlong": overlong,
        }

    def _place_images(self, messages: list[dict[str, Any]], images: Sequence[Any], where: str) -> list[dict[str, Any]]:
        """Return messages as lists of parts, with the images in their places."""
        if not self.uses_chat_template:
            return messages
        texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
        written = self.placeholder is not None and any(self.placeholder in text for text in texts)
        try:
            return list(prepare_multimodal_messages(messages, images=None if written else list(images)))
        except Exception as error:  # of any type for malformed messages
            raise ValueError(f"The images of {where} cannot be placed in its messages: {error}") from error

    def _render_prefix(self, messages: list[dict[str, Any]], prefix: str, where: str, row: Mapping[str, Any]) -> str:
        text = self.render(messages, prefix, where, row)
        return self._decode(self._leading_special_ids(text, self._encode(text))) + text

    def _process(self, text: str, images: list[Any], where: str) -> list[int]:
        """Return the tokens of a text with expanded placeholders, as the collator computes them in training."""
        try:
            # A copy, because some processors change the list
            batch = self.processor(
                text=[text], images=[list(images)] if images else None, return_tensors="pt", add_special_tokens=False
            )
        except Exception as error:  # processors can raise anything
            raise ValueError(
                f"The {type(self.processor).__name__} cannot process {where}: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. Fix or remove the row."
            ) from error
        return list(batch["input_ids"][0].tolist())

    def _first_that_fits(
        self, texts: Iterator[str], limit: int, added: int, images: list[Any], where: str
    ) -> tuple[str, list[int]]:
        """Return the first text with at most `limit` tokens. `added` is by how many tokens the images grow a text."""
        for text in texts:
            if len(self._encode(text)) + added > limit:  # images are processed only if this is likely to be the one
                continue
            ids = self._process(text, images, where)
            if len(ids) <= limit:
                return text, ids
        raise ValueError(
            f"{where} has more than max_length={self.max_length} tokens, even without the reasoning steps before the "
            "current one. Its prompt, its images and its steps are never truncated: increase `max_length`, or set "
            "`overlong_prefix='drop'` to drop such rows."
        )


@dataclass
class VisionStepCollator:
    """
    Data collator of step pairs with images, which composes the two collators of TRL.

    `DataCollatorForVisionPreference` receives the text of prompt and initial reasoning steps, which the processor
    tokenizes with the images, and the tokens of the two steps. Datasets that were tokenized without images are passed
    to the other collator.

    Args:
        processor (`ProcessorMixin`):
            Processor of the policy.
        text_collator (`Callable`):
            Collator for rows that were tokenized without images, usually
            [`~trl.trainer.dpo_trainer.DataCollatorForPreference`].
        always_images (`bool`, *optional*, defaults to `False`):
            Whether to add an image to batches without images. See `_add_unused_image`.
    """

    processor: ProcessorMixin
    text_collator: Callable[[list[dict[str, Any]]], Any]
    always_images: bool = False

    def __post_init__(self) -> None:
        processor: Any = TokenizedSteps(self.processor)
        self.vision_collator = DataCollatorForVisionPreference(processor=processor)

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """Collate examples into a batch with the chosen rows first."""
        if PROMPT_TEXT not in examples[0]:
            return self.text_collator(examples)
        batch = self.vision_collator(
            [
                {
                    "prompt": example[PROMPT_TEXT],
                    "chosen": example["chosen_ids"],
                    "rejected": example["rejected_ids"],
                    "images": load_images(example, f"the row with the prompt {example[PROMPT_TEXT][:80]!r}"),
                }
                for example in examples
            ]
        )
        if self.always_images and "pixel_values" not in batch:
            self._add_unused_image(batch)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch

    def _add_unused_image(self, batch: dict[str, Any]) -> None:
        """
        Append an image to the first pair, after its steps, so that all processes run the vision tower in each batch.

        ZeRO and FSDP would otherwise wait forever for the process whose batch has no image. The tokens of the steps
        come before the image and do not attend to it, so the loss is the same.
        """
        blank = PIL.Image.new("RGB", (64, 64))
        extra = self.processor(
            text=[_image_text(self.processor)] * 2,
            images=[[blank], [blank]],
            return_tensors="pt",
            add_special_tokens=False,
        )
        rows, new = batch["input_ids"].shape, extra["input_ids"].shape
        starts = batch["attention_mask"].sum(1)[[0, rows[0] // 2]].tolist()
        missing = max(0, max(starts) + new[1] - rows[1])
        for name in [*batch, *(name for name in extra if extra[name].shape == new)]:
            value = batch.get(name, torch.zeros(rows, dtype=torch.long))
            if value.shape != rows:
                continue
            padding = self.processor.tokenizer.pad_token_id if name == "input_ids" else 0
            value = torch.nn.functional.pad(value, (0, missing), value=padding)
            for row, start, number in zip((0, rows[0] // 2), starts, (0, 1), strict=True):
                value[row, start : start + new[1]] = extra[name][number] if name in extra else 0
            batch[name] = value
        batch.update({name: value for name, value in extra.items() if name not in batch})


COLLATORS.append(VisionStepCollator)  # its batches are those of TRL


class TokenizedSteps:
    """
    Processor whose completions are tokenized already.

    Args:
        processor (`ProcessorMixin`):
            Processor of the policy, which is called for texts.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def __call__(self, text: Sequence[Any], images: Any = None, **kwargs: Any) -> Mapping[str, Any]:
        """Process texts with images, or pad lists of token ids."""
        if isinstance(text[0], str):
            return dict(self.processor(text=text, images=images, **kwargs))
        ids = [torch.tensor(step) for step in text]
        ones = [torch.ones_like(step) for step in ids]
        padding = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        columns = {"input_ids": ids, "attention_mask": ones, "token_type_ids": [torch.zeros_like(one) for one in ones]}
        return {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding[name])
            for name, values in columns.items()
        }


def _image_text(processor: Any) -> str:
    """Return the text of an image in a prompt."""
    if not processor.chat_template:
        return framed_placeholder(processor.tokenizer, str(image_placeholder(processor)))
    content = [{"type": "image"}, {"type": "text", "text": ""}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))


def shorter_prefixes(prefix: str, steps: Sequence[str]) -> list[str]:
    """
    Return a prefix without its first step, without its first two steps, and so on.

    The beginning of the current step ("Step 3:") is kept.

    Args:
        prefix (`str`):
            Initial reasoning steps.
        steps (`Sequence[str]`):
            Steps that continue the prefix.

    Returns:
        `list[str]`: The shorter prefixes, from the longest to the shortest.
    """
    rests = (prefix[span.end :] for span in split_steps(prefix).spans)
    begins_line = all("\n" in step[: len(step) - len(step.lstrip())] for step in steps)
    # Without a line break after it, the last step is the current one
    return [rest.lstrip() for rest in rests if rest.strip() or begins_line or "\n" in rest]


def _without_nulls(prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Remove the null values that Arrow adds to message parts, because templates test whether a part has an image."""
    if isinstance(prompt, str):
        return prompt
    return [
        {
            **message,
            "content": [
                {name: value for name, value in part.items() if value is not None}
                if isinstance(part, Mapping)
                else part
                for part in message["content"]
            ],
        }
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]
