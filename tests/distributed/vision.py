"""Train on step pairs with images in several processes and report the result. The tests launch this script."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.train import describe, finish, leave, prepare_cpu
from tests.training import logged, make_trainer
from tests.vision import vision_step_rows

OPTIONS = {"train_sampling_strategy": "sequential", "max_length": None}


def mixed_rows():
    """Return 12 rows, 4 per update, of which the first process has images only in the second update."""
    rows = [row for row in vision_step_rows(18) if row["images"]]
    for number in (0, 1, 6, 8, 9):
        rows[number]["images"] = []
    return rows


def main() -> None:
    """Train, save the model and write a report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=["ddp", "zero2", "zero3"])
    parser.add_argument("model")
    parser.add_argument("output_dir")
    args = parser.parse_args()
    trainer = make_trainer(
        args.model,
        args.output_dir,
        mixed_rows(),
        per_device_train_batch_size=2,
        shared_prefix="on",
        **OPTIONS,
        **prepare_cpu(args.strategy),
    )
    trainer.train()
    trainer.save_model()
    report = {**describe(trainer, args.strategy), "loss": logged(trainer, "loss")}
    if trainer.is_world_process_zero():
        (Path(args.output_dir) / "report.json").write_text(json.dumps(report))
    finish(trainer)
    leave()


if __name__ == "__main__":
    main()
