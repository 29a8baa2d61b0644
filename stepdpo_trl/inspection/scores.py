"""Tokens of a row as the trainer makes them, and their log-probabilities in a plain forward pass."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import create_model_from_path

from ..data.schema import is_step_data
from ..generation.model_folders import adapter_base
from ..step_dpo.config import StepDPOConfig
from ..step_dpo.trainer import StepDPOTrainer, make_step_tokenizer
from ..step_dpo.vision import PROMPT_TEXT, VisionStepCollator
from .example import Example, Part, Token
from .text import format_token_count

_BROKEN = "\ufffd"  # decoded in place of an incomplete character


class RowEncoder:
    """
    Tokenizer of examples that gives the same tokens as the trainer.

    Args:
        processing_class (`Any`):
            Tokenizer or processor of the policy.
        args ([`StepDPOConfig`]):
            Training configuration.
    """

    def __init__(self, processing_class: Any, args: StepDPOConfig) -> None:
        self.processing_class, self.args = processing_class, args
        self.tokenizer: PreTrainedTokenizerBase = getattr(processing_class, "tokenizer", processing_class)
        self.encode_steps = make_step_tokenizer(processing_class, args)

    def __call__(self, example: Example) -> Example:
        """
        Add the tokens of each part, and replace the context by the text that the model reads.

        Args:
            example (`Example`):
                Pair or solution.

        Returns:
            `Example`: The example with tokens.

        Raises:
            ValueError: If the row cannot be tokenized, or the trainer drops it.
        """
        if not example.is_pair:
            parts, cut = self._solution(example)
        elif example.images:
            return self._with_images(example)
        elif is_step_data(example.row):
            ids = self.encode_steps(example.row, example.where)
            parts = [self._tokens(part, ids["prompt_ids"], ids[f"{part.kind}_ids"]) for part in example.parts]
            cut = ids["overlong"]
        else:
            return self._plain(example)
        return self._with_context(replace(example, parts=tuple(parts), facts=example.facts + self._cut(cut)))

    def _cut(self, tokens: int) -> tuple[tuple[str, str], ...]:
        """Fact that tokens of the prefix were left out."""
        if not tokens:
            return ()
        note = f"{tokens} tokens from the start of the prefix, as in training (max_length={self.args.max_length})"
        return (("left out", note),)

    def _with_images(self, example: Example) -> Example:
        """Step pair with images, and the batch of the trainer's collator for it."""
        processor = self.processing_class
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"{example.where} has images, but {type(processor).__name__} is the tokenizer of a text model. Pass a "
                "vision-language model, or neither --model nor --tokenizer to show texts and images."
            )
        if not is_step_data(example.row):
            raise ValueError(
                f"{example.where} is an ordinary preference pair with images, whose tokens cannot be shown. Remove "
                "--model and --tokenizer to show its texts and images."
            )
        # With the loaded images, so that each is read once
        row = {name: value for name, value in example.row.items() if name not in ("image", "images")}
        row["images"] = list(example.images)
        encoded = make_step_tokenizer(processor, self.args, images=True)(row, example.where)
        if self.tokenizer.pad_token_id is None:  # as in DPOTrainer
            self.tokenizer.pad_token = self.tokenizer.eos_token
        collator = VisionStepCollator(processor, text_collator=list)
        batch = collator([{**row, **encoded}])
        is_prefix = batch["attention_mask"].bool() & ~batch["completion_mask"].bool()
        prefix_ids = batch["input_ids"][0][is_prefix[0]].tolist()
        parts = [self._tokens(part, prefix_ids, encoded[f"{part.kind}_ids"]) for part in example.parts]
        title = f"prefix as the model reads it, {format_token_count(prefix_ids)}, each image shown as one placeholder"
        return replace(
            example,
            parts=tuple(parts),
            facts=example.facts + self._cut(encoded["overlong"]),
            context=((title, encoded[PROMPT_TEXT]),),
            batch=batch,
        )

    def _solution(self, example: Example) -> tuple[list[Part], int]:
        """Return the parts of a solution, tokenized after their prefixes, and the most tokens cut from a prefix."""
        parts, max_cut = [], 0
        for part, prefix in zip(example.parts, example.row["prefixes"], strict=True):
            where = f"{_short_title(part)} of {example.where}"
            prefix_ids, ids, cut = self.encode_steps.encode_steps(
                example.row["prompt"], prefix, {part.kind: (part.text, part.ends)}, where
            )
            parts.append(self._tokens(part, prefix_ids, ids[part.kind]))
            max_cut = max(max_cut, cut)
        return parts, max_cut

    def _plain(self, example: Example) -> Example:
        """Add the tokens of DPOTrainer, which truncates the end, to an ordinary preference pair."""
        max_length: Any = self.args.max_length
        prepared = _Preparer(self.tokenizer)._prepare_dataset(
            Dataset.from_list([dict(example.row)]), self.processing_class, self.args, example.where
        )
        ids = prepared[0] if len(prepared) else None
        room = None if max_length is None or ids is None else max_length - len(ids["prompt_ids"])
        if ids is None or (room is not None and room <= 0):
            raise ValueError(
                f"The prompt of {example.where} fills max_length={max_length}, so the trainer drops the row. Increase "
                "max_length."
            )
        parts, facts = [], list(example.facts)
        for part in example.parts:
            step_ids = ids[f"{part.kind}_ids"]
            parts.append(self._tokens(part, ids["prompt_ids"], step_ids[:room]))
            if room is not None and len(step_ids) > room:
                note = f"{len(step_ids) - room} tokens from the end of the {part.title}, as in training"
                facts.append(("left out", f"{note} (max_length={max_length})"))
        return self._with_context(replace(example, parts=tuple(parts), facts=tuple(facts)))

    def _tokens(self, part: Part, prefix_ids: list[int], ids: list[int]) -> Part:
        texts = self._texts(prefix_ids, ids)
        tokens = tuple(Token(token, text) for token, text in zip(ids, texts, strict=True))
        return replace(part, prefix_ids=prefix_ids, tokens=tokens)

    def _texts(self, prefix_ids: list[int], ids: list[int]) -> list[str]:
        """Return the text that each token adds. Decodes after a prefix token: some tokenizers drop the first space."""
        before = prefix_ids[-1:]
        texts, decoded = [], self._decode(before)
        for end in range(1, len(ids) + 1):
            longer = self._decode(before + ids[:end])
            if longer.endswith(_BROKEN) and end < len(ids):
                texts.append("")
            else:
                texts.append(longer[len(decoded) :])
                decoded = longer
        return texts

    def _with_context(self, example: Example) -> Example:
        ids = example.parts[0].prefix_ids
        title = f"prefix as the model reads it, {format_token_count(ids)}"
        return replace(example, context=((title, self._decode(ids)),))

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def _short_title(part: Part) -> str:
    return part.title.partition(",")[0]


class _Preparer(StepDPOTrainer):
    """Trainer without a model, to prepare rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer


def load_processing_class(name: str) -> Any:
    """
    Load the tokenizer or processor that the trainer would load.

    Args:
        name (`str`):
            Id or folder of a model, or folder of an adapter. An adapter without a tokenizer uses that of its base
            model.

    Returns:
        `Any`: Tokenizer or processor.

    Raises:
        ValueError: If it cannot be loaded.
    """
    base = adapter_base(name)
    if base is not None and not (Path(name) / "tokenizer_config.json").is_file():
        name = base
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error


def score(examples: Sequence[Example], model: str, role: str, dtype: str = "float32") -> list[Example]:
    """
    Add the log-probabilities of all tokens under a model. The model is in memory only during the call.

    Args:
        examples (`Sequence[Example]`):
            Examples with tokens.
        model (`str`):
            Id or folder of a model, or folder of an adapter.
        role (`str`):
            `"policy"` or `"reference"`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type of the weights.

    Returns:
        `list[Example]`: The examples with log-probabilities.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    causal = _load_model(model, dtype)
    scored = []
    for example in examples:
        if example.batch:
            parts = _score_batch(example, causal, role)
        else:
            parts = [_score_part(part, causal, role, example.where) for part in example.parts]
        scored.append(replace(example, parts=tuple(parts)))
    return scored


def _load_model(name: str, dtype: str) -> Any:
    base = adapter_base(name)
    try:
        model: Any = create_model_from_path(base or name, dtype=dtype)
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: shapes of the adapter do not match
        raise ValueError(f"The model {name!r} cannot be loaded: {error}") from error
    return model.eval()


@torch.no_grad()
def _score_part(part: Part, model: Any, role: str, where: str) -> Part:
    step = [token.id for token in part.tokens]
    if not part.prefix_ids:
        raise ValueError(
            f"There is no token before {_short_title(part)} of {where}, so its first token has no probability. Use a "
            "tokenizer with a chat template or a BOS token."
        )
    ids = torch.tensor([part.prefix_ids + step], device=model.device)
    # (tokens, vocab): the token at position t is predicted at t - 1
    logits = model(input_ids=ids).logits[0, len(part.prefix_ids) - 1 : -1].float()
    logps = logits.log_softmax(-1).gather(-1, ids[0, len(part.prefix_ids) :, None])[:, 0]
    return _with_logps(part, logps, role)


@torch.no_grad()
def _score_batch(example: Example, model: Any, role: str) -> list[Part]:
    """Score both steps of a pair with images in one padded forward pass."""
    batch = {name: value.to(model.device) for name, value in example.batch.items()}
    is_step, ids = batch.pop("completion_mask").bool(), batch["input_ids"]
    try:
        logits = model(**batch).logits[:, :-1].float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The model cannot read the images of {example.where} ({type(error).__name__}: {error}). Pass the "
            "vision-language model of the processor."
        ) from error
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (2, seq - 1)
    return [_with_logps(part, logps[i][is_step[i, 1:]], role) for i, part in enumerate(example.parts)]


def _with_logps(part: Part, logps: torch.Tensor, role: str) -> Part:
    scored = (replace(token, **{role: logp}) for token, logp in zip(part.tokens, logps.tolist(), strict=True))
    return replace(part, tokens=tuple(scored))
