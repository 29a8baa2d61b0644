"""The command `stepdpo`: arguments only. Imports the package, imported by nothing."""

import argparse
import sys

from .. import __version__
from ..generation import GenerationError
from ..runs.run_directory import RunError
from .data import add_commands
from .eval import add_eval_command
from .inspect import add_inspect_command
from .loop import loop
from .options import parse


def train(argv: list[str]) -> None:
    """
    Launch [`stepdpo_trl.cli.train`] through `accelerate launch`, as `trl dpo` launches its script.

    Args:
        argv (`list[str]`):
            Options of the training script and of `accelerate launch`, mixed, and `--accelerate_config`, the name of a
            configuration that TRL ships (such as `zero3`) or a file.
    """
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    from .train import parse_arguments, split_joined

    argv = split_joined(argv)
    _, from_file, from_command_line = parse_arguments(argv, prog="stepdpo train", launcher=True)
    script_args = _subtract_subsequence(argv, from_command_line)
    script = "stepdpo_trl.cli.train"
    launcher = launch_command_parser()
    launcher.prog, launcher.usage = "stepdpo train", "%(prog)s [--config FILE] [--option VALUE ...]"
    try:
        launch_args = resolve_accelerate_config_argument(from_file + from_command_line)
        launch = launcher.parse_args([*launch_args, "--module", script, *script_args])
        if launch.training_script != script:
            raise ValueError(
                f"{launch.training_script!r} belongs to no option. Flags of accelerate, such as --cpu, take no value "
                "and go on the command line, not into the file."
            )
        if launch.config_file:
            load_config_from_file(launch.config_file)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        sys.exit(_error("train", error))
    launch_command(launch)


def _error(command: str, error: Exception | str) -> int:
    print(f"stepdpo {command}: error: {error}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `train` and `loop`, which take options of other programs and parse their own."""
    parser = argparse.ArgumentParser(prog="stepdpo", description="Step-DPO for Hugging Face TRL.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"stepdpo_trl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train with StepDPOTrainer (options: stepdpo train --help)", add_help=False)
    add_commands(commands)
    commands.add_parser("loop", help="make pairs and train on them, in turns", add_help=False)
    add_eval_command(commands)
    add_inspect_command(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments without the name of the program. Defaults to `sys.argv[1:]`.

    Returns:
        `int`: Exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        train(arguments[1:])
        return 0
    looped = arguments[:1] == ["loop"]
    args = argparse.Namespace(command="loop") if looped else parse(make_parser(), arguments)
    try:
        loop(arguments[1:]) if looped else args.handler(args)
    except OSError as error:
        named = error.filename and error.strerror
        return _error(args.command, f"{error.filename}: {error.strerror}." if named else error)
    except (RunError, GenerationError, ValueError) as error:
        return _error(args.command, error)
    except KeyboardInterrupt:
        print(f"\nstepdpo {args.command}: stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
