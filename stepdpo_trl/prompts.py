"""Prompt texts, as data.

Standard library only, so that the data pipeline can share them without importing torch.
"""

import re
from difflib import get_close_matches

# What the user is asked in addition to the problem, by name.
PROMPT_SUFFIXES: dict[str, str] = {
    # Step-DPO, released training script for the Qwen2 models
    "step-dpo": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
}

# Layouts in place of a chat template, by name. The steps follow the last character.
PROMPT_TEMPLATES: dict[str, str] = {
    "plain": "{prompt}\n",
    # Stanford Alpaca, used by the released Step-DPO scripts for models without a chat template
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{prompt}\n\n### Response:"
    ),
}


def resolve_text(value: str, known: dict[str, str], option: str) -> str:
    """
    Return the text that `value` names in `known`, or `value` itself where it is the text.

    Args:
        value (`str`):
            A name or a literal text. What looks like a name (letters, digits, `-` and `_` alone) must be a known one,
            so that a misspelt name is never taken for a text.
        known (`dict[str, str]`):
            Texts by name.
        option (`str`):
            Name of the option, for the error message.

    Returns:
        `str`: The text.

    Raises:
        ValueError: If `value` looks like a name and is not known.
    """
    if value in known:
        return known[value]
    if not re.fullmatch(r"[\w-]*", value, re.ASCII):
        return value
    nearest = get_close_matches(value, known, n=1, cutoff=0.0)
    raise ValueError(
        f"`{option}={value!r}` looks like a name but is not a known one. Did you mean {nearest[0]!r}? Pass one of "
        f"{sorted(known)}, or the whole text."
    )
