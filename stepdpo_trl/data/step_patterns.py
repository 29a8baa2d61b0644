"""Try a user's regular expression for steps on texts, before it meets those of a model. Standard library only."""

import json
import signal
import string
import subprocess
import sys

TIME_LIMIT = 3  # seconds of processor time for all texts: on a busy machine, a search takes longer
LENGTH = 4000  # characters of the longest texts, about those of a solution with 1,024 tokens

# Lines in which a step may start at the beginning, or at one place, but not anywhere
_LINES = (
    "Alice has 3 apples and Bob gives her 12 more, so that Alice and Carol Smith have 15 in total",
    "Therefore x = 3 * (4 + 5) - 6 / 2, which is 24, and y = 24 / (3 + 1)",
    "    return [value ** 2 for value in values if value > 0]",
    "größere 数学 naïve — “so” 50 % über alles",
)
_UNITS = ("a", "1", " ", "\n", "word ", "1, ", "x = 1; ", "  line\n", "A sentence. ")
# Repetitions, and then a character that may end a search without success
_TEXTS = (
    *(unit * (LENGTH // len(unit)) + end for unit in _UNITS for end in ("", "!")),
    *(character * 100 + "\x01" for character in string.printable),
)
# In a separate process, which ends at the limit even if this one has been killed
_SEARCH = """
import json, re, resource, sys

limit, pattern, lines, texts = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
search = re.compile(pattern, re.M).finditer
for text in texts:
    for match in search(text):
        pass
empty = [[match.start() for match in search(line) if match.start() == match.end() > 0] for line in lines]
json.dump(empty, sys.stdout)
"""


def try_pattern(pattern: str) -> None:
    r"""
    Search lines of text and long repetitions for a regular expression.

    Args:
        pattern (`str`):
            A valid regular expression for `re.M`.

    Raises:
        ValueError: If it matches an empty string at several places within a line, as `\b` does, or if the search takes
            too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=json.dumps([TIME_LIMIT, pattern, _LINES, _TEXTS]).encode(),
            capture_output=True,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGXCPU:
            raise ValueError(
                f"--steps {pattern!r} takes more than {TIME_LIMIT} s on texts of {LENGTH:,} characters. Simplify the "
                "regular expression: repetitions within repetitions, such as (a+)+, take exponential time."
            ) from error
        reason = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"--steps {pattern!r} cannot be searched for: {reason}. Simplify it.") from error
    for line, places in zip(_LINES, json.loads(done.stdout), strict=True):
        if len(places) > 1:
            raise ValueError(
                f"--steps {pattern!r} matches an empty string at {len(places)} places within the line {line!r}, so a "
                "step would start anywhere. Use a regular expression of the text that starts a step, or begin it with "
                "^ to match at the beginning of lines only."
            )
