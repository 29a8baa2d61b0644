"""Train on tiny step data on CPU under a distributed launcher and report what ran. Started by the tests."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.tiny import step_rows
from tests.training import logged, make_trainer


def prepare_cpu(strategy: str) -> dict[str, object]:
    """Make accelerate and DeepSpeed, which expect GPUs, run on CPU. Return the training arguments that this needs."""
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # its repacked weights give wrong gradients
    if strategy == "ddp":
        return {"use_cpu": True}
    if strategy.startswith("zero"):
        import deepspeed

        # Takes a minute to compile and is not needed here
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        # Without it, accelerate trains two independent models on CPU
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        gloo = ("gloo", DistributedType.MULTI_GPU)
        PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: gloo
    return {"use_cpu": False, "ddp_backend": "gloo"}


def is_sharded(trainer) -> bool:
    """Return whether each process holds only its part of the tensors that the strategy shards."""
    wrapped = trainer.model_wrapped
    if trainer.is_deepspeed_enabled and wrapped.zero_optimization_stage() == 2:
        owned = sum(group.numel() for group in wrapped.optimizer.single_partition_of_fp32_groups)
        return owned < sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if trainer.is_deepspeed_enabled:
        return all(p.ds_tensor.numel() < p.ds_numel for p in wrapped.parameters())
    return all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in wrapped.parameters())


def describe(trainer, strategy: str) -> dict[str, object]:
    """Describe the distributed setup, for the tests to compare with the requested one."""
    return {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": strategy != "ddp" and is_sharded(trainer),
    }


def record_packs(trainer) -> list[tuple[int, int]]:
    """Record for each batch of this process how many packs it has and how many the model runs."""
    seen, in_step = [], trainer._in_step

    def record(tree):
        padded = in_step(tree)
        seen.append((len(tree.packs), len(padded.packs)))
        return padded

    trainer._in_step = record
    return seen


def finish(trainer) -> None:
    """Reset accelerate, so that the next trainer can start in this process."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()


def leave() -> NoReturn:
    """End all processes together, without interpreter teardown, in which Gloo's threads may abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Train, save and report in each mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("model")
    parser.add_argument("output_dir")
    parser.add_argument("modes", nargs="+", choices=["full", "lora"])
    args = parser.parse_args()
    for mode in args.modes:
        lora, folder = mode == "lora", Path(args.output_dir) / mode
        trainer = make_trainer(
            args.model,
            folder,
            step_rows(12),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
            per_device_train_batch_size=2,
            shared_prefix="on",
            max_length=165,
            max_tokens_per_forward=170,
            gradient_checkpointing=lora and args.strategy != "zero3",  # reentrant there, which packs do not support
            **prepare_cpu(args.strategy),
        )
        packs = record_packs(trainer)
        trainer.train()
        trainer.save_model()
        report = {
            **describe(trainer, args.strategy),
            "loss": logged(trainer, "loss"),
            "margins": logged(trainer, "rewards/margins"),
            "packs": gather_object([packs]),
        }
        if trainer.is_world_process_zero():
            (folder / "report.json").write_text(json.dumps(report))
        finish(trainer)
    leave()


if __name__ == "__main__":
    main()
