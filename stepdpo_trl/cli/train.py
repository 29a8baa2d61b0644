"""
The training script: `accelerate launch -m stepdpo_trl.cli.train --config FILE [--option value ...]`.

Its options are those of `trl dpo`, of [`StepDPOConfig`] and of [`SDPOArguments`].
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import DATA_FILES, file_pattern
from .console import logging_to, silence_upstream
from .train_arguments import launcher_options, make_parser, parse_arguments, split_joined

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from trl import DatasetMixtureConfig, ScriptArguments

logger = logging.getLogger(__name__)

__all__ = ["launcher_options", "load_data", "main", "make_parser", "parse_arguments", "split_joined"]


def load_data(
    script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig", in_stages: bool = False
) -> "DatasetDict | dict[str, Any]":
    """
    Load the data as `trl dpo` does, from `datasets` or `dataset_name`, which may also be a local file.

    Args:
        script_args (`ScriptArguments`), dataset_args (`DatasetMixtureConfig`):
            Arguments that select the data.
        in_stages (`bool`, *optional*, defaults to `False`):
            Whether each of `datasets` is a stage, so that they are returned as a list instead of a mixture.

    Returns:
        `dict`: Data by name of the split.
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
        source, files = DATA_FILES[Path(source).suffix], {script_args.dataset_train_split: file_pattern(source)}
    return load_dataset(
        source, name=script_args.dataset_config, data_files=files, streaming=script_args.dataset_streaming
    )


def _split(
    data: Any, name: str, convert: "Callable[[Dataset], Dataset] | None"
) -> "Dataset | IterableDataset | list[Dataset]":
    if name not in data:
        raise ValueError(
            f"The data has no split {name!r}, only {sorted(data)}. Set `dataset_train_split` or `dataset_test_split`."
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
    Train a model, save it, and push it to the Hub if `push_to_hub` is set.

    Args:
        argv (`list[str]`, *optional*):
            The command line, without the name of the program. Defaults to `sys.argv[1:]`.
        config (`str` or `Path`, *optional*):
            File of options, used if the command line has no `--config`.
        convert (`Callable[[Dataset], Dataset]`, *optional*):
            Converts each dataset to the format of the trainer. With `sdpo` and `datasets` it is called for each
            stage.
    """
    silence_upstream()
    argv = sys.argv[1:] if argv is None else argv
    if config is not None and not any(word.partition("=")[0] == "--config" for word in argv):
        argv = ["--config", str(config), *argv]
    parsed, _, _ = parse_arguments(argv)
    with logging_to(parsed[1].log_level, parsed[1].log_file):
        _train(parsed, convert)


def _train(parsed: tuple[Any, ...], convert: "Callable[[Dataset], Dataset] | None") -> None:
    script_args, training_args, model_args, dataset_args, sdpo_args = parsed
    import torch
    from trl import get_peft_config, get_quantization_config

    from ..step_dpo.divergence import check_finite
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
    if not sys.stderr.isatty():
        _print_lines(trainer)
    if script_args.ignore_bias_buffers:  # DDP cannot synchronize boolean buffers
        boolean = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = boolean
    trainer.train(resume_from_checkpoint=_checkpoint(training_args))
    check_finite(trainer)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.accelerator.wait_for_everyone()  # the first process may still be writing
    trainer.accelerator.end_training()


def _checkpoint(training_args: Any) -> str | None:
    """Return the checkpoint to resume from. `true` is the last complete one in the output folder."""
    value = str(training_args.resume_from_checkpoint)
    if value.lower() != "true":
        return None if value.lower() in ("false", "none") else value
    from ..sdpo.files import find_checkpoint

    try:
        return str(find_checkpoint(training_args.output_dir, True)[0])
    except ValueError:
        logger.warning(f"{training_args.output_dir} has no complete checkpoint. Training starts from the beginning.")
        return None


def _print_lines(trainer: Any) -> None:
    """Replace the Trainer's progress bar by one line per minute."""
    from transformers.trainer_callback import ProgressCallback

    from ..runs.progress import progress_bar

    class ProgressLinesCallback(ProgressCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                self.training_bar = progress_bar(total=state.max_steps, desc="train", unit=" steps")
            self.current_step = 0

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            pass

    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLinesCallback())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # `stepdpo train` says how to resume
