"""Prompt texts.

Standard library only, so that the data pipeline can use them without importing torch.
"""

import re
from dataclasses import dataclass

from .messages import did_you_mean

# Texts appended to the problem in the user turn, by name.
PROMPT_SUFFIXES: dict[str, str] = {
    # Step-DPO, released training script for the Qwen2 models
    "step-dpo": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
}

# Layouts for models without a chat template, by name. The steps follow the last character.
PROMPT_TEMPLATES: dict[str, str] = {
    "plain": "{prompt}\n",
    # Stanford Alpaca, used by the released Step-DPO scripts for models without a chat template
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{prompt}\n\n### Response:"
    ),
}


@dataclass(frozen=True)
class StepPrompt:
    """
    Prompt that asks a model to solve a problem step by step.

    Args:
        user (`str`):
            User message, a Jinja template that contains `{{ problem }}`.
        response_prefix (`str`, *optional*, defaults to `""`):
            Text that every response starts with. The model continues it, and it is part of the solution.
    """

    user: str
    response_prefix: str = ""


# Prompts for collecting solutions, by name.
STEP_PROMPTS: dict[str, StepPrompt] = {
    # Step-DPO, section 3.2 and the released scripts for the Qwen2 models
    "qwen2-boxed": StepPrompt("{{ problem }}" + PROMPT_SUFFIXES["step-dpo"], "Let's think step by step.\nStep 1:"),
    "plain": StepPrompt("{{ problem }}"),
}

# Judge prompts with and without the gold answer: Jinja templates over `problem`, `answer`, `solution` (from the
# dataset) and `steps`. The reply format is that of ProcessBench (arXiv 2412.06559).
JUDGE_PROMPTS: dict[str, str] = {
    "gold": """\
Here are a math problem, its correct answer{% if solution %} and solution{% endif %}, and a student's solution, split \
into numbered steps.

[Problem]
{{ problem }}

[Correct answer]
{{ answer }}
{% if solution %}
[Correct solution]
{{ solution }}
{% endif %}
[Student's solution]
{% for step in steps %}<step_{{ loop.index }}>
{{ step }}
</step_{{ loop.index }}>
{% endfor %}
Check the student's steps one after the other. The student may go another way than the correct solution. Find the \
first step that is wrong: a false calculation, a false claim, or one that cannot lead to the correct answer. Explain \
briefly, then end with the number of that first wrong step in \\boxed{}, or with \\boxed{-1} if no step is wrong.""",
    "no-gold": """\
Here are a math problem and a solution, split into numbered steps.

[Problem]
{{ problem }}

[Solution]
{% for step in steps %}<step_{{ loop.index }}>
{{ step }}
</step_{{ loop.index }}>
{% endfor %}
Check the steps one after the other. Find the first step that is wrong. Explain briefly, then end with the number of \
that first wrong step in \\boxed{}, or with \\boxed{-1} if no step is wrong.""",
}


def resolve_text(value: str, known: dict[str, str], option: str) -> str:
    """
    Return the text with the name `value`, or `value` itself if it is a literal text.

    Args:
        value (`str`):
            Name or literal text. A value that looks like a name (only letters, digits, `-` and `_`) must be a known
            name, so that a misspelled name is never used as text.
        known (`dict[str, str]`):
            Texts by name.
        option (`str`):
            Name of the option for the error message.

    Returns:
        `str`: The text.

    Raises:
        ValueError: If `value` looks like a name but is unknown.
    """
    if value in known:
        return known[value]
    if not re.fullmatch(r"[\w-]*", value, re.ASCII):
        return value
    raise ValueError(
        f"`{option}={value!r}` looks like a name but is unknown.{did_you_mean(value, known)} Pass one of "
        f"{sorted(known)}, or the full text."
    )
