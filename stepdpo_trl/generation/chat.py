"""Tokenizers and chat templates."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from .protocol import GenerationError, ModelSpec, Request


def load_tokenizer(name: str, template: bool = True, **kwargs: Any) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer and check that it has a chat template.

    Args:
        name (`str`):
            Hub id or folder.
        template (`bool`, *optional*, defaults to `True`):
            Whether a chat template is required.
        **kwargs:
            Passed to `AutoTokenizer.from_pretrained`.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

    Raises:
        GenerationError: If the tokenizer cannot be loaded, or has no chat template although one is required.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise GenerationError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    if template and not tokenizer.chat_template:
        raise GenerationError(
            f"The tokenizer of {name!r} has no chat template, so the format of the model's prompts is unknown. Use an "
            "instruction-tuned model, or set `tokenizer.chat_template` and save the tokenizer in the model's folder."
        )
    return tokenizer


def check_model(spec: ModelSpec, template: bool = True) -> None:
    """
    Check that a model exists, without loading its weights.

    Args:
        spec (`ModelSpec`):
            The model. If a server has it, only its tokenizer is checked.
        template (`bool`, *optional*, defaults to `True`):
            Whether a chat template is required.

    Raises:
        GenerationError: If the model, its tokenizer or its adapter cannot be found.
    """
    load_tokenizer(spec.tokenizer or spec.model, template, revision=spec.tokenizer_revision)
    checked = f"model {spec.model!r}"
    try:
        if spec.backend != "openai":
            AutoConfig.from_pretrained(spec.model, revision=spec.revision)
        if spec.adapter is not None:
            from peft import PeftConfig

            checked = f"adapter {spec.adapter!r}"
            PeftConfig.from_pretrained(spec.adapter)
    except (OSError, ValueError) as error:
        raise GenerationError(f"The {checked} cannot be loaded: {error}") from error


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], response_prefix: str = "") -> str:
    """
    Render a conversation as the text of a prompt.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        messages (`Sequence[dict]`):
            The messages.
        response_prefix (`str`, *optional*, defaults to `""`):
            First words of the assistant's turn, appended after the generation prompt.

    Returns:
        `str`: The text.

    Raises:
        GenerationError: If the chat template fails.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates can raise anything
        roles = [message.get("role") for message in messages]
        raise GenerationError(
            f"The chat template of {tokenizer.name_or_path!r} cannot render a conversation of the roles {roles} "
            f"({type(error).__name__}: {error}). Use another model, or set another template in its tokenizer."
        ) from error
    return str(text) + response_prefix


def encode(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[int]:
    """
    Return the token ids of a request's prompt, without additional special tokens: a chat template contains them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        request (`Request`):
            The request.

    Returns:
        `list[int]`: The ids.
    """
    prompt: Any = request.prompt
    if prompt and isinstance(prompt[0], int):
        return list(prompt)
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
