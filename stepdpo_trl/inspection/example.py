"""Pairs and solutions as parts, with tokens and log-probabilities. Standard library only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Kinds of parts: of a pair, and of a solution
CHOSEN, REJECTED = "chosen", "rejected"
STEP, FIRST_WRONG_STEP = "step", "first-wrong-step"


@dataclass(frozen=True)
class Token:
    """
    Token of a step.

    Args:
        id (`int`):
            Token id.
        text (`str`):
            Text that the token adds. Empty if the token ends inside a character.
        policy (`float`, *optional*):
            Log-probability under the policy, in nats.
        reference (`float`, *optional*):
            Log-probability under the reference model, in nats.
    """

    id: int
    text: str
    policy: float | None = None
    reference: float | None = None

    @property
    def ratio(self) -> float | None:
        """Log-ratio, log π - log π_ref. `None` if either is missing."""
        return None if self.policy is None or self.reference is None else self.policy - self.reference


@dataclass(frozen=True)
class Part:
    """
    Step or answer, with the prefix that it continues.

    Args:
        kind (`str`):
            `"chosen"` or `"rejected"` in a pair; `"step"` or `"first-wrong-step"` in a solution.
        title (`str`):
            Heading.
        text (`str`):
            Text of the step.
        lead (`str`, *optional*, defaults to `""`):
            Text between the previous part and this one, such as "Step 2:".
        ends (`bool`, *optional*, defaults to `False`):
            Whether the solution ends with this step.
        prefix_ids (`list[int]`, *optional*):
            Token ids of everything before the step, as the model reads them.
        tokens (`tuple[Token, ...]`, *optional*):
            Tokens of the step. Empty without a tokenizer.
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
        """Log-probability of the step under the policy: `logps/chosen` or `logps/rejected` of the trainer."""
        return _sum(token.policy for token in self.tokens)

    @property
    def reference(self) -> float | None:
        """Log-probability of the step under the reference model."""
        return _sum(token.reference for token in self.tokens)

    @property
    def ratio(self) -> float | None:
        """Log-ratio of the step."""
        return _sum(token.ratio for token in self.tokens)


@dataclass(frozen=True)
class Example:
    """
    Pair or solution.

    Args:
        name (`str`):
            Short name, such as "row 3".
        where (`str`):
            Full name for headings and errors, such as "row 3 of pairs.jsonl".
        context (`tuple[tuple[str, str], ...]`):
            Titles and texts of everything before the steps.
        parts (`tuple[Part, ...]`):
            Both steps of a pair, or all steps of a solution.
        facts (`tuple[tuple[str, str], ...]`, *optional*):
            Names and values of other information, such as the outcome.
        row (`Mapping[str, Any]`, *optional*):
            Row of the dataset. For a solution, its `prompt` and the `prefixes` of its steps.
        images (`tuple[PIL.Image.Image, ...]`, *optional*):
            Images of the row.
        batch (`Mapping[str, Any]`, *optional*):
            Model inputs for both steps of a pair with images. Empty without images or without tokens.
    """

    name: str
    where: str
    context: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    facts: tuple[tuple[str, str], ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Any, ...] = ()
    batch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_pair(self) -> bool:
        """`True` for a preference pair, `False` for a solution."""
        return self.parts[0].kind == CHOSEN

    def margin(self, beta: float) -> float | None:
        """Return the implicit reward margin, `rewards/margins` of the trainer. `None` without both log-ratios."""
        ratios = [part.ratio for part in self.parts]
        return beta * (ratios[0] - ratios[1]) if self.is_pair and None not in ratios else None  # type: ignore[operator]


@dataclass(frozen=True)
class Scoring:
    """
    Models that computed the log-probabilities.

    Args:
        policy (`str`, *optional*):
            Name of the policy. `None` without log-probabilities.
        reference (`str`, *optional*):
            Name of the reference model. `None` without log-ratios.
        beta (`float`, *optional*, defaults to `0.1`):
            Factor of the implicit reward.
    """

    policy: str | None = None
    reference: str | None = None
    beta: float = 0.1


def strongest_ratio(examples: Iterable[Example]) -> float:
    """Return the largest absolute log-ratio of a token, which scales the colors. 0 if no token has one."""
    tokens = (token for example in examples for part in example.parts for token in part.tokens)
    return max((abs(token.ratio) for token in tokens if token.ratio is not None), default=0.0)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
