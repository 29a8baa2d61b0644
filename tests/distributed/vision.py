"""Train on step pairs with images in several processes and report the result. The tests launch this script."""

import argparse
import json
import sys
from pathlib import Path

from datasets import load_from_disk
from peft import LoraConfig
from transformers import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.train import describe, finish, leave, prepare_cpu
from tests.training import logged, make_trainer
from tests.vision import vision_step_rows

OPTIONS = {"train_sampling_strategy": "sequential", "max_length": None}
MODES = {
    "shared": {"shared_prefix": "on"},
    "padded": {"shared_prefix": "off"},
    # With the vision tower
    "lora": {"peft_config": LoraConfig(r=4, target_modules=r".*(q_proj|v_proj)"), "precompute_ref_log_probs": True},
}


def mixed_rows():
    """Return 12 rows, 4 per update, of which the first process has images only in the second update."""
    rows = [row for row in vision_step_rows(18) if row["images"]]
    for number in (0, 1, 6, 8, 9):
        rows[number]["images"] = []
    return rows


def main() -> None:
    """Train, save the model and write a report in each mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("output_dir")
    parser.add_argument("modes", nargs="+", choices=MODES)
    args = parser.parse_args()
    pairs = load_from_disk(args.pairs)  # the processes must share a file for precomputed scores
    for mode in args.modes:
        folder = Path(args.output_dir) / mode
        options = {**OPTIONS, **MODES[mode], **prepare_cpu(args.strategy)}
        # ZeRO-3 draws other random numbers while it loads a model, so the adapters would start differently
        model = (
            LlavaForConditionalGeneration.from_pretrained(args.model, dtype="float32")
            if mode == "lora"
            else args.model
        )
        trainer = make_trainer(model, folder, pairs, per_device_train_batch_size=2, **options)
        trainer.train()
        trainer.save_model()
        report = {**describe(trainer, args.strategy), "loss": logged(trainer, "loss")}
        if trainer.is_world_process_zero():
            (folder / "report.json").write_text(json.dumps(report))
        finish(trainer)
    leave()


if __name__ == "__main__":
    main()
