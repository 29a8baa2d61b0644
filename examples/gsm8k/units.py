"""Units of work that are not repeated once they are done: commands, and functions in a process of their own."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stepdpo_trl.cli.interrupts import stoppable
from stepdpo_trl.cli.loop import run_process
from stepdpo_trl.runs.run_directory import RunDirectory, RunError

TAIL = 15  # lines of a log that an error quotes
MODULES = {"stepdpo": "stepdpo_trl.cli.main", "trl-sft": "trl.scripts.sft"}

Command = Sequence[str]  # a key of MODULES and its arguments


class CommandError(RunError):
    """
    Error of a command.

    Args:
        message (`str`):
            The message.
        output (`str`):
            What the command has printed.
    """

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def run_command(command: Command, log: Path) -> None:
    """
    Run a command in another process and append what it prints to a file.

    Args:
        command (`Sequence[str]`):
            A key of [`MODULES`] and its arguments.
        log (`Path`):
            The file.

    Raises:
        CommandError: If the command fails.
    """
    module, *arguments = command
    program = module.replace("-", " ")
    start = _announce(f"{program} {shlex.join(arguments)}", log)
    with log.open("ab") as file:
        status = run_process([sys.executable, "-m", MODULES[module], *arguments], file)
    if status:
        raise _failed(f"{program} {arguments[0]}" if program == "stepdpo" else program, status, log, start)


def run_function(function: Callable[..., Any], arguments: Sequence[Any], log: Path) -> None:
    """
    Call a function in another process, which frees the memory of its models, and append what it prints to a file.

    Args:
        function (`Callable`):
            The function, at the top level of a module.
        arguments (`Sequence[Any]`):
            Its arguments.
        log (`Path`):
            The file.

    Raises:
        CommandError: If the function fails.
    """
    start = _announce(function.__name__, log)
    process = get_context("spawn").Process(target=_call, args=(function, arguments, log))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    if process.exitcode:
        raise _failed(function.__name__, process.exitcode, log, start)


def _call(function: Callable[..., Any], arguments: Sequence[Any], log: Path) -> None:
    """Call a function in the new process. Ctrl-C and SIGTERM end it without a traceback."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    with stoppable():
        try:
            function(*arguments)
        except KeyboardInterrupt:
            sys.exit(130)


def _announce(title: str, log: Path) -> int:
    """Print what is about to run, and return the size of its log."""
    print(f"\n{title}\n  output in {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.stat().st_size if log.exists() else 0


def _failed(title: str, status: int, log: Path, start: int) -> CommandError:
    """Return an error with the end of a log."""
    with log.open("rb") as file:
        file.seek(start)
        output = file.read().decode(errors="replace")
    last = "\n".join(f"  {line}" for line in output.splitlines()[-TAIL:])
    return CommandError(
        f"`{title}` ended with status {status}. The end of {log}:\n{last}\nFix the cause and rerun the same "
        "command to resume.",
        output,
    )


class Units:
    """
    Record of the units of work that are done, with the time that they took.

    Args:
        run (`RunDirectory`):
            Folder of the comparison. The record is its file `units.jsonl`.
        run_command (`Callable`, *optional*):
            Function that runs a command and appends its output to a file.
        run_function (`Callable`, *optional*):
            Function that calls a function and appends its output to a file.
    """

    def __init__(
        self,
        run: RunDirectory,
        run_command: Callable[[Command, Path], None] = run_command,
        run_function: Callable[[Callable[..., Any], Sequence[Any], Path], None] = run_function,
    ) -> None:
        self.path, self._log = run.path, run.log("units")
        self._run_command, self._run_function = run_command, run_function

    def do(self, name: str, work: Callable[[], Any]) -> None:
        """
        Do a unit of work, unless it is done.

        Args:
            name (`str`):
                Name of the unit.
            work (`Callable`):
                Function that does it. What it leaves behind must let another call resume it.
        """
        if self.is_done(name):
            return
        before, start, done = self.seconds(name), time.monotonic(), False
        try:
            work()
            done = True
        finally:
            self._log.append(name, {"done": done, "seconds": before + time.monotonic() - start})

    def command(self, name: str, command: Command) -> None:
        """Run a command as a unit of work."""
        self.do(name, lambda: self.call(name, command))

    def call(self, name: str, command: Command) -> None:
        """Run a command of a unit. Its output is appended to the log of the unit."""
        self._run_command(command, self._log_file(name))

    def call_function(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function that loads a model, as a part of a unit. Its output is appended to the log of the unit."""
        self._run_function(function, arguments, self._log_file(name))

    def _log_file(self, name: str) -> Path:
        return self.path / "logs" / f"{name.replace('/', '.')}.log"

    def is_done(self, name: str) -> bool:
        """Return whether a unit is done."""
        return name in self._log and bool(self._log[name]["done"])

    def seconds(self, name: str) -> float:
        """Return the time that a unit has taken over all resumes. A kill loses that of the killed attempt."""
        return float(self._log[name]["seconds"]) if name in self._log else 0.0
