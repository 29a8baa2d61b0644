"""Checks for training arguments that cannot be used with stages."""

from collections.abc import Mapping
from typing import Any

from datasets import IterableDataset
from peft import PeftModel

# Optimizers that create their state in the constructor, or keep it elsewhere, so that clearing it does not reset them
UNSUPPORTED_OPTIMIZERS = ("layerwise", "schedule_free", "schedulefree", "adagrad", "lomo")


def depends_on_reference(args: Any) -> bool:
    """Return whether the metric for the best model is a loss or reward, which depends on the stage's reference."""
    metric = args.metric_for_best_model or "loss"
    return "loss" in metric or "rewards" in metric


def check_arguments(trainer: Any, schedule: str, stage_options: Mapping[str, Mapping[str, float]]) -> None:
    """
    Check that a trainer has no arguments that cannot be used with stages.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            Trainer to check.
        schedule (`str`):
            `"restart"` or `"continuous"`, as in [`SDPOCallback`].
        stage_options (`dict[str, dict[str, float]]`):
            Options of single stages, as in [`SDPOCallback`].

    Raises:
        ValueError: If an argument cannot be used. The message says which, why, and how to fix it.
    """
    args, accelerator = trainer.args, trainer.accelerator
    deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config if trainer.is_deepspeed_enabled else {}
    zero = deepspeed.get("zero_optimization", {})
    fsdp = accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    restart = schedule == "restart"
    optim = getattr(args.optim, "value", args.optim)
    optimizer_names = f"{optim} {type(trainer.optimizer).__name__}".lower()
    offloads = [zero.get(name) or {} for name in ("offload_param", "offload_optimizer")]
    conflicts = {
        "sync_ref_model=True, which changes the reference within a stage. Remove it": args.sync_ref_model,
        "auto_find_batch_size=True, which restarts training in the middle of a run. Set the batch size": (
            args.auto_find_batch_size
        ),
        "ignore_data_skip=True, which would train on rows of the wrong stage after resuming. Remove it": (
            args.ignore_data_skip
        ),
        f"load_best_model_at_end=True with metric_for_best_model={args.metric_for_best_model!r}, because losses and "
        "rewards of different stages are measured against different references. Remove it, or choose among the "
        "folders stage-N by another metric": (args.load_best_model_at_end and depends_on_reference(args)),
        "max_steps together with num_train_epochs in stage_options. Remove one of them": (
            args.max_steps > 0 and any("num_train_epochs" in options for options in stage_options.values())
        ),
        "a learning-rate scheduler in the DeepSpeed configuration, which cannot restart. Remove `scheduler` there, so "
        "that the scheduler of the training arguments is used, or use schedule='continuous'": (
            restart and "scheduler" in deepspeed
        ),
        "learning_rate in stage_options together with a custom optimizer, which sets its own. Remove one of them": (
            trainer.optimizer is not None and any("learning_rate" in options for options in stage_options.values())
        ),
        "a custom learning-rate scheduler, which cannot restart. Use schedule='continuous'": (
            restart and trainer.lr_scheduler is not None
        ),
        f"optim={str(optim)!r} with schedule='restart', because its state cannot be cleared. Use another optimizer, "
        "or schedule='continuous'": (restart and any(name in optimizer_names for name in UNSUPPORTED_OPTIMIZERS)),
        "parameters or optimizer states offloaded to NVMe, which cannot be changed in place. Offload to the CPU": any(
            offload.get("device") == "nvme" for offload in offloads
        ),
        "ZeRO-3 without saving full models. Set `stage3_gather_16bit_weights_on_model_save: true` in the DeepSpeed "
        "configuration (`zero3_save_16bit_model: true` for accelerate)": (
            zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save")
        ),
        "precompute_ref_log_probs=True with a streamed evaluation dataset, which cannot be scored. Load it with "
        "`streaming=False`": trainer.precompute_ref_logps and _has_stream(trainer.eval_dataset),
        "FSDP 1. Set `fsdp_version: 2`": fsdp is not None and fsdp.fsdp_version != 2,
        "an adapter under FSDP with `fsdp_reshard_after_forward: false`, where PEFT cannot switch between policy and "
        "reference. Set it to true, or use `precompute_ref_log_probs=True`": (
            fsdp is not None
            and not fsdp.reshard_after_forward
            and not trainer.precompute_ref_logps
            and isinstance(trainer.model, PeftModel)
        ),
        "FSDP without saving full models. Set `fsdp_state_dict_type: FULL_STATE_DICT`": (
            fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type)
        ),
        "sequence or context parallelism. Disable it": any(
            getattr(accelerator.parallelism_config, name, False) for name in ("sp_enabled", "cp_enabled")
        ),
    }
    for conflict, is_set in conflicts.items():
        if is_set:
            raise ValueError(f"SDPOCallback does not support {conflict}.")


def _has_stream(evaluation: Any) -> bool:
    datasets = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    return any(isinstance(dataset, IterableDataset) for dataset in datasets)
