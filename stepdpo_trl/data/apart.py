"""Calls of functions that may hang, crash or start processes, in child processes with limits. POSIX only."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_CHILD_SUBREAPER, _PARENT_DEATH_SIGNAL = 36, 1  # of prctl(2)
_POLL_SECONDS = 0.05
_SHOWN = 120  # characters of a value or an error message


@dataclass(frozen=True)
class Returned:
    """
    End of a call.

    Args:
        value (`bool`, *optional*):
            What the function returned.
        other (`str`, *optional*):
            What it returned instead of `True`, `False` or `None`, for error messages.
        failure (`str`, *optional*):
            Reason why it did not return.
    """

    value: bool | None = None
    other: str | None = None
    failure: str | None = None


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of processes whose parents end (Linux), and kill all of them if this process is terminated."""
    _prctl(_CHILD_SUBREAPER, 1)
    previous = signal.getsignal(signal.SIGTERM)

    def kill_first(number: int, frame: Any) -> None:
        _kill_children()
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, kill_first)


def limit_memory(limit: int) -> None:
    """Limit the memory of this process to what it has now and `limit` bytes more (Linux)."""
    import resource  # not on Windows

    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + limit, hard))


def call_apart(
    function: Callable[..., Any], arguments: Sequence[Any], time_limit: float, memory_limit: int
) -> Returned:
    """
    Call a function in a child process.

    All processes that the call has started and that are still running at its end are killed. Processes that leave the
    process group are found on Linux only, after [`adopt_orphans`].

    Args:
        function (`Callable`):
            The function.
        arguments (`Sequence`):
            Its arguments.
        time_limit (`float`):
            Time limit in seconds.
        memory_limit (`int`):
            Memory that the child may use in addition to what this process uses, in bytes. So may each process that it
            starts.

    Returns:
        [`Returned`]: The returned value, or the reason why there is none.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _run(function, arguments, writer, memory_limit)
    os.close(writer)
    with contextlib.suppress(OSError):  # the child may have done it
        os.setpgid(child, child)
    try:
        return _receive(reader, child, time_limit)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        _kill(child)
        _kill_children()


def _run(function: Callable[..., Any], arguments: Sequence[Any], writer: int, memory_limit: int) -> NoReturn:
    """Call the function, write the result and end this process."""
    import resource

    this = os.getpid()
    reply: dict[str, Any] = {"failure": "the checker ended without a result"}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_memory(memory_limit)
        value = _as_bool(function(*arguments))
        known = value is None or isinstance(value, bool)
        reply = {"value": value} if known else {"other": f"{_short(repr(value))} ({type(value).__name__})"}
    except MemoryError:
        reply = {"failure": f"checking took more than {memory_limit / 2**30:g} GiB of memory"}
    except BaseException as error:
        message = _short(str(error))
        reply = {"failure": f"the checker raised {type(error).__name__}" + (f": {message}" if message else "")}
    finally:
        if os.getpid() == this:  # not a fork that has returned from the function too
            os.write(writer, json.dumps(reply).encode() + b"\n")
        os._exit(0)


def _as_bool(value: Any) -> Any:
    """Convert a `numpy.bool_`, as comparisons in numpy return it. Other values stay as they are."""
    numpy = sys.modules.get("numpy")
    return bool(value) if numpy is not None and isinstance(value, numpy.bool_) else value


def _short(text: str) -> str:
    """Return the beginning of a text in one printable line."""
    line = "".join(character if character.isprintable() else " " for character in text[: 2 * _SHOWN])
    line = " ".join(line.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def _receive(reader: int, child: int, time_limit: float) -> Returned:
    parent = multiprocessing.parent_process()
    deadline = time.monotonic() + time_limit
    received = b""
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if parent is not None and not parent.is_alive():
            return Returned(failure="nobody waits for the result")
        if left <= 0:
            return Returned(failure=f"checking took more than {time_limit:g} s")
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if select.select([reader], [], [], 0 if ended else min(left, _POLL_SECONDS))[0]:
            part = os.read(reader, 65536)
            if part:
                received += part
                continue
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        if ended is not None:
            cause = "exit status" if ended.si_code == os.CLD_EXITED else "signal"
            return Returned(failure=f"the checking process died ({cause} {ended.si_status})")
    return Returned(**json.loads(received))


def _kill_children() -> None:
    """Kill all children of this process, and those that it inherits from them, until there are none."""
    while True:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        children = _children()
        if not children:  # not found without /proc
            return
        for child in children:
            _kill(child)


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _children() -> list[int]:
    this = str(os.getpid())
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of the program, in parentheses, may contain spaces
            if status.read_text(errors="replace").rpartition(")")[2].split()[1] == this:
                children.append(int(status.parent.name))
    return children
