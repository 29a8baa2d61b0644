"""Read the option that an answer to a multiple-choice question names. Standard library only."""

import re

from .answer_rules import first_clause, normalize, unwrap

CHOICES = "ABCDE"

# "The correct option is C.", "the best choice: (C)"
_CORRECT_OPTION = re.compile(r"\b(?:correct|right|best)\s+(?:option|choice)(?:\s+is\b|\s*:)[\s:*_]*", re.I)
# A letter alone, or in brackets, or before a bracket, period or colon, with the text of the option. "A.M." is an
# abbreviation
_OPTION = re.compile(
    r"(?:(?:option|choice|letter)\s+)?(?:\(\s*([A-E])\s*\)|([A-E])(?:\)|\.(?!\w\b)|:|$))\s*(.*)", re.I | re.S
)
# More options after the first: "(A) and (B)", "(A)(B)", "A. Paris, B. London". Their letters have the same case
_JOINT = r"(?i:\b(?:and|or)\b|[,;/&+])"
_MORE = re.compile(
    rf"{_JOINT}\s*(?i:(?:and|or)\s+)?\(?[A-E](?![A-Za-z])|(?:\(?[A-E]\)?[.:]?\s*)+$"
    rf"|(?!(?i:both|all|none|neither|either|only)\b).*{_JOINT}\s*(?:\([A-E]\)|[A-E](?:\)|[.:]\s+\S))",
    re.S,
)


def correct_option(text: str) -> str | None:
    """Return what a solution calls the correct option ("The correct option is C."), or `None`."""
    found = list(_CORRECT_OPTION.finditer(text))
    return (first_clause(text[found[-1].end() :]) or None) if found else None


def read_choice(answer: str) -> str | None:
    r"""
    Return the letter that an answer chooses.

    `B`, `(B)`, `b)`, `\text{B}`, `B. Paris` and `\textbf{(B)}\ 59` are read as B.

    Args:
        answer (`str`):
            The answer.

    Returns:
        `str` or `None`: A letter from A to E. `None` if the answer names none of them, or several.
    """
    plain = unwrap(normalize(answer.replace("*", "")))
    chosen = _OPTION.fullmatch(" ".join(plain.split()).strip("_ "))
    if chosen is None:
        return None
    letter, rest = chosen[1] or chosen[2], chosen[3]
    return None if _MORE.match(rest if letter.isupper() else rest.swapcase()) else letter.upper()
