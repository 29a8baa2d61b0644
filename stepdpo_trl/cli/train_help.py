"""Short help of `stepdpo train`, printed without importing TRL."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .parsing import CommandParser

PACKAGE = Path(__file__).parents[1]
USAGE = "stepdpo train [--config FILE] [--option VALUE ...]"
# Files and dataclasses of the project's own options, by the title in the help
OWN = {
    "Options of StepDPOConfig": (PACKAGE / "step_dpo" / "config.py", "StepDPOConfig"),
    "Options of stages (sDPO)": (PACKAGE / "cli" / "sdpo.py", "SDPOArguments"),
}
REQUIRED = {
    "model_name_or_path": ("MODEL", "Model id on the Hub, or folder."),
    "dataset_name": ("DATA", "A .jsonl or .parquet file, or a dataset on the Hub."),
    "output_dir": ("DIR", "Folder of the checkpoints and the trained model."),
}
FILE = {
    "config": ("FILE", "YAML file with options, without the dashes. The command line overrides it."),
}
# TRL options that most runs set
COMMON = {
    "learning_rate": ("X", "Initial learning rate."),
    "beta": ("X", "Strength of the pull towards the reference model."),
    "num_train_epochs": ("N", "Passes over the data."),
    "per_device_train_batch_size": ("N", "Pairs per device and forward pass."),
    "gradient_accumulation_steps": ("N", "Forward passes per optimizer step."),
    "max_length": ("N", "Maximum number of tokens of a row."),
    "use_peft": ("", "Train a LoRA adapter."),
    "lora_r": ("N", "Rank of the adapter."),
    "lora_alpha": ("N", "Scale of the adapter."),
    "load_in_4bit": ("", "Load the base model in 4 bits (QLoRA)."),
    "dtype": ("DTYPE", "Data type of the weights, such as bfloat16."),
    "precompute_ref_log_probs": ("", "Compute the reference log-probabilities before training."),
    "save_steps": ("N", "Optimizer steps between checkpoints."),
    "report_to": ("NAME", "Experiment tracker, such as wandb."),
    "bf16": ("BOOL", "Train in bfloat16; set it to false on a CPU."),
    "use_cpu": ("", "Train on the CPU."),
    "log_level": ("LEVEL", "Least severe messages of transformers to print."),
}
LAUNCH = {
    "resume_from_checkpoint": ("true|DIR", "Resume from the last checkpoint in output_dir, or from this one."),
    "accelerate_config": ("NAME", "zero2, zero3, fsdp2, multi_gpu, single_gpu, or an accelerate config file."),
    "num_processes": ("N", "Number of processes, usually one per GPU."),
    "log_file": ("FILE", "Append log messages to this file."),
}
DESCRIPTION = (
    "Train with StepDPOTrainer. Also accepts all options of DPOConfig and ModelConfig of TRL, which "
    "`stepdpo train --help all` lists, and those of `accelerate launch`. Options may be written with dashes or "
    "underscores."
)
EXAMPLE = """\
Example: LoRA on one GPU.
  stepdpo train --model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
      --dataset_name pairs.jsonl --output_dir outputs/lora \\
      --use_peft --lora_r 64 --lora_alpha 64 --dtype bfloat16 \\
      --learning_rate 5e-6 --beta 0.4 --num_train_epochs 4
To resume after an interruption, add --resume_from_checkpoint true."""


@dataclass(frozen=True)
class OwnOption:
    """
    Option of the training script that TRL does not have.

    Args:
        name (`str`):
            Name of the field.
        default (`Any`):
            Default of the field.
        help (`str`):
            Help of the field.
    """

    name: str
    default: Any
    help: str


def own_options() -> dict[str, list[OwnOption]]:
    """
    Read the project's own options from the source of their dataclasses.

    The dataclasses cannot be imported here: StepDPOConfig extends TRL's DPOConfig, and importing that takes seconds.

    Returns:
        `dict[str, list[OwnOption]]`: Options by the title of their group.
    """
    return {title: _read_fields(file, name) for title, (file, name) in OWN.items()}


def _read_fields(file: Path, class_name: str) -> list[OwnOption]:
    module = ast.parse(file.read_text(encoding="utf-8"))
    options = []
    for node in (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name):
        for statement in node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.value, ast.Call):
                continue
            given = {keyword.arg: keyword.value for keyword in statement.value.keywords}
            metadata = given["metadata"]
            assert isinstance(metadata, ast.Dict)
            assert isinstance(statement.target, ast.Name)
            keys = [ast.literal_eval(key) for key in metadata.keys if key is not None]
            text = ast.literal_eval(metadata.values[keys.index("help")])
            options.append(OwnOption(statement.target.id, ast.literal_eval(given["default"]), text))
    return options


def short_help() -> str:
    """Return the help of `stepdpo train`: the project's own options, and the most common ones of TRL."""
    parser = CommandParser(
        prog="stepdpo train", usage=USAGE, description=DESCRIPTION, epilog=EXAMPLE, strict=False, add_help=False
    )
    _add(parser, "Model and data", REQUIRED | FILE)
    for title, options in own_options().items():
        group = parser.add_argument_group(title)
        for option in options:
            if isinstance(option.default, bool):
                group.add_argument(f"--{option.name}", action="store_true", help=option.help)
            else:
                group.add_argument(f"--{option.name}", default=option.default, metavar="VALUE", help=option.help)
    _add(parser, "Common options of TRL", COMMON)
    _add(parser, "Launching, resuming and logging", LAUNCH)
    parser.add_argument("--help", nargs="?", metavar="all", help="Show this help, or that of every option, and exit.")
    return parser.format_help()


def _add(parser: CommandParser, title: str, options: dict[str, tuple[str, str]]) -> None:
    group = parser.add_argument_group(title)
    for name, (metavar, text) in options.items():
        if metavar:
            group.add_argument(f"--{name}", metavar=metavar, help=text)
        else:
            group.add_argument(f"--{name}", action="store_true", help=text)
