"""
Throughput of trl.DPOTrainer and StepDPOTrainer on step pairs with images, alternating in one process.

    python examples/benchmark_vision.py                            # 3 million parameters, for a CPU
    python examples/benchmark_vision.py --all --json vision.json   # all rows of the table in shared_prefix/README.md

The model has the architecture of Qwen2.5-VL and random weights. A pair has one image of about 600 tokens, a prefix of
about 150 and two steps of about 60, all of random words and pixels. DPOTrainer does not train step pairs, so it
receives prompt and prefix as one prompt, which results in the same tokens. In each round, the trainers take turns to
train on the same new pairs in the Trainer's own loop: one step of warm-up, then --steps steps, which are timed as a
whole (image processing, policy and reference forward, backward, optimizer). Before that, one step on two pairs must
result in the same loss, log-probabilities and gradient norm.

--lengths: "varied" (images of 408 to 792 tokens, texts log-normal with a coefficient of variation of 0.5), "equal"
(no padding to save), or "four-per-problem" (varied, four pairs of each problem and its image in a batch).
--settings: "same" (DPOTrainer's defaults on both sides) or "recommended" (StepDPOTrainer with precomputed reference
scores and without gradient checkpointing, DPOTrainer with its defaults). Precomputing is not timed.
--peft: train LoRA of rank 16 on the language model, as in recipes/qwen2_5_vl_7b.yaml, instead of all weights.

The speedup is that of the time that passes on a GPU, and that of processor time on one thread of a CPU, because other
processes can slow down one of the trainers more than the other. Positions are the tokens that the policy embeds,
including padding. Unique tokens are the nodes of a trie of each batch. Vision-tower runs count the images that the
tower encodes in a forward pass of the policy. The peak memory is that of the tensors that one step allocates.

The linear layers of the tower compute half as much per image token as those of the language model (0.4 times in 7B).
TRL's head scores every position on a CPU, but only the steps on a GPU, so the vocabulary is small.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from benchmark_inputs import Writer, load_tokenizer, share_weights  # noqa: E402
from benchmark_measure import CUDA, Recorder, Stopwatch, count_unique  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    PrinterCallback,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from stepdpo_trl import StepDPOConfig, StepDPOTrainer  # noqa: E402
from stepdpo_trl.step_dpo.vision import PROMPT_TEXT  # noqa: E402

NAMES = ("DPOTrainer", "StepDPOTrainer")
PATCH = 28  # side of the pixels of one token
WIDTH, HEIGHTS = 24, (17, 33)  # of images, in tokens
PLACEHOLDER = "<|vision_start|> <|image_pad|> <|vision_end|>"
VOCABULARY = 1000
# Lengths, settings, and whether to train LoRA
TABLE = [
    ("varied", "same", False),
    ("varied", "recommended", False),
    ("varied", "recommended", True),
    ("equal", "same", False),
    ("four-per-problem", "same", False),
]
FORMATS = {
    "pairs_per_second": ("pairs per second", "{:.2f}"),
    "pairs_per_processor_second": ("pairs per second of processor time", "{:.2f}"),
    "positions_per_unique": ("positions computed / unique tokens", "{:.3f}"),
    "tower_runs_per_image": ("vision-tower runs / image", "{:.2f}"),
    "peak_memory_gib": ("peak memory of a step, GiB", "{:.2f}"),
}
CHECKED = ("loss", "logps/chosen", "logps/rejected", "grad_norm")


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Processor of Qwen2.5-VL without videos, whose processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer)


def make_processor() -> ImageTextProcessor:
    """Create a processor whose tokens are words."""
    tokenizer = load_tokenizer(None, VOCABULARY)
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return ImageTextProcessor(Qwen2VLImageProcessorPil(), tokenizer)


def make_model(processor: ImageTextProcessor) -> Any:
    """Create a Qwen2.5-VL with a small decoder and a tower in proportion to that of 7B."""
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": processor.tokenizer.eos_token_id,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_heads": 2,
        "out_hidden_size": 192,
        "fullatt_block_indexes": [3],
    }
    ids = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    return model.to("cuda" if CUDA else "cpu")


def draw_pairs(lengths: str, number: int, seed: int) -> list[dict[str, Any]]:
    """
    Draw pairs of random words and pixels.

    Args:
        lengths (`str`):
            `"varied"`, `"equal"` or `"four-per-problem"`.
        number (`int`):
            Number of pairs.
        seed (`int`):
            Random seed.

    Returns:
        `list[dict]`: Step pairs with `images`. Those of a problem share the beginning of their prefixes.
    """
    writer = Writer(VOCABULARY, seed)

    def words(median: int) -> str:
        return writer.words(median if lengths == "equal" else writer.length(median))

    pairs: list[dict[str, Any]] = []
    while len(pairs) < number:
        least, most = HEIGHTS
        height = (least + most) // 2 if lengths == "equal" else int(writer.rng.integers(least, most + 1))
        pixels = writer.rng.integers(0, 256, (height * PATCH, WIDTH * PATCH, 3), dtype=np.uint8)
        image, prompt = Image.fromarray(pixels), PLACEHOLDER + words(60)
        for _ in range(4 if lengths == "four-per-problem" else 1):
            steps = {name: words(60) for name in ("chosen", "rejected")}
            pairs.append({"images": [image], "prompt": prompt, "initial_reason_steps": words(90), **steps})
    return pairs[:number]


def as_prompt(pair: dict[str, Any]) -> dict[str, Any]:
    """Return a step pair as the ordinary pair that DPOTrainer trains, with the same tokens."""
    prefix = pair["initial_reason_steps"]
    return {name: pair[name] for name in ("images", "chosen", "rejected")} | {"prompt": pair["prompt"] + prefix}


def token_names(pair: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the tokens of a pair as a collator receives it, with the tokens of its image named after the image."""
    (image,) = pair["images"]
    tokens = image.width * image.height // PATCH**2
    start, _, *words = (pair.get(PROMPT_TEXT) or pair["prompt"]).split()
    placeholders = [(image.tobytes()[:64], i) for i in range(tokens)]
    steps = {f"{name}_ids": pair.get(f"{name}_ids") or pair[name].split() for name in ("chosen", "rejected")}
    return {"prompt_ids": [start, *placeholders, *words], **steps}


class ProcessorStopwatch(Stopwatch):
    """Stopwatch that also measures processor time, which other processes of the machine do not change."""

    processor_seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start or stop."""
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 1:
            self.processor_start = time.process_time()
        elif control.should_training_stop:
            self.processor_seconds = time.process_time() - self.processor_start


class Side:
    """
    A trainer and its measurements.

    Args:
        trainer (`DPOTrainer`):
            The trainer, with all pairs as its train dataset.
        steps (`int`):
            Number of timed steps of a turn.
    """

    def __init__(self, trainer: Any, steps: int) -> None:
        self.trainer, self.pairs = trainer, trainer.train_dataset
        self.stopwatch = ProcessorStopwatch(steps)
        self.recorder = trainer.data_collator = Recorder(trainer.data_collator)
        self.encoded: list[int] = []  # images of each run of the policy's tower
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.stopwatch)
        trainer.model.get_input_embeddings().register_forward_hook(self.stopwatch.count_positions)
        model: Any = trainer.model.get_base_model() if isinstance(trainer.model, peft.PeftModel) else trainer.model
        model.model.visual.register_forward_pre_hook(self._count_images, with_kwargs=True)

    def _count_images(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.encoded.append(len(kwargs["grid_thw"]))

    def train(self, rows: range) -> None:
        """Train on some of the pairs."""
        self.trainer.train_dataset = self.pairs.select(rows)
        for records in (self.recorder.batches, self.recorder.seconds, self.encoded):
            records.clear()
        self.trainer.train()

    def measure(self, rows: range) -> dict[str, float]:
        """Train for one turn and return its figures."""
        self.train(rows)
        steps = self.stopwatch.steps
        batches = self.recorder.batches[1 : 1 + steps]
        named = [[token_names(pair) for pair in batch] for batch in batches]
        images = [len({pair["prompt_ids"][1][0] for pair in batch}) for batch in named]
        return {
            "pairs_per_second": sum(map(len, batches)) / self.stopwatch.seconds,
            "pairs_per_processor_second": sum(map(len, batches)) / self.stopwatch.processor_seconds,
            "positions_per_unique": self.stopwatch.positions / sum(map(count_unique, named)),
            "tower_runs_per_image": sum(self.encoded[1 : 1 + steps]) / sum(images),
        }

    def peak_memory(self, rows: range) -> float:
        """Return the peak of the tensors that a step allocates, in GiB."""
        batch = self.trainer._prepare_inputs(self.recorder.collator(list(self.pairs.select(rows))))
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU, *[activity.CUDA] * CUDA]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            loss = self.trainer.compute_loss(self.trainer.model, batch)
            loss.backward()
        self.trainer.model.zero_grad()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
        changes = [
            event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.device_type() == kind
        ]
        return float(np.cumsum(changes).max()) / 2**30


def make_sides(pairs: list[dict[str, Any]], lengths: str, settings: str, args: argparse.Namespace) -> list[Side]:
    """Create DPOTrainer and StepDPOTrainer with the same weights and pairs."""
    transformers.set_seed(args.seed)
    processor = make_processor()
    base = make_model(processor)
    common: dict[str, Any] = {
        "per_device_train_batch_size": args.batch_size,
        "max_length": None,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "seed": args.seed,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "dataloader_pin_memory": CUDA,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    own: dict[str, Any] = {"shared_prefix": "on", "group_by_prompt": lengths == "four-per-problem"}
    if settings == "recommended":
        own |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    sides = []
    for kind, config, rows in (
        (trl.DPOTrainer, trl.DPOConfig(args.output_dir, **common), map(as_prompt, pairs)),
        (StepDPOTrainer, StepDPOConfig(args.output_dir, **common, **own), pairs),
    ):
        transformers.set_seed(args.seed)  # same adapter for both
        trainer = kind(
            model=copy.deepcopy(base),
            ref_model=None if args.peft or config.precompute_ref_log_probs else share_weights(base),
            args=config,
            train_dataset=datasets.Dataset.from_list(list(rows)),
            processing_class=processor,
            peft_config=peft.LoraConfig(r=16, target_modules=".*language_model.*_proj") if args.peft else None,
        )
        sides.append(Side(trainer, args.steps))
    return sides


def check_first_step(sides: list[Side]) -> dict[str, float]:
    """Train both sides on two pairs, and return the relative differences of what they log."""
    for side in sides:
        side.train(range(2))
    stock, own = (side.trainer.state.log_history[0] for side in sides)
    differences = {name: abs(own[name] - stock[name]) / abs(stock[name]) for name in CHECKED}
    print("    relative differences of the first step: " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))
    if not all(difference <= (5e-2 if CUDA else 1e-3) for difference in differences.values()):
        raise SystemExit("The two trainers do not compute the same.")
    return differences


def run_row(lengths: str, settings: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row of the table and print it."""
    turn = (args.steps + 2) * args.batch_size  # with a step of warm-up, and the batch that is collated ahead
    pairs = draw_pairs(lengths, turn * args.rounds, args.seed)
    print(f"\n{lengths}, settings: {settings}{', LoRA' if args.peft else ''}", flush=True)
    sides = make_sides(pairs, lengths, settings, args)
    print(
        f"    {sides[0].trainer.model.num_parameters():,} parameters, batches of {args.batch_size} pairs", flush=True
    )
    differences = check_first_step(sides)
    turns: list[list[dict[str, float]]] = [[], []]
    for start in range(0, len(pairs), turn):
        for side, own in zip(sides, turns, strict=True):
            own.append(side.measure(range(start, start + turn)))
    memory = [side.peak_memory(range(args.batch_size)) for side in sides]
    medians = [
        {name: statistics.median(one[name] for one in own) for name in own[0]} | {"peak_memory_gib": peak}
        for own, peak in zip(turns, memory, strict=True)
    ]
    speed = "pairs_per_second" if CUDA else "pairs_per_processor_second"
    quotients = [two[speed] / one[speed] for one, two in zip(*turns, strict=True)]
    speedup = medians[1][speed] / medians[0][speed]
    print(f"    {'':<36}{NAMES[0]:>16}{NAMES[1]:>16}")
    for name, (title, style) in FORMATS.items():
        print(f"    {title:<36}" + "".join(f"{style.format(own[name]):>16}" for own in medians))
    print(f"    speedup {speedup:.2f} ({min(quotients):.2f} to {max(quotients):.2f} of a round)", flush=True)
    row = {
        "lengths": lengths,
        "settings": settings,
        "peft": args.peft,
        "first_step_differences": differences,
        "speedup": speedup,
    }
    return {**row, "quotients": quotients, **dict(zip(NAMES, medians, strict=True))}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lengths", choices=["varied", "equal", "four-per-problem"], default="varied")
    parser.add_argument("--settings", choices=["same", "recommended"], default="same")
    parser.add_argument("--peft", action="store_true", help="train LoRA on the language model")
    parser.add_argument("--all", action="store_true", help="measure all rows of the table")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a turn (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    start = time.perf_counter()
    if not CUDA:
        torch.set_num_threads(1)  # processor time would count the waiting of several threads
    rows = TABLE if args.all else [(args.lengths, args.settings, args.peft)]
    results = []
    with tempfile.TemporaryDirectory() as args.output_dir:
        for lengths, settings, args.peft in rows:
            results.append(run_row(lengths, settings, args))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nTook {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
