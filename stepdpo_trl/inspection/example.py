"""What is looked at: a pair or a solution in parts, and their tokens with log-probabilities. Standard library only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

CHOSEN, REJECTED = "chosen", "rejected"  # kinds of parts: those of a pair,
STEP, WRONG = "step", "wrong"  # and those of a solution


@dataclass(frozen=True)
class Token:
    """
    A token of a step.

    Args:
        id (`int`):
            Its number in the vocabulary.
        text (`str`):
            What it adds to the text. Nothing where it ends within a character.
        policy (`float`, *optional*):
            Its log-probability under the policy, in nats.
        reference (`float`, *optional*):
            The same under the reference.
    """

    id: int
    text: str
    policy: float | None = None
    reference: float | None = None

    @property
    def ratio(self) -> float | None:
        """log pi - log pi_ref, where both are known."""
        return None if self.policy is None or self.reference is None else self.policy - self.reference


@dataclass(frozen=True)
class Part:
    """
    A step, with what it continues.

    Args:
        kind (`str`):
            `"chosen"`, `"rejected"`, `"step"` or `"wrong"`.
        title (`str`):
            What to call it.
        text (`str`):
            The step.
        lead (`str`, *optional*, defaults to `""`):
            What stands between it and the part before, such as "Step 2:".
        ends (`bool`, *optional*, defaults to `False`):
            Whether the solution ends with it.
        prefix_ids (`list[int]`, *optional*):
            Tokens of all that stands before it, as the model reads them.
        tokens (`tuple[Token, ...]`, *optional*):
            Its tokens, where a tokenizer is known.
    """

    kind: str
    title: str
    text: str
    lead: str = ""
    ends: bool = False
    prefix_ids: list[int] = field(default_factory=list)
    tokens: tuple[Token, ...] = ()

    @property
    def policy(self) -> float | None:
        """Log-probability of the step under the policy: `logps/chosen`, `logps/rejected` of the trainer."""
        return _sum(token.policy for token in self.tokens)

    @property
    def reference(self) -> float | None:
        """The same under the reference."""
        return _sum(token.reference for token in self.tokens)

    @property
    def ratio(self) -> float | None:
        """The log-ratio of the step."""
        return _sum(token.ratio for token in self.tokens)


@dataclass(frozen=True)
class Example:
    """
    A pair or a solution.

    Args:
        name (`str`):
            Such as "row 3".
        where (`str`):
            The same for errors, such as "row 3 of pairs.jsonl".
        context (`tuple[tuple[str, str], ...]`):
            Titles and texts of what stands before the steps.
        parts (`tuple[Part, ...]`):
            The two steps of a pair, or the steps of a solution.
        facts (`tuple[tuple[str, str], ...]`, *optional*):
            What else is known of it.
        row (`Mapping[str, Any]`, *optional*):
            The row of the data set; of a solution `prompt`, and `prefixes` of its steps.
    """

    name: str
    where: str
    context: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    facts: tuple[tuple[str, str], ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_pair(self) -> bool:
        """Whether it has a preferred and an undesirable side."""
        return self.parts[0].kind == CHOSEN

    def margin(self, beta: float) -> float | None:
        """Implicit reward margin of a pair, `rewards/margins` of the trainer, where there is a reference."""
        ratios = [part.ratio for part in self.parts]
        return beta * (ratios[0] - ratios[1]) if self.is_pair and None not in ratios else None  # type: ignore[operator]


@dataclass(frozen=True)
class Scoring:
    """
    What log-probabilities are of.

    Args:
        policy (`str`, *optional*):
            The policy, where there is one.
        reference (`str`, *optional*):
            The reference, where there is one.
        beta (`float`, *optional*, defaults to `0.1`):
            Factor of the implicit reward.
    """

    policy: str | None = None
    reference: str | None = None
    beta: float = 0.1


def strongest_ratio(examples: Iterable[Example]) -> float:
    """The largest |log-ratio| of a token, 0 where there are none: what colours are measured by."""
    tokens = (token for example in examples for part in example.parts for token in part.tokens)
    return max((abs(token.ratio) for token in tokens if token.ratio is not None), default=0.0)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
