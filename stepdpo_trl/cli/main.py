"""The command `stepdpo`. Parses arguments and calls the package."""

import argparse
import contextlib
import gc
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import psutil

from .. import __version__
from ..generation import GenerationError
from ..runs.run_directory import RunError
from .console import logging_to, report_error, silence_upstream
from .data import add_commands
from .env import add_env_command
from .eval import add_eval_command
from .inspect import add_inspect_command
from .interrupts import stoppable
from .loop import loop
from .merge import add_merge_command
from .parsing import WIDTH, CommandParser

# Commands in the order of the help
GROUPS = {
    "Make step pairs": ("data", "collect", "localize", "rectify", "build", "report", "import"),
    "Train": ("train", "loop", "merge"),
    "Evaluate and inspect": ("eval", "inspect"),
    "Report a bug": ("env",),
}
DESCRIPTION = "Step-DPO and sDPO for Hugging Face TRL."


class MainParser(CommandParser):
    """Parser of `stepdpo`, whose help lists the commands by topic."""

    def __init__(self) -> None:
        super().__init__(prog="stepdpo", description=DESCRIPTION, strict=False)
        self.add_argument("--version", action="version", version=f"stepdpo_trl {__version__}")
        self.commands = self.add_subparsers(
            dest="command", metavar="COMMAND", required=True, parser_class=CommandParser
        )
        self.commands.add_parser(
            "train", help="Train with StepDPOTrainer: Step-DPO, sDPO or DPO.", add_help=False, strict=False
        )
        self.commands.add_parser(
            "loop", help="Alternate between making step pairs and training on them.", add_help=False, strict=False
        )
        add_commands(self.commands)
        add_merge_command(self.commands)
        add_eval_command(self.commands)
        add_inspect_command(self.commands)
        add_env_command(self.commands)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments. The first one must be a command, unless it asks for the help or the version."""
        words = sys.argv[1:] if args is None else list(args)
        if not words:
            self.error("no command is given. See `stepdpo --help`.")
        commands = list(self.commands.choices)
        if words[0] not in (*commands, "-h", "--help", "--version"):
            near = get_close_matches(words[0], commands, n=1)
            suggestion = f"Did you mean {near[0]}?" if near else "See `stepdpo --help`."
            self.error(f"{words[0]} is not a command. {suggestion}")
        return super().parse_known_args(words, namespace)

    def format_help(self) -> str:
        """Return the list of commands."""
        help_of = {action.dest: str(action.help) for action in self.commands._choices_actions}
        lines = ["usage: stepdpo COMMAND [options]", "", DESCRIPTION]
        for title, names in GROUPS.items():
            lines += ["", f"{title}:"]
            for name in names:
                text = f"  {name:<10} {help_of[name]}"
                lines += textwrap.wrap(text, WIDTH - 2, subsequent_indent=" " * 13, break_on_hyphens=False)
        lines += ["", "Options of a command: stepdpo COMMAND --help", "Version: stepdpo --version", ""]
        return "\n".join(lines)


def train(argv: list[str]) -> None:
    """
    Launch [`stepdpo_trl.cli.train`] through `accelerate launch`, as `trl dpo` launches its script.

    Args:
        argv (`list[str]`):
            Options of the training script and of `accelerate launch`, in any order, and `--accelerate_config` with
            the name of a configuration that TRL ships (such as `zero3`) or a file.
    """
    if {"-h", "--help"} & set(argv):
        _print_train_help(everything="all" in argv)
        sys.exit(0)
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    from .train_arguments import parse_arguments, split_joined

    argv = split_joined(argv)
    _, from_file, from_command_line = parse_arguments(argv, prog="stepdpo train", launcher=True)
    script_args = _subtract_subsequence(argv, from_command_line)
    script = "stepdpo_trl.cli.train"
    launcher = launch_command_parser()

    def fail(message: object) -> NoReturn:
        launcher.exit(2, f"stepdpo train: error: {' '.join(str(message).split())}\n")
        raise AssertionError  # exit does not return

    launcher.error = fail  # one line, without the usage
    try:
        launch_args = resolve_accelerate_config_argument(from_file + from_command_line)
        launch = launcher.parse_args([*launch_args, "--module", script, *script_args])
        if launch.training_script != script:
            raise ValueError(
                f"{launch.training_script!r} does not belong to an option. Flags of accelerate such as --cpu take no "
                "value. Pass them on the command line, not in the file."
            )
        if launch.config_file:
            load_config_from_file(launch.config_file)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        fail(error)
    launch_command(launch)


def _print_train_help(everything: bool) -> None:
    if everything:
        from .train_arguments import make_parser as make_train_parser

        make_train_parser("stepdpo train").print_help()
        return
    from .train_help import short_help

    print(short_help(), end="")


def make_parser() -> MainParser:
    """Create the parser of all commands. `train` and `loop` are only listed and have separate parsers."""
    return MainParser()


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments without the name of the program. Defaults to `sys.argv[1:]`.

    Returns:
        `int`: Exit status.
    """
    silence_upstream()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return _launch(arguments[1:])
    command = arguments[0] if arguments else ""
    with stoppable():
        try:
            if command == "loop":
                loop(arguments[1:])
                return 0
            args = make_parser().parse_args(arguments)
            with logging_to(args.log_level, args.log_file):
                return _run(args)
        except (RunError, GenerationError, ValueError, OSError) as error:
            return _fail(command, error)
        except KeyboardInterrupt:
            return _interrupted(command)


def _launch(argv: list[str]) -> int:
    """Train, without accelerate's traceback if the training script fails."""
    try:
        train(argv)
    except subprocess.CalledProcessError as error:
        report_error(f"stepdpo train: error: training ended with status {error.returncode}; see its message above.")
        return 1
    except KeyboardInterrupt:
        report_error("\nstepdpo train: interrupted. To resume, add --resume_from_checkpoint true.")
        return 130
    return 0


def _run(args: argparse.Namespace) -> int:
    """Run a command. Errors are reported while the log file is open."""
    try:
        args.handler(args)
    except (RunError, GenerationError, ValueError, OSError) as error:
        return _fail(args.command, error)
    except KeyboardInterrupt:
        return _interrupted(args.command)
    return 0


def _fail(command: str, error: Exception) -> int:
    message = f"{error.filename}: {error.strerror}." if isinstance(error, OSError) and error.filename else str(error)
    if isinstance(error, GenerationError):  # contains messages of transformers, which have several lines
        message = " ".join(message.split())
    report_error(f"stepdpo {command}: error: {message}")
    return 2


def _interrupted(command: str) -> int:
    _end_workers()
    report_error(f"\nstepdpo {command}: interrupted. Rerun the same command to resume.")
    gc.freeze()  # Python would collect the objects of torch and transformers for seconds before it exits
    return 130


def _end_workers() -> None:
    """End the answer checker's processes. Those that are just starting would fail with a traceback."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("forkserver" in word for word in child.cmdline()):
                child.kill()


if __name__ == "__main__":
    sys.exit(main())
