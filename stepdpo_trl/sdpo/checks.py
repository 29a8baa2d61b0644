"""What training in stages does not go together with."""

from collections.abc import Mapping
from typing import Any

from datasets import IterableDataset
from peft import PeftModel

# Optimizers that make their state with themselves, or keep it elsewhere
NOT_CLEARED = ("layerwise", "schedule_free", "schedulefree", "adagrad", "lomo")


def compares_references(args: Any) -> bool:
    """Whether the best model is chosen by a loss or reward, which each stage measures against another reference."""
    metric = args.metric_for_best_model or "loss"
    return "loss" in metric or "rewards" in metric


def check_arguments(trainer: Any, schedule: str, stage_options: Mapping[str, Mapping[str, float]]) -> None:
    """
    Refuse what does not go together with stages.

    Raises:
        ValueError: Saying what, why, and what to do.
    """
    args, accelerator = trainer.args, trainer.accelerator
    deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config if trainer.is_deepspeed_enabled else {}
    zero = deepspeed.get("zero_optimization", {})
    fsdp = accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    restart = schedule == "restart"
    optimizer = f"{getattr(args.optim, 'value', args.optim)} {type(trainer.optimizer).__name__}".lower()
    offloads = [zero.get(name) or {} for name in ("offload_param", "offload_optimizer")]
    refused = {
        "sync_ref_model=True, which moves the reference within a stage: leave it out": args.sync_ref_model,
        "auto_find_batch_size=True, which starts over in the middle of a run: set the batch size": (
            args.auto_find_batch_size
        ),
        "ignore_data_skip=True, which would train rows of one stage in another on resuming: leave it out": (
            args.ignore_data_skip
        ),
        "load_best_model_at_end=True by a loss or reward, which are measured against another reference in each stage: "
        "leave it out, or choose among the folders stage-N by a measure of your own": (
            args.load_best_model_at_end and compares_references(args)
        ),
        "max_steps together with a stage's num_train_epochs: leave one of them out": (
            args.max_steps > 0 and any("num_train_epochs" in options for options in stage_options.values())
        ),
        "a learning-rate scheduler in the DeepSpeed configuration, which cannot begin anew: remove `scheduler` there "
        "(the one of the training arguments is used then), or use schedule='continuous'": (
            restart and "scheduler" in deepspeed
        ),
        "a learning rate of a stage and an optimizer of your own, which has its own: leave one of them out": (
            trainer.optimizer is not None and any("learning_rate" in options for options in stage_options.values())
        ),
        "a scheduler of your own, which cannot begin anew: use schedule='continuous'": (
            restart and trainer.lr_scheduler is not None
        ),
        f"optim={str(getattr(args.optim, 'value', args.optim))!r}, whose state cannot be cleared: choose another, or "
        "use schedule='continuous'": (restart and any(word in optimizer for word in NOT_CLEARED)),
        "parameters or optimizer offloaded to NVMe, which cannot be swapped in place: offload to the CPU": any(
            offload.get("device") == "nvme" for offload in offloads
        ),
        "ZeRO-3 without whole models on saving: set `stage3_gather_16bit_weights_on_model_save` to true in the "
        "DeepSpeed configuration (`zero3_save_16bit_model: true` for accelerate)": (
            zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save")
        ),
        "precompute_ref_log_probs=True and a stream of evaluation data, which cannot be scored: load it with "
        "`streaming=False`": trainer.precompute_ref_logps and _has_stream(trainer.eval_dataset),
        "FSDP 1: set `fsdp_version: 2`": fsdp is not None and fsdp.fsdp_version != 2,
        "an adapter under FSDP with `fsdp_reshard_after_forward: false`, where PEFT cannot change from policy to "
        "reference and back: set that to true, or `precompute_ref_log_probs=True`": (
            fsdp is not None
            and not fsdp.reshard_after_forward
            and not trainer.precompute_ref_logps
            and isinstance(trainer.model, PeftModel)
        ),
        "FSDP without whole models on saving: set `fsdp_state_dict_type: FULL_STATE_DICT`": (
            fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type)
        ),
        "sequence or context parallelism": any(
            getattr(accelerator.parallelism_config, name, False) for name in ("sp_enabled", "cp_enabled")
        ),
    }
    for what, is_set in refused.items():
        if is_set:
            raise ValueError(f"SDPOCallback does not go together with {what}.")


def _has_stream(evaluation: Any) -> bool:
    datasets = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    return any(isinstance(dataset, IterableDataset) for dataset in datasets)
