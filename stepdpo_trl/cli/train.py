"""
The training script, one for all models: `accelerate launch -m stepdpo_trl.cli.train --config FILE [--option value ...]`.

Options are those of `trl dpo`, of [`StepDPOConfig`] and of [`SDPOArguments`]; the command line overrides the file.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import DATA_FILES

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from trl import DatasetMixtureConfig, ScriptArguments, TrlParser


def make_parser(prog: str | None = None) -> "TrlParser":
    """TRL's parser for YAML files and command lines, over the options of this script."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from ..step_dpo.config import StepDPOConfig
    from .sdpo import SDPOArguments

    options: Any = (ScriptArguments, StepDPOConfig, ModelConfig, DatasetMixtureConfig, SDPOArguments)
    return TrlParser(
        options,
        prog=prog,
        # The generated one is 160 lines long, printed before every error, and leaves out --config
        usage="%(prog)s [--config FILE] [--option VALUE ...]",
        description="Options may stand in FILE (YAML) without the dashes; the command line overrides the file. "
        "`stepdpo train` takes the options of `accelerate launch` too, and --accelerate_config NAME_OR_FILE.",
        allow_abbrev=False,
    )


def launcher_options() -> list[str]:
    """Options of `accelerate launch`, and `accelerate_config`, which `stepdpo train` takes besides those here."""
    from accelerate.commands.launch import launch_command_parser

    options = [name for action in launch_command_parser()._actions for name in action.option_strings]
    return ["--accelerate_config", *(name for name in options if name.startswith("--"))]


def parse_arguments(
    argv: list[str], prog: str | None = None, launcher: bool = False
) -> tuple[tuple[Any, ...], list[str], list[str]]:
    """
    Parse a command line and the file it names with `--config`.

    Args:
        argv (`list[str]`):
            The command line, without the name of the program.
        prog (`str`, *optional*):
            Name of the program for help and errors.
        launcher (`bool`, *optional*, defaults to `False`):
            Whether options of `accelerate launch` may stand on the command line. They may always stand in the file,
            which the launcher and the script share.

    Returns:
        `tuple`: The five argument objects, and what is meant for `accelerate launch` in the file and on the command
        line. Exits with status 2 and one sentence on stderr if an argument is unusable or unknown.
    """
    import yaml

    parser = make_parser(prog)
    argv = split_joined(argv)
    try:
        if argv.count("--config") > 1 or argv[-1:] == ["--config"]:
            raise ValueError("Give --config once, and a file after it.")
        *parsed, from_file, from_command_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        _check_unknown([*from_file, *from_command_line], list(parser._option_string_actions))
        if from_command_line and not launcher:
            raise ValueError(
                f"{from_command_line[0]} is not an argument of the script. What is meant for `accelerate launch` goes "
                "before the script's name."
            )
        script_args, _, model_args, dataset_args, sdpo_args = parsed
        if not model_args.model_name_or_path:
            raise ValueError("Name the model with --model_name_or_path.")
        _check_data(script_args, dataset_args)
        sdpo_args.check_sources(script_args, dataset_args)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return tuple(parsed), from_file, from_command_line


def split_joined(argv: list[str]) -> list[str]:
    """Write `--config=FILE` as two words, the only form that TRL takes, and `--accelerate_config=NAME` likewise."""
    joined = ("--config=", "--accelerate_config=")
    return [part for word in argv for part in (word.split("=", 1) if word.startswith(joined) else [word])]


def _check_unknown(remaining: list[str], known: list[str]) -> None:
    launcher = launcher_options()
    for argument in remaining:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in launcher:
            nearest = get_close_matches(name, [*known, *launcher], n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} is not a known argument. Did you mean {nearest}?")


def _check_data(script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig") -> None:
    mixture = bool(dataset_args.datasets)
    if mixture == bool(script_args.dataset_name):
        raise ValueError("Name the data with --dataset_name, or list it under `datasets` in the file; not both.")
    options: Any = script_args if mixture else dataset_args
    for name in ("dataset_config", "dataset_streaming") if mixture else ("streaming", "test_split_size"):
        if getattr(options, name):
            raise ValueError(f"--{name} has no effect with `{'datasets' if mixture else 'dataset_name'}`.")
    name = str(script_args.dataset_name)
    if not mixture and Path(name).suffix in DATA_FILES and "://" not in name and not Path(name).is_file():
        raise FileNotFoundError(f"No such file: {name!r}, given by --dataset_name.")


def load_data(
    script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig", in_stages: bool = False
) -> "DatasetDict | dict[str, Any]":
    """
    Load the data as `trl dpo` does: `datasets` or `dataset_name`, which may also be a local file.

    Args:
        script_args (`ScriptArguments`), dataset_args (`DatasetMixtureConfig`):
            What to load.
        in_stages (`bool`, *optional*, defaults to `False`):
            Whether each of `datasets` is a stage, so that they make a list rather than a mixture.

    Returns:
        `dict`: Data by the name of the split.
    """
    from datasets import load_dataset
    from trl import get_dataset

    if dataset_args.datasets and in_stages:
        return {
            "train": [get_dataset(replace(dataset_args, datasets=[part]))["train"] for part in dataset_args.datasets]
        }
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    source, files = str(script_args.dataset_name), None
    if Path(source).suffix in DATA_FILES:
        source, files = DATA_FILES[Path(source).suffix], {script_args.dataset_train_split: source}
    return load_dataset(
        source, name=script_args.dataset_config, data_files=files, streaming=script_args.dataset_streaming
    )


def _split(
    data: Any, name: str, convert: "Callable[[Dataset], Dataset] | None"
) -> "Dataset | IterableDataset | list[Dataset]":
    if name not in data:
        raise ValueError(
            f"The data has no split {name!r}, only {sorted(data)}. Set `dataset_train_split` or `..._test_...`."
        )
    part = data[name]
    if convert is None:
        return part
    return [convert(stage) for stage in part] if isinstance(part, list) else convert(part)


def main(
    argv: list[str] | None = None,
    config: str | Path | None = None,
    convert: "Callable[[Dataset], Dataset] | None" = None,
) -> None:
    """
    Train, save, and push to the Hub if asked.

    Args:
        argv (`list[str]`, *optional*):
            The command line, without the name of the program. Defaults to `sys.argv[1:]`.
        config (`str` or `Path`, *optional*):
            The file of options where the command line names none with `--config`.
        convert (`Callable[[Dataset], Dataset]`, *optional*):
            Brings each data set, as loaded, into the format of the trainer. With `sdpo` and `datasets` it is called
            for each stage.
    """
    argv = sys.argv[1:] if argv is None else argv
    if config is not None and not any(word.partition("=")[0] == "--config" for word in argv):
        argv = ["--config", str(config), *argv]
    (script_args, training_args, model_args, dataset_args, sdpo_args), _, _ = parse_arguments(argv)
    import torch
    from trl import get_peft_config, get_quantization_config

    from ..step_dpo.trainer import StepDPOTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    data = load_data(script_args, dataset_args, in_stages=sdpo_args.sdpo)
    train_dataset = _split(data, script_args.dataset_train_split, convert)
    if sdpo_args.sdpo and not isinstance(train_dataset, list):
        sdpo_args.check_stages(train_dataset)
    evaluates = training_args.eval_strategy != "no"
    trainer: Any = StepDPOTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=_split(data, script_args.dataset_test_split, convert) if evaluates else None,
        callbacks=[sdpo_args.make_callback()] if sdpo_args.sdpo else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.ignore_bias_buffers:  # DDP cannot synchronize boolean buffers
        boolean = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = boolean
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.accelerator.wait_for_everyone()  # the first process may still be writing
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
