"""Train on step pairs with images in several processes and report the result. The tests launch this script."""

import argparse
import json
import sys
from pathlib import Path

from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.train import describe, finish, leave, prepare_cpu
from tests.training import logged, make_trainer
from tests.vision import VISION_MODELS, vision_step_rows

OPTIONS = {"train_sampling_strategy": "sequential", "max_length": None}
MODES = {
    "shared": {"shared_prefix": "on"},
    "padded": {"shared_prefix": "off"},
    # With the vision tower
    "lora": {"peft_config": LoraConfig(r=4, target_modules=r".*(q_proj|v_proj)"), "precompute_ref_log_probs": True},
}


# A model and a mode, such as "llava-shared"
CELLS = {f"{model}-{mode}": (model, mode) for model in VISION_MODELS for mode in MODES}


def mixed_rows():
    """Return 12 rows, 4 per update, of which the first process has images only in the second update."""
    rows = [row for row in vision_step_rows(18) if row["images"]]
    for number in (0, 1, 6, 8, 9):
        rows[number]["images"] = []
    return rows


def main() -> None:
    """Train, save the model and write a report for each model and mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("models", help="folder with the models")
    parser.add_argument("pairs")
    parser.add_argument("output_dir")
    parser.add_argument("cells", nargs="+", choices=CELLS)
    args = parser.parse_args()
    pairs = load_from_disk(args.pairs)  # the processes must share a file for precomputed scores
    for cell in args.cells:
        name, mode = CELLS[cell]
        folder, path = Path(args.output_dir) / cell, str(Path(args.models) / name)
        options = {**OPTIONS, **MODES[mode], **prepare_cpu(args.strategy)}
        # ZeRO-3 draws other random numbers while it loads a model, so the adapters would start differently
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32") if mode == "lora" else path
        options["processing_class"] = VISION_MODELS[name][0]()
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
