"""
Tokenization of step pairs.

The prefix (prompt and initial reasoning steps) is tokenized as at inference, where the model continues from it. Each
step is tokenized separately, as a continuation of the prefix, so that no token spans the boundary. The loss then
covers all tokens of the step and no others, and the policy is scored on the token sequences that it would generate.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data.prompts import PROMPT_SUFFIXES, PROMPT_TEMPLATES, resolve_text
from ..data.schema import StepPreference
from .rendering import PromptRenderer

OVERLONG_PREFIX_CHOICES = ("truncate", "drop", "error")


@dataclass(frozen=True)
class StepTokenizer(PromptRenderer):
    """
    Tokenizer of step pairs, which returns `prompt_ids`, `chosen_ids` and `rejected_ids` of a row.

    Args:
        tokenizer, chat_template, multimodal, system_prompt, prompt_suffix, prompt_template:
            As for [`~stepdpo_trl.step_dpo.rendering.PromptRenderer`].
        max_length (`int`, *optional*):
            Maximum number of tokens of a prefix and its step. If `None`, there is no limit.
        overlong_prefix (`str`, *optional*, defaults to `"truncate"`):
            How to handle longer rows: `"truncate"` truncates the prefix from the left, `"drop"` marks the row as
            overlong, `"error"` raises an error. Steps are never truncated.
        placeholder (`str`, *optional*):
            Text that stands for an image. Prompts of rows without images must not contain it.
        media_tokens (`dict[int, str]`, *optional*):
            Ids of tokens that stand for an image, a video or a sound in the inputs of the model, with the kind. Steps
            must not contain them, and prompts only the placeholders of their images.

    Raises:
        ValueError: If an option has an invalid value.
    """

    # Parts of messages about lengths
    COUNTED: ClassVar[str] = "prefix tokens"
    TRUNCATION: ClassVar[str] = "truncated from the left, with their steps kept whole"

    max_length: int | None = None
    overlong_prefix: str = "truncate"
    placeholder: str | None = None
    media_tokens: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_token_options(self.prompt_suffix, self.prompt_template, self.overlong_prefix)
        super().__post_init__()

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """
        Tokenize one step pair.

        Args:
            row (`Mapping[str, Any]`):
                Row with the columns of [`StepPreference`] and optionally `tools` and `chat_template_kwargs`, as for
                [`~trl.DPOTrainer`].
            where (`str`):
                Name of the row in error messages.

        Returns:
            `dict`: `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of token ids), and `overlong`, the number of
            prefix tokens that exceed `max_length`. They are removed if `overlong_prefix="truncate"`.

        Raises:
            ValueError: If the row is not a valid step pair, or is too long and cannot be truncated.
        """
        pair = StepPreference.from_row(row, where)
        prefix_ids, step_ids, overlong = self.encode_steps(
            pair.prompt, pair.initial_reason_steps, steps_of(pair), where, row
        )
        check_different(step_ids, where)
        return {
            "prompt_ids": prefix_ids,
            "chosen_ids": step_ids["chosen"],
            "rejected_ids": step_ids["rejected"],
            "overlong": overlong,
        }

    def encode_steps(
        self,
        prompt: str | list[dict[str, Any]],
        prefix: str,
        steps: Mapping[str, tuple[str, bool]],
        where: str,
        row: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], dict[str, list[int]], int]:
        """
        Tokenize a prefix and one or more steps that continue it.

        Args:
            prompt (`str` or `list[dict]`):
                Problem, or messages.
            prefix (`str`):
                Initial reasoning steps.
            steps (`Mapping[str, tuple[str, bool]]`):
                Steps by name, each with a flag that says whether it ends the solution.
            where (`str`):
                Name of the row in error messages.
            row (`Mapping[str, Any]`, *optional*):
                Row with `tools` and `chat_template_kwargs`, if there are any.

        Returns:
            `tuple[list[int], dict[str, list[int]], int]`: Token ids of the prefix, token ids of each step, and
            `overlong` as returned by `__call__`.

        Raises:
            ValueError: If the texts cannot be tokenized, or are too long and cannot be truncated.
        """
        row = row or {}
        messages, prefix = self.split_prompt(prompt, prefix, where)
        text = self.render(messages, prefix, where, row)
        if self.placeholder is not None and self.placeholder in text:
            raise ValueError(
                f"{where} has no images, but its prompt contains the image placeholder {self.placeholder!r}. Add its "
                "images in a column `images` (a list), or remove the placeholder."
            )
        text_ids = self._encode(text)
        self._check_media(text_ids, f"The prefix of {where}")
        prefix_ids = self._leading_special_ids(text, text_ids) + text_ids
        step_ids = self._encode_steps_after(text, text_ids, messages, steps, where, row)

        overlong = self._overlong(prefix_ids, step_ids, where)
        if overlong and self.overlong_prefix == "truncate":
            first, kept = prefix_ids[0], prefix_ids[overlong:]
            # Many models depend on BOS
            prefix_ids = [first, *kept[1:]] if first == self.tokenizer.bos_token_id and len(kept) > 1 else kept
        return prefix_ids, step_ids, overlong

    def _check_media(self, ids: list[int], what: str, allowed: str | None = None) -> None:
        """Check that a text contains no token of an image, a video or a sound, except for an allowed placeholder."""
        for token_id in sorted(self.media_tokens.keys() & set(ids)):
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if token != allowed:
                raise ValueError(
                    f"{what} contains {token!r}, which stands for {self.media_tokens[token_id]} data in the inputs of "
                    "the model. Remove it: only the images of a row are supported, and only in its prompt."
                )

    def _encode_steps_after(
        self,
        text: str,
        text_ids: list[int],
        messages: list[dict[str, Any]],
        steps: Mapping[str, tuple[str, bool]],
        where: str,
        row: Mapping[str, Any],
    ) -> dict[str, list[int]]:
        """Tokenize the steps that continue a text, with the end-of-turn token where a step ends the solution."""
        step_ids = {}
        for name, (step, ends) in steps.items():
            end_of_turn = self.end_of_turn(messages, where, row) if ends else ""
            if not step.rstrip().endswith(end_of_turn):
                step += end_of_turn
            step_ids[name] = self._encode_step(text, text_ids, step, f"`{name}` of {where}")
            self._check_media(step_ids[name], f"`{name}` of {where}")
        return step_ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _leading_special_ids(self, text: str, text_ids: list[int]) -> list[int]:
        """Return the special tokens (BOS) that the tokenizer prepends. Appended ones (EOS) would end the prefix."""
        if self.uses_chat_template:  # chat templates contain BOS
            return []
        with_special = self.tokenizer(text)["input_ids"]
        for start in range(len(with_special) - len(text_ids) + 1):
            if with_special[start : start + len(text_ids)] == text_ids:
                return with_special[:start]
        return []

    def _encode_step(self, prefix: str, prefix_ids: list[int], step: str, where: str) -> list[int]:
        expected = None
        # SentencePiece tokenizers with a dummy prefix prepend a space to every text. After an anchor, whose tokens are
        # removed again, the step is tokenized without it
        for anchor in ("", "\n", ":", "0"):
            anchor_ids = self._encode(anchor) if anchor else []
            ids = self._encode(anchor + step)
            if ids[: len(anchor_ids)] != anchor_ids:
                continue
            ids = ids[len(anchor_ids) :]
            decoded = self._decode(prefix_ids + ids)
            if decoded == prefix + step:
                return ids
            # Some tokenizers change the text (normalize, lowercase, drop unknown characters). The two parts must then
            # decode to the same text as the whole
            expected = expected or _normalize(self._decode(self._encode(prefix + step)))
            if ids and _normalize(decoded) == expected:
                return ids
        raise ValueError(
            f"{where} cannot be tokenized as a continuation: the tokens of the prefix and of the step do not decode "
            f"to {(prefix + step)[-60:]!r}. Move the boundary of the step to the beginning of a word."
        )

    def _overlong(self, prefix_ids: list[int], step_ids: dict[str, list[int]], where: str) -> int:
        """Return by how many tokens the row exceeds `max_length`."""
        if self.max_length is None:
            return 0
        longest = max(step_ids, key=lambda name: len(step_ids[name]))
        length = len(step_ids[longest])
        overlong = max(0, len(prefix_ids) + length - self.max_length)
        if length >= self.max_length and self.overlong_prefix != "drop":
            raise ValueError(
                f"`{longest}` of {where} has {length} tokens, which leaves no room for a prefix within "
                f"max_length={self.max_length}. Steps are never truncated: increase `max_length` to more than "
                f"{length}, or set `overlong_prefix='drop'` to drop such rows."
            )
        if overlong and self.overlong_prefix == "error":
            raise ValueError(
                f"{where} has {len(prefix_ids)} {self.COUNTED} and {length} step tokens, {overlong} more than "
                f"max_length={self.max_length}. Increase `max_length`, or set `overlong_prefix` to 'truncate' (such "
                f"rows are {self.TRUNCATION}) or 'drop' (they are dropped)."
            )
        return overlong


def steps_of(pair: StepPreference) -> dict[str, tuple[str, bool]]:
    """Return the two steps of a pair by name, each with a flag that says whether it ends the solution."""
    return {
        "chosen": (pair.chosen, pair.chosen_ends_solution),
        "rejected": (pair.rejected, pair.rejected_ends_solution),
    }


def check_different(step_ids: Mapping[str, list[int]], where: str) -> None:
    """
    Check that the two steps of a pair have different tokens.

    Raises:
        ValueError: If they have the same tokens.
    """
    if step_ids["chosen"] == step_ids["rejected"]:
        raise ValueError(
            f"`chosen` and `rejected` of {where} are different texts with the same tokens, so there is no "
            "preference to learn. Remove the row."
        )


def _normalize(text: str) -> str:
    # Tokenizers that normalize do not combine an accent at the boundary with the letter before it
    return unicodedata.normalize("NFKC", text)


def check_token_options(prompt_suffix: str | None, prompt_template: str | None, overlong_prefix: str) -> None:
    """
    Check the options that control the tokenization of step data. See [`StepTokenizer`] for their meaning.

    Raises:
        ValueError: If an option has an invalid value.
    """
    if prompt_suffix:
        resolve_text(prompt_suffix, PROMPT_SUFFIXES, "prompt_suffix")
    template = resolve_text(prompt_template or "plain", PROMPT_TEMPLATES, "prompt_template")
    if template.count("{prompt}") != 1:
        raise ValueError(f"`prompt_template={prompt_template!r}` must contain {{prompt}} exactly once.")
    if overlong_prefix not in OVERLONG_PREFIX_CHOICES:
        raise ValueError(f"`overlong_prefix={overlong_prefix!r}` must be one of {list(OVERLONG_PREFIX_CHOICES)}.")
