"""Parts of messages: suggestions for misspelled names, counts, and text from outside that is safe to print."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

CLOSE = 0.6  # minimum similarity of a suggestion
CLOSE_FILE = 0.75  # of a file: names of files share their suffix


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


def similar_file(path: Path, pattern: str = "*") -> str:
    """
    Suggest the file of the same folder whose name is closest to that of a missing one.

    Args:
        path (`Path`):
            The missing file.
        pattern (`str`, *optional*, defaults to `"*"`):
            Pattern of the names of other files.

    Returns:
        `str`: A sentence that starts with a space, or `""` if no name is close.
    """
    if path.exists() or not path.parent.is_dir():
        return ""
    names = [file.name for file in path.parent.glob(pattern)]
    nearest = get_close_matches(path.name, names, n=1, cutoff=CLOSE_FILE)
    return f" Did you mean {path.with_name(nearest[0])}?" if nearest else ""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as `"1 row"` or `"1,200 rows"`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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
