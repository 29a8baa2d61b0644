"""Train sDPO runs on CPU under a distributed launcher and report what ran. Started by the tests."""

import argparse
import json
import sys
from pathlib import Path

from accelerate.utils import gather_object

sys.path.insert(0, str(Path(__file__).parents[2]))

from stepdpo_trl.sdpo import report as sdpo_report
from tests.distributed.train import describe, finish, leave, prepare_cpu
from tests.sdpo.separate_runs import check_rows, record_rows, staged_run, two_stages
from tests.sdpo.test_reference import measure_swap
from tests.training import logged

# Rows of the stages. Even numbers: two processes share them without repeating any
ROWS = (6, 10)


def check_purity(model, folder, strategy) -> None:
    """Check that each update sees rows of one stage only, on all processes, despite uneven stage lengths."""
    options = {"dataloader_num_workers": 1, **prepare_cpu(strategy)}
    trainer = staged_run(model, folder, per_device_train_batch_size=2, **options)
    seen = record_rows(trainer)
    trainer.train()
    # Nine and eleven rows on two processes in batches of two: three rows are repeated in stage 1, one in stage 2
    stages, both = trainer.stages, gather_object(seen)
    for stage, repeated in zip(stages, (3, 1), strict=True):
        trainer.stages = [stage]
        check_rows(trainer, [row for row in both if stage.first_update <= row[0] < stage.last_update], repeated)
    finish(trainer)


def main() -> None:
    """For each mode: train, save, report, then resume from a checkpoint of stage 2."""
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("model")
    parser.add_argument("output_dir")
    parser.add_argument("modes", nargs="+")
    args = parser.parse_args()
    sdpo_report.find_spec = lambda name: None  # skips the plots, which take longer than the training
    # Batches of one on two processes are batches of two on one
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 4}
    for mode in args.modes:
        folder = Path(args.output_dir) / mode
        options |= prepare_cpu(args.strategy)
        trainer = staged_run(args.model, folder, mode, two_stages(*ROWS), **options)
        trainer.train()
        trainer.save_model()
        peak, largest = measure_swap(trainer)
        report = {
            "swap": [peak, largest],
            **describe(trainer, args.strategy),
            **{name: logged(trainer, name) for name in ("loss", "learning_rate", "sdpo/gamma_ref")},
        }
        if trainer.is_world_process_zero():
            (folder / "report.json").write_text(json.dumps(report))
        finish(trainer)
        # Within stage 2, whose reference must be restored
        trainer = staged_run(args.model, folder, mode, two_stages(*ROWS), **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
        trainer.save_model(str(folder / "resumed"))
        finish(trainer)
    if args.strategy == "ddp":  # all strategies draw batches in the same way
        check_purity(args.model, Path(args.output_dir) / "purity", args.strategy)
    leave()


if __name__ == "__main__":
    main()
