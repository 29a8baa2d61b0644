"""Arguments of the training script: command line, YAML file, and their checks."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import DATA_FILES
from .parsing import CLOSE

if TYPE_CHECKING:
    from .trl_parser import TrainParser

# Options that TRL only reads with underscores and with a space before the value
_SPLIT = ("config", "accelerate_config", "log_file")
# Names that other commands and tools use for options of TRL
_OTHER_NAMES = {
    "model": "--model_name_or_path",
    "dataset": "--dataset_name",
    "data": "--dataset_name",
    "lr": "--learning_rate",
    "epochs": "--num_train_epochs",
    "batch_size": "--per_device_train_batch_size",
    "lora": "--use_peft",
    "lora_rank": "--lora_r",
}


def make_parser(prog: str | None = None, launcher: bool = False) -> "TrainParser":
    """
    Create the parser of the training script.

    Args:
        prog (`str`, *optional*):
            Name of the program for help and errors.
        launcher (`bool`, *optional*, defaults to `False`):
            Whether options of `accelerate launch` are allowed on the command line.

    Returns:
        `TrainParser`: TRL's parser for YAML files and command lines, over the options of this script.
    """
    from .trl_parser import TrainParser

    def check(namespace: argparse.Namespace, from_file: Sequence[str], from_command_line: Sequence[str]) -> None:
        _check_unknown([*from_file, *from_command_line], list(parser._option_string_actions))
        if from_command_line and not launcher:
            raise ValueError(
                f"{from_command_line[0]} is not an argument of the script. Pass options of `accelerate launch` "
                "before the name of the script."
            )
        if not namespace.model_name_or_path:
            raise ValueError("No model is given. Pass --model_name_or_path.")
        _check_data(namespace)
        if not namespace.output_dir:
            raise ValueError("No output folder is given. Pass --output_dir.")
        _check_checkpoint(namespace.resume_from_checkpoint)

    parser = TrainParser(
        check,
        prog=prog,
        usage="%(prog)s [--config FILE] [--option VALUE ...]",
        description="Options can also be set in FILE (YAML), without the dashes; the command line overrides the file. "
        "`stepdpo train` also accepts the options of `accelerate launch`, and --accelerate_config NAME_OR_FILE.",
        allow_abbrev=False,
    )
    return parser


def launcher_options() -> list[str]:
    """Return the options of `accelerate launch`, and `--accelerate_config`."""
    from accelerate.commands.launch import launch_command_parser

    options = [name for action in launch_command_parser()._actions for name in action.option_strings]
    return ["--accelerate_config", *(name for name in options if name.startswith("--"))]


def parse_arguments(
    argv: list[str], prog: str | None = None, launcher: bool = False
) -> tuple[tuple[Any, ...], list[str], list[str]]:
    """
    Parse a command line and its config file.

    Exits with status 2 and one line on stderr if an argument is unknown or unusable.

    Args:
        argv (`list[str]`):
            The command line, without the name of the program.
        prog (`str`, *optional*):
            Name of the program for help and errors.
        launcher (`bool`, *optional*, defaults to `False`):
            Whether options of `accelerate launch` are allowed on the command line. They are always allowed in the
            file, which the launcher and the script share.

    Returns:
        `tuple`: `(script_args, training_args, model_args, dataset_args, sdpo_args)`, and the arguments for `accelerate
        launch` from the file and from the command line. `training_args.log_file` is the value of `--log_file`.
    """
    import yaml

    parser = make_parser(prog, launcher)
    argv = split_joined(argv)
    try:
        if argv.count("--config") > 1 or argv[-1:] == ["--config"]:
            raise ValueError("--config must be passed once, with a file after it.")
        *parsed, from_file, from_command_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        script_args, model_args, dataset_args, sdpo_args, training_args, more = parsed
        sdpo_args.check_sources(script_args, dataset_args)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        if "bf16/gpu" in message:
            message = "There is no GPU. Pass --use_cpu true --bf16 false to train on the CPU."
        parser.exit(2, f"{parser.prog}: error: {message}\n")
    training_args.log_file = more.log_file
    return (script_args, training_args, model_args, dataset_args, sdpo_args), from_file, from_command_line


def split_joined(argv: Sequence[str]) -> list[str]:
    """Split options such as `--config=FILE` into two words, and write them with underscores."""
    words = []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in _SPLIT:
            words += [f"--{name}", value] if equals else [f"--{name}"]
        else:
            words.append(word)
    return words


def _check_unknown(remaining: Sequence[str], known: list[str]) -> None:
    launcher = launcher_options()
    for argument in remaining:
        name = argument.partition("=")[0]
        if name == "--resume":
            raise ValueError(
                "--resume does not exist: pass --resume_from_checkpoint true to resume from the last checkpoint."
            )
        if name.startswith("--") and name not in launcher:
            near = get_close_matches(name, [*known, *launcher], n=1, cutoff=CLOSE)
            meant = _OTHER_NAMES.get(name[2:].replace("-", "_")) or (near[0] if near else None)
            suggestion = f"Did you mean {meant}?" if meant else "See `stepdpo train --help all`."
            raise ValueError(f"{name} is not a known argument. {suggestion}")


def _check_checkpoint(value: object) -> None:
    name = str(value)
    if value is not None and name.lower() not in ("true", "false") and not Path(name).is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {name}: there is no such folder. Pass `true` to resume from the last "
            "checkpoint in output_dir."
        )


def _check_data(options: argparse.Namespace) -> None:
    mixture = bool(options.datasets)
    if mixture == bool(options.dataset_name):
        raise ValueError("Pass the data either as --dataset_name, or as `datasets` in the file.")
    for name in ("dataset_config", "dataset_streaming") if mixture else ("streaming", "test_split_size"):
        if getattr(options, name):
            raise ValueError(f"--{name} has no effect with `{'datasets' if mixture else 'dataset_name'}`. Remove it.")
    name = str(options.dataset_name)
    if not mixture and Path(name).suffix in DATA_FILES and "://" not in name and not Path(name).is_file():
        raise FileNotFoundError(f"No such file: {name!r}, passed as --dataset_name.")
