"""Configuration of [`StepDPOTrainer`]."""

from dataclasses import dataclass, field

from trl import DPOConfig

from .tokenization import OVERLONG_PREFIX_CHOICES, check_token_options

# Options of StepDPOConfig that decide how step data becomes tokens
STEP_OPTIONS = ("system_prompt", "prompt_suffix", "prompt_template", "overlong_prefix")
SHARED_PREFIX_CHOICES = ("auto", "on", "off")


@dataclass
class StepDPOConfig(DPOConfig):
    r"""
    Configuration of [`StepDPOTrainer`]: all of [`~trl.DPOConfig`], how step data becomes tokens, and what is
    computed once.

    The first four options concern step data, that is rows with a column `initial_reason_steps`; plain preference data
    is tokenized as by [`~trl.DPOTrainer`]. The others concern the cost of training, for all data.

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
        shared_prefix (`str`, *optional*, defaults to `"auto"`):
            Whether the tokens that the sequences of a batch begin with alike (the prefix of a pair, the problem of
            several pairs) are computed once: `"auto"` does where it is exact and says why where not, `"on"` raises
            there, `"off"` computes padded sequences as [`~trl.DPOTrainer`] does. Loss, gradients and metrics are the
            same but for the order in which floats are added.
        max_tokens_per_forward (`int`, *optional*):
            Most tokens computed at a time where prefixes are shared, shared ones counted once. A batch with more goes
            through the model in parts, with the same gradient; all but one of the parts are computed twice. `None`
            for no limit.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Whether pairs with the same `prompt` follow each other, so that batches share more. Prompts are shuffled,
            which is another order than [`~trl.DPOTrainer`]'s.

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

    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "Whether tokens that the sequences of a batch begin with alike are computed once: 'auto' does "
            "where it is exact and says why where not, 'on' raises there, 'off' computes padded sequences.",
            "choices": list(SHARED_PREFIX_CHOICES),
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens computed at a time where prefixes are shared, shared ones counted once. A batch with "
            "more goes through the model in parts, with the same gradient."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={"help": "Whether pairs with the same prompt follow each other, so that batches share more."},
    )

    def __post_init__(self) -> None:
        check_token_options(self.prompt_suffix, self.prompt_template, self.overlong_prefix)
        self._check_sharing()
        super().__post_init__()

    def _check_sharing(self) -> None:
        if self.shared_prefix not in SHARED_PREFIX_CHOICES:
            raise ValueError(f"`shared_prefix={self.shared_prefix!r}` must be one of {list(SHARED_PREFIX_CHOICES)}.")
        most = self.max_tokens_per_forward
        if most is None:
            return
        if self.shared_prefix == "off":
            raise ValueError(
                f"`max_tokens_per_forward={most}` has no effect with `shared_prefix='off'`. Leave one of them out."
            )
        if most < (self.max_length or 1):
            raise ValueError(
                f"`max_tokens_per_forward={most}` must hold at least one sequence, and those have up to "
                f"{self.max_length or 1} tokens (`max_length`). Raise it, or lower `max_length`."
            )
