"""The command `stepdpo`: arguments only. Imports the package, imported by nothing."""

import argparse
import sys

from . import __version__


def train(argv: list[str]) -> None:
    """
    Launch [`stepdpo_trl.train`] through `accelerate launch`, as `trl dpo` launches its script.

    Args:
        argv (`list[str]`):
            Options of the training script and of `accelerate launch`, mixed, and `--accelerate_config`, the name of a
            configuration that TRL ships (such as `zero3`) or a file.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .train import parse_arguments

    _, from_file, from_command_line = parse_arguments(argv, prog="stepdpo train")
    try:
        launch_args = resolve_accelerate_config_argument(from_file + from_command_line)
    except ValueError as error:
        sys.exit(_error("train", error))
    # What argparse has left over is an ordered part of the command line; the rest is the script's
    left_over = list(from_command_line)
    script_args = [a for a in argv if not (left_over and a == left_over[0] and left_over.pop(0) is not None)]
    launch_command(launch_command_parser().parse_args([*launch_args, "--module", "stepdpo_trl.train", *script_args]))


def _error(command: str, error: Exception) -> int:
    print(f"stepdpo {command}: error: {error}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments without the name of the program. Defaults to `sys.argv[1:]`.

    Returns:
        `int`: Exit status.
    """
    parser = argparse.ArgumentParser(prog="stepdpo", description="Step-DPO for Hugging Face TRL.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"stepdpo_trl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # `train` parses its own line: its options are those of three dataclasses and of accelerate
    commands.add_parser("train", help="train with StepDPOTrainer (options: stepdpo train --help)", add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser.parse_args(arguments[:1])
    train(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
