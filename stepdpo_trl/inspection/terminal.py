"""Pairs and solutions on a terminal, with the values of each token below it. Colors show the same values."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from .example import CHOSEN, FIRST_WRONG_STEP, REJECTED, Example, Part, Scoring, Token, strongest_ratio
from .text import (
    NEWLINE,
    PART_OF_CHARACTER,
    SPACE,
    TAB,
    columns,
    format_token_count,
    format_value,
    ratio_digits,
    shorten,
    split_marks,
    visible_text,
    visible_token,
    wrap,
)

_DIM, _BOLD, _GREEN, _RED = "2", "1", "32", "31"
_INK = {CHOSEN: _GREEN, REJECTED: _RED, FIRST_WRONG_STEP: _RED}
# Backgrounds under white text, from weak to strong. These of the 256 colors look alike on all terminals
_RAISED, _LOWERED = ("65", "28", "34"), ("95", "124", "160")
_MIN_SHARE = 0.05  # of the strongest ratio, below which a token has no background
_NAMES = ("log π", "ratio")
_GUTTER = 8  # columns of these names


@dataclass(frozen=True)
class _Cell:
    text: str
    token: Token
    values: tuple[str, ...]

    @property
    def size(self) -> int:
        return max(columns(self.text), *map(len, self.values), 1)


def wants_color(choice: str, stream: TextIO) -> bool:
    """
    Return whether to use colors.

    Args:
        choice (`str`):
            `"always"`, `"never"`, or `"auto"`: on a terminal, unless `NO_COLOR` is set (https://no-color.org).
        stream (`TextIO`):
            The output.
    """
    if choice == "auto":
        return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"


class Terminal:
    """
    Renderer of examples as lines of text.

    Args:
        scoring (`Scoring`):
            Models that computed the log-probabilities.
        width (`int`):
            Width of the terminal, in columns.
        color (`bool`):
            Whether to use ANSI colors.
        short (`bool`, *optional*, defaults to `False`):
            Whether to leave out the middle of long texts before the steps.
    """

    def __init__(self, scoring: Scoring, width: int, color: bool, short: bool = False) -> None:
        self.scoring, self.width, self.color, self.short = scoring, max(width, 30), color, short

    def write(self, examples: Sequence[Example]) -> str:
        """Render examples, followed by a legend."""
        strongest = strongest_ratio(examples)
        blocks = ["\n".join(self._example(example, strongest)) for example in examples]
        legend = [self._paint(line, _DIM) for line in self._legend(examples, strongest)]
        return "\n\n".join([*blocks, *(["\n".join(legend)] if legend else [])])

    def _example(self, example: Example, strongest: float) -> list[str]:
        lines = [self._paint(line, _BOLD) for line in wrap(example.where, self.width)]
        for name, value in example.facts:
            lines += self._text(visible_text(f"{name}: {value}"))
        lines += [self._paint(f"  [image {image.width}x{image.height}]", _DIM) for image in example.images]
        for title, text in example.context:
            shown = visible_text(shorten(text) if self.short else text)
            lines += ["", *wrap(title, self.width), *self._text(shown, _DIM)]
        for part in example.parts:
            lines += ["", *self._part(part, strongest)]
        margin = example.margin(self.scoring.beta)
        if margin is not None:
            chosen, rejected = (format_value(part.ratio, 4, sign=True) for part in example.parts)
            reward = f"{self.scoring.beta:g} x ({chosen} - {rejected}) = {format_value(margin, 4, sign=True)}"
            lines += ["", *wrap(f"implicit reward margin: {reward}", self.width)]
        return lines

    def _part(self, part: Part, strongest: float) -> list[str]:
        count = f", {format_token_count(part.tokens)}" if part.tokens else ""
        title = f"{part.title}{count}{', ends the solution' if part.ends else ''}"
        lines = [self._paint(line, _INK.get(part.kind, ""), _BOLD) for line in wrap(title, self.width)]
        if part.lead.strip():
            lines += self._text(visible_text(part.lead.strip("\n")), _DIM)
        if not part.tokens:
            return lines + self._text(visible_text(part.text), _INK.get(part.kind, ""))
        lines += self._tokens(part, strongest)
        sums = [f"log π {format_value(part.policy, 4)}"] if part.policy is not None else []
        if part.reference is not None:
            sums += [f"log π_ref {format_value(part.reference, 4)}", f"ratio {format_value(part.ratio, 4, sign=True)}"]
        return lines + (self._text(f"sum: {', '.join(sums)}") if sums else [])

    def _text(self, text: str, *codes: str) -> list[str]:
        return ["  " + self._paint(line, *codes) for line in wrap(text, self.width - 2)]

    def _tokens(self, part: Part, strongest: float) -> list[str]:
        """Return lines of tokens, each followed by the lines of their values."""
        scored = part.policy is not None
        indent, separator = (" " * _GUTTER, " ") if scored else ("  ", self._paint("|", _DIM))
        lines = []
        for row in _rows([_cell(token, strongest) for token in part.tokens], self.width - len(indent)):
            texts = (self._token(cell, part, strongest) + " " * (cell.size - columns(cell.text)) for cell in row)
            lines.append(indent + separator.join(texts).rstrip())
            for number, name in enumerate(_NAMES[: len(row[0].values)]):
                below = " ".join(f"{cell.values[number]:<{cell.size}}" for cell in row)
                lines.append(self._paint(f"  {name:<{_GUTTER - 2}}", _DIM) + below.rstrip())
        return lines

    def _token(self, cell: _Cell, part: Part, strongest: float) -> str:
        ratio = cell.token.ratio or 0.0
        share = abs(ratio) / strongest if strongest else 0.0
        if share >= _MIN_SHARE:
            background = (_RAISED if ratio > 0 else _LOWERED)[math.ceil(share * len(_RAISED)) - 1]
            return self._paint(cell.text, f"38;5;231;48;5;{background}")
        pieces = split_marks(cell.text)
        pieces[::2] = (self._paint(piece, _INK.get(part.kind, "")) for piece in pieces[::2])
        pieces[1::2] = (self._paint(piece, _DIM) for piece in pieces[1::2])
        return "".join(pieces)

    def _paint(self, text: str, *codes: str) -> str:
        code = ";".join(filter(None, codes))
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and code and text else text

    def _legend(self, examples: Sequence[Example], strongest: float) -> list[str]:
        policy, reference = self.scoring.policy, self.scoring.reference
        lines = [f"{SPACE} space, {NEWLINE} end of line, {TAB} tab, {PART_OF_CHARACTER} part of a character"]
        if policy is not None:
            lines.append(f"log π: log-probability of the token under {policy}, in nats")
        if reference is not None:
            lines.append(f"ratio: log π - log π_ref, with the reference model {reference}")
        if reference is not None and self.color:
            lines.append(f"background: green for a ratio above 0, red below 0, brightest at ±{strongest:.4f}")
        tokens = any(part.tokens for example in examples for part in example.parts)
        return [part for line in lines for part in wrap(line, self.width)] if tokens else []


def _cell(token: Token, strongest: float) -> _Cell:
    values = () if token.policy is None else (format_value(token.policy),)
    if token.ratio is not None:
        values = (*values, format_value(token.ratio, ratio_digits(strongest), sign=True))
    return _Cell(visible_token(token.text), token, values)


def _rows(cells: Sequence[_Cell], width: int) -> list[list[_Cell]]:
    """Split cells into rows that fit the width. A line break in the text also ends a row."""
    rows: list[list[_Cell]] = [[]]
    used = 0
    for cell in cells:
        line_ended = rows[-1] and rows[-1][-1].text.endswith(NEWLINE)
        if rows[-1] and (line_ended or used + 1 + cell.size > width):
            rows.append([])
            used = 0
        used += cell.size + bool(rows[-1])
        rows[-1].append(cell)
    return rows
