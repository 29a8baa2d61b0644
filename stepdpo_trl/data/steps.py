"""Split solutions into steps.

Steps are spans of the original text, so that prefixes and steps are exact substrings. Standard library only.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from .step_patterns import try_pattern

AUTO = "auto"  # the name of automatic detection on the command line

# "Step 3:", "**Step 3:**", "### Step 3.", "Step 3 -" at the start of a line. The label ends before the space
_LABEL = re.compile(
    r"^[ \t]*(?:#+[ \t]*|[-*][ \t]+)?(?:\*\*|__)?Step[ \t]+(\d+)"
    r"(?:(?:\*\*|__)?[:.)]|[ \t]+[-\u2013\u2014]|(?=(?:\*\*|__)?[ \t]*$))(?:\*\*|__)?",
    re.I | re.M,
)
# The first label may also follow a sentence: "Let's think step by step. Step 1:"
_FIRST_LABEL = re.compile(r"(?<=[.!:])[ \t]+(?:\*\*)?Step[ \t]+1(?:\*\*)?:(?:\*\*)?", re.I)
_NUMBER = re.compile(r"^[ \t]*(?:\*\*)?(\d{1,9})[.)](?=[ \t])", re.M)
_BLANK = re.compile(r"\n[ \t\r]*\n\s*")


@dataclass(frozen=True)
class StepSpan:
    """
    Position of a step in a solution.

    Args:
        begin (`int`):
            Index of its first character after the label. The text before it is the prefix that the step continues.
        end (`int`):
            Index after its last non-whitespace character.
    """

    begin: int
    end: int


@dataclass(frozen=True)
class Steps:
    """
    Solution split into steps.

    Args:
        text (`str`):
            The solution.
        spans (`tuple[StepSpan, ...]`):
            The steps, in order. At least one, unless the text is blank.
        style (`str`):
            Style of the steps: a key of [`STYLES`], or a regular expression.
    """

    text: str
    spans: tuple[StepSpan, ...]
    style: str

    def __len__(self) -> int:
        return len(self.spans)

    def step(self, number: int) -> str:
        """Return the text of a step without its label. Steps are numbered from 1."""
        span = self.spans[number - 1]
        return self.text[span.begin : span.end]

    def prefix(self, number: int) -> str:
        """Return the text before a step and its label ("Step 3:"), that is, its `initial_reason_steps`."""
        return self.text[: self.spans[number - 1].begin]

    def texts(self) -> tuple[str, ...]:
        """Return the texts of all steps, without surrounding whitespace."""
        return tuple(self.step(number).strip() for number in range(1, len(self) + 1))


def split_steps(text: str, style: str | None = None) -> Steps:
    """
    Split a solution into steps.

    Args:
        text (`str`):
            The solution, from the start of the assistant turn.
        style (`str`, *optional*):
            Style of the steps: `"label"` ("Step 1:" at the start of a line, also as a heading or in bold), `"number"`
            ("1." at the start of a line), `"paragraph"` (separated by blank lines), `"line"`, or a regular expression,
            see [`check_style`]. Defaults to the first of the named styles that finds at least two steps; a single step
            is enough for `"label"`. If the style does not fit, the whole text is one step.

    Returns:
        `Steps`: The solution with its steps.

    Raises:
        ValueError: If the style is unknown.
    """
    if style is not None:
        marks = STYLES[style](text) if style in STYLES else _matches(text, style)
        return Steps(text, _spans(text, marks) or _spans(text, [(0, 0)]), style)
    first = _LABEL.search(text)
    from_one = _FIRST_LABEL.search(text) or (first and first[1] == "1")
    for name in STYLES:
        if name == "label" and not from_one:  # the text before "Step 3" may contain steps too
            continue
        spans = _spans(text, STYLES[name](text))
        if len(spans) > 1 or (name == "label" and spans):
            return Steps(text, spans, name)
    return Steps(text, _spans(text, [(0, 0)]), "paragraph")


def check_style(style: str) -> str | None:
    r"""
    Check how solutions are to be split into steps.

    Args:
        style (`str`):
            `"auto"`, a key of [`STYLES`], or a regular expression. A step starts after each match, which is a label
            such as "Step 3:" and belongs to the prefix. A match may be empty, as those of `^(?=def )`, but not at
            several places of an ordinary line. `^` and `$` match at lines.

    Returns:
        `str` or `None`: The style for [`split_steps`]. `None` for `"auto"`.

    Raises:
        ValueError: If the style looks like a name but is unknown, or the regular expression is invalid, matches
            the empty string anywhere, or takes too long on hard texts.
    """
    if style == AUTO or style in STYLES:
        return None if style == AUTO else style
    _compile(style)
    try_pattern(style)
    return style


Mark = tuple[int, int]  # start and end of a label


def _spans(text: str, marks: list[Mark]) -> tuple[StepSpan, ...]:
    """Return the non-blank steps. Each starts after its label and ends before the next label."""
    ends = [*(start for start, _ in marks[1:]), len(text)][: len(marks)]
    stripped = ((begin, len(text[begin:end].rstrip())) for (_, begin), end in zip(marks, ends, strict=True))
    return tuple(StepSpan(begin, begin + length) for begin, length in stripped if length)


@lru_cache
def _compile(style: str) -> re.Pattern[str]:
    """Compile a style that is no name."""
    if re.fullmatch(r"[\w-]*", style):
        nearest = get_close_matches(style.lower(), [AUTO, *STYLES], n=1, cutoff=0)[0]
        raise ValueError(
            f"--steps {style!r} is not known. Did you mean {nearest!r}? Use {', '.join([AUTO, *STYLES])}, or a "
            "regular expression of the text that starts a step, such as '^Thought [0-9]+:'."
        )
    try:
        pattern = re.compile(style, re.M)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"--steps {style!r} is not a valid regular expression: {error}.") from error
    if pattern.search(""):
        raise ValueError(
            f"--steps {style!r} matches the empty string, so a step would start anywhere. Use a regular expression of "
            "the text that starts a step."
        )
    return pattern


def _matches(text: str, pattern: str) -> list[Mark]:
    return [match.span() for match in _compile(pattern).finditer(text)]


def _labels(text: str) -> list[Mark]:
    marks = [match.span() for match in _LABEL.finditer(text)]
    first = _FIRST_LABEL.search(text)
    if first and (not marks or first.start() < marks[0][0]):
        marks.insert(0, first.span())
    return marks


def _numbers(text: str) -> list[Mark]:
    """Return the items of a list that is numbered from 1. Other numbers ("12. March") do not start a step."""
    marks: list[Mark] = []
    for match in _NUMBER.finditer(text):
        if int(match[1]) == len(marks) + 1:
            marks.append(match.span())
    return marks


def _paragraphs(text: str) -> list[Mark]:
    start = len(text) - len(text.lstrip())
    return [(start, start), *(match.span() for match in _BLANK.finditer(text))]


def _lines(text: str) -> list[Mark]:
    return [(match.start(), match.start()) for match in re.finditer(r"^[ \t]*\S", text, re.M)]


STYLES: dict[str, Callable[[str], list[Mark]]] = {
    "label": _labels,
    "number": _numbers,
    "paragraph": _paragraphs,
    "line": _lines,
}
