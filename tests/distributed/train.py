"""Trains on tiny step data under a distributed launcher on CPU, and writes down what ran. Started by the tests."""

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


def prepare_cpu(backend: str) -> dict[str, object]:
    """Stock accelerate and DeepSpeed expect GPUs; returns the training arguments that make them run without."""
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    if backend == "ddp":
        return {"use_cpu": True}
    if backend.startswith("zero"):
        import deepspeed

        # Compiles for a minute, and gains nothing here
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        # Without this, accelerate trains two independent models on a CPU
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        gloo = ("gloo", DistributedType.MULTI_GPU)
        PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: gloo
    return {"use_cpu": False, "ddp_backend": "gloo"}


def is_sharded(trainer) -> bool:
    """Whether each process holds a part of what the back end says it shards."""
    wrapped = trainer.model_wrapped
    if trainer.is_deepspeed_enabled and wrapped.zero_optimization_stage() == 2:
        owned = sum(group.numel() for group in wrapped.optimizer.single_partition_of_fp32_groups)
        return owned < sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if trainer.is_deepspeed_enabled:
        return all(p.ds_tensor.numel() < p.ds_numel for p in wrapped.parameters())
    return all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in wrapped.parameters())


def describe(trainer, backend: str) -> dict[str, object]:
    """What ran, which the tests compare with what should have."""
    return {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": backend != "ddp" and is_sharded(trainer),
    }


def record_packs(trainer) -> list[tuple[int, int]]:
    """For each batch of this process, into how many packs it is cut, and how many the model runs."""
    seen, in_step = [], trainer._in_step

    def record(tree):
        padded = in_step(tree)
        seen.append((len(tree.packs), len(padded.packs)))
        return padded

    trainer._in_step = record
    return seen


def finish(trainer) -> None:
    """Make room for the next trainer in this process."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()


def leave() -> NoReturn:
    """End all processes together, without the interpreter's teardown, in which Gloo's threads may abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Run each mode: train, save, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=["ddp", "zero2", "zero3", "fsdp2"])
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
            gradient_checkpointing=lora and args.backend != "zero3",  # where it is reentrant, which parts exclude
            **prepare_cpu(args.backend),
        )
        packs = record_packs(trainer)
        trainer.train()
        trainer.save_model()
        report = {
            **describe(trainer, args.backend),
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
