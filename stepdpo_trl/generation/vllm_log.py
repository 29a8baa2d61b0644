"""The log of a vLLM server: its last line, and the message with which the server ended."""

import re
from pathlib import Path

from ..data.messages import printable

TAIL = 2**16  # bytes at the end of a log that are searched for an error
# `(EngineCore pid=7) ERROR 11-25 01:14:06 [core.py:12] ` at the beginning of a line
_PREFIX = re.compile(r"^(?:\(\S+ pid=\d+\) ?)?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^]]*\] ?)?")
_ERROR = re.compile(r"^(?:vllm[\w ]*: error: |[\w.]+(?:Error|Exception|Interrupt)(?:: |$))")
# Errors that only refer to another one
_CONSEQUENCE = re.compile(r"Engine core initialization failed|EngineDeadError|WorkerProc initialization failed")
_DETAILS = re.compile(r" \[type=\w+, input_value=.*")  # of validation errors
_MOST = 3  # errors that are shown
_DEAD_ENGINE = (
    "The engine of vLLM died without a message, as it does if the out-of-memory killer ends it (see `dmesg`)."
)


def last_line(log: Path, start: int) -> str:
    """
    Return the last line of a log, without vLLM's time and place.

    Args:
        log (`Path`):
            The log.
        start (`int`):
            Position in bytes at which the server started.

    Returns:
        `str`: The line. Empty if there is none.
    """
    lines = _lines(log, start, most=4096)
    return lines[-1] if lines else ""


def error_in(log: Path, start: int) -> str:
    """
    Return the message with which a server ended.

    Args:
        log (`Path`):
            The log.
        start (`int`):
            Position in bytes at which the server started.

    Returns:
        `str`: The last errors in the log, or its last lines if it has no errors.
    """
    lines = _lines(log, start, TAIL)
    found: list[str] = []
    for number, line in enumerate(lines):
        if _ERROR.match(line):
            # Validation errors continue in indented lines
            more = [text.strip() for text in lines[number + 1 : number + 3] if text.startswith("  ")]
            message = " ".join([line, *(text for text in more if not text.startswith(("File ", "For further")))])
            message = _DETAILS.sub("", message)
            if message not in found:
                found.append(message)
    causes = [message for message in found if not _CONSEQUENCE.search(message)]
    if causes:
        return "\n".join(causes[-_MOST:])
    if any("EngineDeadError" in message for message in found):
        return _DEAD_ENGINE
    return "\n".join((found or lines)[-_MOST:])


def _lines(log: Path, start: int, most: int) -> list[str]:
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - most))
            content = printable(file.read().decode("utf-8", "replace").replace("\r", "\n"))
    except OSError:
        return []
    # Progress bars of vLLM return to the beginning of the line
    return [line for text in content.split("\n") if (line := _PREFIX.sub("", text).rstrip())]
