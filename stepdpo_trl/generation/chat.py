"""The text that a chat template makes of a conversation."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from .protocol import GenerationError, ModelSpec


def load_tokenizer(name: str, template: bool = True, **kwargs: Any) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer, by default one that has a chat template.

    Raises:
        GenerationError: If it cannot be loaded, or has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise GenerationError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    if template and not tokenizer.chat_template:
        raise GenerationError(
            f"The tokenizer of {name!r} has no chat template, so it is not known how a question is put to the model. "
            "Take a model that was trained on conversations, or set `tokenizer.chat_template` and save it beside the "
            "model."
        )
    return tokenizer


def check_model(spec: ModelSpec, template: bool = True) -> None:
    """
    Find out, without loading the weights, whether a model is there.

    Args:
        spec (`ModelSpec`):
            The model. Of one behind a server, its tokenizer is looked at.
        template (`bool`, *optional*, defaults to `True`):
            Whether it needs a chat template.

    Raises:
        GenerationError: If something is missing.
    """
    load_tokenizer(spec.tokenizer or spec.model, template, revision=spec.tokenizer_revision)
    what = f"model {spec.model!r}"
    try:
        if spec.backend != "openai":
            AutoConfig.from_pretrained(spec.model, revision=spec.revision)
        if spec.adapter is not None:
            from peft import PeftConfig

            what = f"adapter {spec.adapter!r}"
            PeftConfig.from_pretrained(spec.adapter)
    except (OSError, ValueError) as error:
        raise GenerationError(f"The {what} cannot be loaded: {error}") from error


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], response_prefix: str = "") -> str:
    """Text of a conversation up to the assistant's turn, which begins with `response_prefix`."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return str(text) + response_prefix
