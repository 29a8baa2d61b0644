"""Trains in stages under a distributed launcher on CPU, one run after another, and writes down what ran."""

import argparse
import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.train import is_sharded, prepare_cpu
from tests.sdpo import staged_run
from tests.training import logged


def finish(trainer) -> None:
    """Make room for the next trainer in this process."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()


def main() -> None:
    """Run each mode, save, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("model")
    parser.add_argument("output_dir")
    parser.add_argument("modes", nargs="+")
    args = parser.parse_args()
    # Two processes with batches of one are one with batches of two
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 4}
    for mode in args.modes:
        folder = Path(args.output_dir) / mode
        trainer = staged_run(args.model, folder, mode, **options, **prepare_cpu(args.backend))
        trainer.train()
        trainer.save_model()
        report = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "processes": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
            "sharded": args.backend != "ddp" and is_sharded(trainer),
            **{name: logged(trainer, name) for name in ("loss", "learning_rate", "sdpo/gamma_ref")},
        }
        if trainer.is_world_process_zero():
            (folder / "report.json").write_text(json.dumps(report))
        finish(trainer)
        # From within stage 2, whose reference must come back
        trainer = staged_run(args.model, folder, mode, **options, **prepare_cpu(args.backend))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
        trainer.save_model(str(folder / "resumed"))
        finish(trainer)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
