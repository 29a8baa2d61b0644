"""Splitting solutions into steps: each is a pair of places in the text, nothing of which is lost. Standard library."""

import re
from collections.abc import Callable
from dataclasses import dataclass

# "Step 3:", "**Step 3:**", "### Step 3.", "Step 3 -" at the beginning of a line. The label ends before the space
_LABEL = re.compile(
    r"^[ \t]*(?:#+[ \t]*|[-*][ \t]+)?(?:\*\*|__)?Step[ \t]+(\d+)"
    r"(?:(?:\*\*|__)?[:.)]|[ \t]+[-\u2013\u2014]|(?=(?:\*\*|__)?[ \t]*$))(?:\*\*|__)?",
    re.I | re.M,
)
# The first may also follow a sentence: "Let's think step by step. Step 1:"
_FIRST_LABEL = re.compile(r"(?<=[.!:])[ \t]+(?:\*\*)?Step[ \t]+1(?:\*\*)?:(?:\*\*)?", re.I)
_NUMBER = re.compile(r"^[ \t]*(?:\*\*)?(\d+)[.)](?=[ \t])", re.M)
_BLANK = re.compile(r"\n[ \t\r]*\n\s*")


@dataclass(frozen=True)
class StepSpan:
    """
    Where a step stands in a solution.

    Args:
        begin (`int`):
            Its first character, behind the label: what stands before is the prefix that it continues.
        end (`int`):
            Behind its last character that is not white space.
    """

    begin: int
    end: int


@dataclass(frozen=True)
class Steps:
    """
    A solution with its steps.

    Args:
        text (`str`):
            The solution.
        spans (`tuple[StepSpan, ...]`):
            The steps, in order. At least one, unless the text is blank.
        style (`str`):
            How they are told apart, a name in [`STYLES`].
    """

    text: str
    spans: tuple[StepSpan, ...]
    style: str

    def __len__(self) -> int:
        return len(self.spans)

    def step(self, number: int) -> str:
        """Text of a step, counted from 1, without its label."""
        span = self.spans[number - 1]
        return self.text[span.begin : span.end]

    def prefix(self, number: int) -> str:
        """All that stands before a step, with its label ("Step 3:"): `initial_reason_steps`."""
        return self.text[: self.spans[number - 1].begin]

    def texts(self) -> tuple[str, ...]:
        """The steps, stripped."""
        return tuple(self.step(number).strip() for number in range(1, len(self) + 1))


def split_steps(text: str, style: str | None = None) -> Steps:
    """
    Split a solution into its steps.

    Args:
        text (`str`):
            The solution, from the beginning of the assistant's turn.
        style (`str`, *optional*):
            How steps are told apart: `"label"` ("Step 1:" at the beginning of a line, also as a heading or in bold),
            `"number"` ("1." likewise), `"paragraph"` (blank lines) or `"line"`. By default the first of these that
            finds two steps, `"label"` also with one; a text with none is one step.

    Returns:
        `Steps`: The steps.

    Raises:
        ValueError: If the style is not known.
    """
    if style is not None and style not in STYLES:
        raise ValueError(f"`style={style!r}` is not known. Choose one of {sorted(STYLES)}.")
    first = _LABEL.search(text)
    from_one = _FIRST_LABEL.search(text) or (first and first[1] == "1")
    for name in [style] if style else STYLES:
        if name == "label" and not style and not from_one:  # what stands before "Step 3" may be steps too
            continue
        spans = _spans(text, STYLES[name](text))
        if style or len(spans) > 1 or (name == "label" and spans):
            return Steps(text, spans, name)
    return Steps(text, _spans(text, [(0, 0)]), "paragraph")


Mark = tuple[int, int]  # where a label begins and where it ends


def _spans(text: str, marks: list[Mark]) -> tuple[StepSpan, ...]:
    """Steps that begin behind their labels and end where the next label begins, or the text. Blank ones are none."""
    ends = [*(start for start, _ in marks[1:]), len(text)][: len(marks)]
    stripped = ((begin, len(text[begin:end].rstrip())) for (_, begin), end in zip(marks, ends, strict=True))
    return tuple(StepSpan(begin, begin + length) for begin, length in stripped if length)


def _labels(text: str) -> list[Mark]:
    marks = [match.span() for match in _LABEL.finditer(text)]
    first = _FIRST_LABEL.search(text)
    if first and (not marks or first.start() < marks[0][0]):
        marks.insert(0, first.span())
    return marks


def _numbers(text: str) -> list[Mark]:
    """Items of a list that counts from 1. Others ("12. March") begin no step."""
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
