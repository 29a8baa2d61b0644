"""Configuration of [`StepDPOTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from .tokenization import OVERLONG_PREFIX_CHOICES, check_token_options

# Options of StepDPOConfig that control the tokenization of step data
STEP_OPTIONS = ("system_prompt", "prompt_suffix", "prompt_template", "overlong_prefix")
SHARED_PREFIX_CHOICES = ("auto", "on", "off")
# Options that transformers 5.23 renamed, with their older names, which TRL uses and transformers 6 will remove
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


@dataclass
class StepDPOConfig(DPOConfig):
    r"""
    Configuration class for the [`StepDPOTrainer`].

    This class includes only the parameters that are specific to Step-DPO training. For the other training arguments,
    please refer to [`~trl.DPOConfig`].

    Args:
        > Parameters that control the tokenization of step data, i.e. rows with a column `initial_reason_steps`

        system_prompt (`str`, *optional*):
            System message prepended to string prompts.
        prompt_suffix (`str`, *optional*):
            Text appended to string prompts, or the name of a known text. `"step-dpo"` is the instruction of the
            Step-DPO paper, `"\nPlease reason step by step, and put your final answer within \\boxed{}."`.
        prompt_template (`str`, *optional*):
            Layout of string prompts that replaces the tokenizer's chat template: `"plain"` for `"{prompt}\n"`,
            `"alpaca"` for the layout of Stanford Alpaca, or a text that contains `{prompt}` and, if there is a system
            prompt, `{system_prompt}`. The reasoning steps follow directly. If `None`, the chat template is used, or
            `"plain"` if the tokenizer has no chat template.
        overlong_prefix (`str`, *optional*, defaults to `"truncate"`):
            How to handle rows with more than `max_length` tokens: `"truncate"` truncates the prefix (prompt and
            initial reasoning steps) from the left, `"drop"` removes the row, `"error"` raises an error. The number of
            affected rows is logged. Steps are never truncated. In data with images, `"truncate"` removes whole
            reasoning steps from the left, and raises an error if that does not suffice.

        > Parameters that control the cost of training, for step data and ordinary preference data

        shared_prefix (`str`, *optional*, defaults to `"auto"`):
            Whether to compute the tokens that sequences of a batch have in common (the prefix of a pair, the problem
            of several pairs) only once. `"auto"` does so when the result is exact, and logs the reason when it is
            not. `"on"` raises an error when it is not exact. `"off"` computes padded sequences, like
            [`~trl.DPOTrainer`]. Loss, gradients and metrics are the same up to the order of floating-point additions.
        max_tokens_per_forward (`int`, *optional*):
            Maximum number of tokens in a forward pass with shared prefixes, where shared tokens count once. A larger
            batch is split into several forward passes and has the same gradient; all of them but one are recomputed
            in the backward pass. If `None`, batches are not split.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Whether to put pairs with the same `prompt` next to each other, so that more tokens of a batch are shared.
            Prompts are shuffled instead of rows, so the order of training differs from [`~trl.DPOTrainer`]'s.
        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether to recompute activations in the backward pass, which saves memory. As in [`~trl.DPOConfig`], it is
            enabled by default. `gradient_checkpointing` is its older name. Both names work with all supported versions
            of transformers.
        activation_checkpointing_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments for activation checkpointing. `gradient_checkpointing_kwargs` is its older name.

    Raises:
        ValueError: If an option has an invalid value.
    """

    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message prepended to string prompts. Step data only."},
    )
    prompt_suffix: str | None = field(
        default=None,
        metadata={
            "help": "Text appended to string prompts, or the name of a known text: 'step-dpo' is the instruction of "
            "the Step-DPO paper. Step data only."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Layout of string prompts that replaces the tokenizer's chat template: 'plain', 'alpaca', or a "
            "text that contains {prompt}. Step data only."
        },
    )
    overlong_prefix: str = field(
        default="truncate",
        metadata={
            "help": "How to handle rows with more than `max_length` tokens: 'truncate' truncates the prefix from the "
            "left, 'drop' removes the row, 'error' raises an error. Steps are never truncated. Step data only.",
            "choices": list(OVERLONG_PREFIX_CHOICES),
        },
    )

    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "Whether to compute the tokens that sequences of a batch have in common only once: 'auto' does so "
            "when the result is exact and logs the reason when it is not, 'on' raises an error when it is not exact, "
            "'off' computes padded sequences.",
            "choices": list(SHARED_PREFIX_CHOICES),
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens in a forward pass with shared prefixes, where shared tokens count once. "
            "A larger batch is split into several forward passes and has the same gradient."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Whether to put pairs with the same prompt next to each other, so that more tokens of a batch are "
            "shared."
        },
    )

    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to recompute activations in the backward pass, which saves memory and makes training "
            "slower. Enabled by default.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments for activation checkpointing, such as use_reentrant."},
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # None tells which name was set
        default=None,
        metadata={"help": "Older name of `activation_checkpointing`.", "nargs": "?", "const": True},
    )

    def __post_init__(self) -> None:
        check_token_options(self.prompt_suffix, self.prompt_template, self.overlong_prefix)
        self._check_sharing()
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        for new, old in RENAMED.items():
            value = getattr(self, new)
            setattr(self, old, getattr(self, old) if value is None else value)
            setattr(self, new, getattr(self, old))  # transformers warns if only the older name is set
        super().__post_init__()
        for new, old in RENAMED.items():  # transformers before 5.23 parses only the older name
            setattr(self, new, getattr(self, old))

    def _check_sharing(self) -> None:
        if self.shared_prefix not in SHARED_PREFIX_CHOICES:
            raise ValueError(f"`shared_prefix={self.shared_prefix!r}` must be one of {list(SHARED_PREFIX_CHOICES)}.")
        budget = self.max_tokens_per_forward
        if budget is None:
            return
        if self.shared_prefix == "off":
            raise ValueError(
                f"`max_tokens_per_forward={budget}` has no effect with `shared_prefix='off'`. Remove one of the two."
            )
        longest = self.max_length or 1
        if budget < longest:
            raise ValueError(
                f"`max_tokens_per_forward={budget}` is too small for one sequence, which can have {longest} tokens "
                "(`max_length`). Increase `max_tokens_per_forward`, or decrease `max_length`."
            )
