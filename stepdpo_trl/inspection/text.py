"""Text for display: invisible characters are made visible, and lines fit a width. Standard library only."""

import re
import unicodedata
from collections.abc import Sequence

SPACE, NEWLINE, TAB, PART_OF_CHARACTER = "·", "↵", "→", "◌"
MARKS = SPACE + NEWLINE + TAB + PART_OF_CHARACTER


def visible_token(text: str) -> str:
    """Mark spaces, line breaks and tabs of a token. A token that ends inside a character gets its own mark."""
    marked = text.replace(" ", SPACE).replace("\n", NEWLINE).replace("\t", TAB)
    return _escape(marked) or PART_OF_CHARACTER


def visible_text(text: str) -> str:
    """Escape a text, and mark the white space at its end, where a step may begin."""
    body = text.rstrip(" \t\n")
    return _escape(body, keep="\n") + (visible_token(text[len(body) :]) if len(body) < len(text) else "")


def _escape(text: str, keep: str = "") -> str:
    """Escape control, zero-width and right-to-left characters, which a terminal would interpret or not show."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def columns(text: str) -> int:
    """Return the width of a text on a terminal, in columns."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(text: str, width: int) -> list[str]:
    """Split a text into lines of at most `width` columns, after a space if possible. No character is removed."""
    return [part for line in text.split("\n") for part in _wrap_line(line, width)]


def _wrap_line(line: str, width: int) -> list[str]:
    lines, start, used = [], 0, 0
    for index, character in enumerate(line):
        used += _columns(character)
        if used > width:
            after_space = line.rfind(" ", start, index) + 1
            end = after_space or max(index, start + 1)
            lines.append(line[start:end])
            start, used = end, columns(line[end : index + 1])
    return [*lines, line[start:]]


def shorten(text: str, head: int = 120, tail: int = 240) -> str:
    """Replace the middle of a long text by the number of characters left out."""
    left_out = len(text) - head - tail
    return text if left_out <= 0 else f"{text[:head]} ... {left_out} characters ... {text[-tail:]}"


def format_value(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Format a number, without a negative zero. `None` becomes a dash."""
    return "-" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def format_token_count(tokens: Sequence[object]) -> str:
    """Format a number of tokens, such as "1 token"."""
    return f"{len(tokens)} token{'s' * (len(tokens) != 1)}"


def ratio_digits(strongest: float) -> int:
    """Return the number of decimals of the log-ratios of tokens: more if all are small."""
    return 2 if strongest >= 0.1 else 4


def split_marks(text: str) -> list[str]:
    """Split a text with marks, so that every second piece consists of marks."""
    return re.split(f"([{MARKS}]+)", text)
