"""Parts of messages to the user: suggestions for misspelled names, and text from outside that is safe to print."""

from collections.abc import Iterable
from difflib import get_close_matches

CLOSE = 0.6  # minimum similarity of a suggestion


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """
    Suggest the known name that is closest to a misspelled one.

    Args:
        name (`str`):
            The unknown name.
        known (`Iterable[str]`):
            The known names.

    Returns:
        `str`: A sentence that starts with a space, or `""` if no name is close.
    """
    nearest = get_close_matches(name, list(known), n=1, cutoff=CLOSE)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def printable(text: str) -> str:
    """
    Escape the characters of a text that control a terminal or do not show, except for line breaks and tabs.

    Args:
        text (`str`):
            Text that may come from a server, a model or a file.

    Returns:
        `str`: The text, with escapes such as `\\x1b`.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )
