"""Trains in stages under a distributed launcher on CPU, one run after another, and writes down what ran."""

import argparse
import json
import sys
from pathlib import Path

from accelerate.utils import gather_object

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.train import describe, finish, leave, prepare_cpu
from tests.sdpo.separate_runs import check_rows, record_rows, staged_run, two_stages
from tests.sdpo.separate_runs.test_reference import measure_swap
from tests.training import logged


def check_purity(model, folder, backend) -> None:
    """Odd lengths, accumulation and workers: what an update sees on all processes is from one stage."""
    options = {"dataloader_num_workers": 1, **prepare_cpu(backend)}
    trainer = staged_run(model, folder, per_device_train_batch_size=2, **options)
    seen = record_rows(trainer)
    trainer.train()
    # Nine and eleven rows on two processes, in batches of two: three are repeated, and one
    stages, both = trainer.stages, gather_object(seen)
    for stage, repeated in zip(stages, (3, 1), strict=True):
        trainer.stages = [stage]
        check_rows(trainer, [row for row in both if stage.first_update <= row[0] < stage.last_update], repeated)
    finish(trainer)


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
        # Even numbers of rows, which two processes share without repeating any
        trainer = staged_run(args.model, folder, mode, two_stages(10, 14), **options, **prepare_cpu(args.backend))
        trainer.train()
        trainer.save_model()
        peak, largest = measure_swap(trainer)
        report = {
            "swap": [peak, largest],
            **describe(trainer, args.backend),
            **{name: logged(trainer, name) for name in ("loss", "learning_rate", "sdpo/gamma_ref")},
        }
        if trainer.is_world_process_zero():
            (folder / "report.json").write_text(json.dumps(report))
        finish(trainer)
        # From within stage 2, whose reference must come back
        trainer = staged_run(args.model, folder, mode, two_stages(10, 14), **options, **prepare_cpu(args.backend))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
        trainer.save_model(str(folder / "resumed"))
        finish(trainer)
    if args.backend == "ddp":  # batches are drawn alike under all
        check_purity(args.model, Path(args.output_dir) / "purity", args.backend)
    leave()


if __name__ == "__main__":
    main()
