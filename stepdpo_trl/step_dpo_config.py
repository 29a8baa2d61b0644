"""Configuration of [`StepDPOTrainer`]."""

from dataclasses import dataclass, field

from trl import DPOConfig

from .tokenization import OVERLONG_PREFIX_CHOICES, check_options

# Options of StepDPOConfig that decide how step data becomes tokens
STEP_OPTIONS = ("system_prompt", "prompt_suffix", "prompt_template", "overlong_prefix")


@dataclass
class StepDPOConfig(DPOConfig):
    r"""
    Configuration of [`StepDPOTrainer`]: all of [`~trl.DPOConfig`], and how step data becomes tokens.

    The options below concern step data, that is rows with a column `initial_reason_steps`; plain preference data is
    treated as by [`~trl.DPOTrainer`].

    Args:
        system_prompt (`str`, *optional*):
            System message put before prompts that are strings.
        prompt_suffix (`str`, *optional*):
            Text put behind prompts that are strings, or a name: `"step-dpo"` is the instruction of the Step-DPO paper,
            `"\nPlease reason step by step, and put your final answer within \\boxed{}."`.
        prompt_template (`str`, *optional*):
            Layout of prompts that are strings, in place of the tokenizer's chat template: a name (`"plain"` is
            `"{prompt}\n"`, `"alpaca"` that of Stanford Alpaca) or a text with `{prompt}`, and `{system_prompt}` where
            there is one. The reasoning steps follow it directly. Defaults to the chat template, to `"plain"` where
            there is none.
        overlong_prefix (`str`, *optional*, defaults to `"truncate"`):
            What happens to a row with more than `max_length` tokens: `"truncate"` cuts its prefix (prompt and initial
            reasoning steps) from the left, `"drop"` leaves it out, `"error"` raises. How many rows that were is
            logged. A step is never cut.

    Raises:
        ValueError: If an option has an unusable value.
    """

    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message put before prompts that are strings. Step data only."},
    )
    prompt_suffix: str | None = field(
        default=None,
        metadata={
            "help": "Text put behind prompts that are strings, or a name: 'step-dpo' is the instruction of the "
            "Step-DPO paper. Step data only."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Layout of prompts that are strings, in place of the tokenizer's chat template: 'plain', "
            "'alpaca', or a text with {prompt} in it. Step data only."
        },
    )
    overlong_prefix: str = field(
        default="truncate",
        metadata={
            "help": "What happens to a row with more than `max_length` tokens: 'truncate' cuts its prefix from the "
            "left, 'drop' leaves it out, 'error' raises. A step is never cut. Step data only.",
            "choices": list(OVERLONG_PREFIX_CHOICES),
        },
    )

    def __post_init__(self) -> None:
        check_options(self.prompt_suffix, self.prompt_template, self.overlong_prefix)
        super().__post_init__()
