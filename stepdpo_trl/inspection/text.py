"""Text for people: what cannot be seen is written out, and lines are as wide as they look. Standard library only."""

import re
import unicodedata

SPACE, NEWLINE, TAB, PART_OF_CHARACTER = "·", "↵", "→", "◌"
MARKS = SPACE + NEWLINE + TAB + PART_OF_CHARACTER


def visible_token(text: str) -> str:
    """A token with marks for spaces, ends of lines and tabs; one for what ends within a character."""
    marked = text.replace(" ", SPACE).replace("\n", NEWLINE).replace("\t", TAB)
    return _escape(marked) or PART_OF_CHARACTER


def visible_text(text: str) -> str:
    """A text with its lines; white space at its end, where a step may begin, has marks."""
    body = text.rstrip(" \t\n")
    return _escape(body, keep="\n") + (visible_token(text[len(body) :]) if len(body) < len(text) else "")


def _escape(text: str, keep: str = "") -> str:
    """Neither obeyed by a terminal nor invisible: control sequences, zero-width and right-to-left marks."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def columns(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most so many columns, broken behind a space where there is one. Joined they are the text."""
    return [part for line in text.split("\n") for part in _wrap_line(line, width)]


def _wrap_line(line: str, width: int) -> list[str]:
    lines, start, used = [], 0, 0
    for place, character in enumerate(line):
        used += _columns(character)
        if used > width:
            space = line.rfind(" ", start, place) + 1
            end = space or max(place, start + 1)
            lines.append(line[start:end])
            start, used = end, columns(line[end : place + 1])
    return [*lines, line[start:]]


def shorten(text: str, head: int = 120, tail: int = 240) -> str:
    """A long text without its middle, and how much that was."""
    left_out = len(text) - head - tail
    return text if left_out <= 0 else f"{text[:head]} ... {left_out} characters ... {text[-tail:]}"


def show_figure(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A figure without a negative zero; a dash where there is none."""
    return "-" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def ratio_digits(strongest: float) -> int:
    """Digits for the log-ratios of tokens: more where all are small."""
    return 2 if strongest >= 0.1 else 4


def split_marks(text: str) -> list[str]:
    """A text with marks, cut so that every second piece is of marks."""
    return re.split(f"([{MARKS}]+)", text)
