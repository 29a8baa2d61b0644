"""Ctrl-C, SIGTERM and SIGHUP: the first one stops a command, a second Ctrl-C ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """
    Raise `KeyboardInterrupt` at the first Ctrl-C, SIGTERM or SIGHUP until the context ends. Exit at a second Ctrl-C.

    A second SIGTERM has no effect, so `stepdpo loop` can send it to a command that has received Ctrl-C as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping and number == signal.SIGINT:
            _exit()
        if not stopping:
            stopping = True
            if _is_importing(frame):
                os.write(2, b"\nstepdpo: interrupted. Rerun the same command to resume.")
                _exit()
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        # After the first signal, the process is about to end. A second one must not print a traceback then.
        if not stopping:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported. An exception would abort torch, or be replaced by another one."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def _exit() -> None:
    """End the process without cleaning up. Whatever a run has stored is on disk."""
    with contextlib.suppress(Exception):
        for child in psutil.Process().children(recursive=True):  # answer checkers and vLLM servers
            child.kill()
    os.write(2, b"\n")
    os._exit(130)
