"""
Compare the throughput of trl.DPOTrainer and StepDPOTrainer on the same pairs in one process.

    python examples/benchmark_throughput.py                        # 10 million parameters, for a CPU
    python examples/benchmark_throughput.py --all --json cpu.json  # all rows of the README's table
    python examples/benchmark_throughput.py --config qwen2.5-7b --peft --lengths long   # for a GPU with 80 GB

By default, the model has random weights and the pairs are random words with realistic lengths. Use --model and
--dataset to benchmark real ones. Both trainers receive the tokens that StepDPOTrainer creates from the pairs. In each
round, they take turns to train on the same new pairs with the training loop of the Trainer: one warmup step, then
--steps steps, which are timed together (collator, policy and reference forward, backward, optimizer). Before the first
round, both train one step on two pairs, which must give the same loss, log-probabilities and gradient norm.

--settings selects the options of the two trainers:
    same          both use the defaults of DPOTrainer: reference in each step, gradient checkpointing
    recommended   StepDPOTrainer precomputes the reference and does not checkpoint, DPOTrainer uses its defaults
    tuned         both precompute the reference and do not checkpoint
Precomputing the reference takes one forward pass over all pairs, which is not timed.

The results are medians over the rounds, and the ratio of the medians with the smallest and largest ratio of a round.
Positions are counted in the forward passes of the policy and include padding. Unique tokens are the nodes of a trie of
each batch. Memory is the peak above weights and optimizer state. Model FLOPs utilization counts 6 FLOPs per unique
token and parameter of the linear layers (4 with LoRA, whose frozen weights need no gradients), and 2 more if the
reference is computed in the step. It does not count attention, head and recomputation.
"""

import argparse
import copy
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore")

import datasets  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from benchmark_inputs import (  # noqa: E402
    CONFIGS,
    LENGTHS,
    count_linear,
    load_model,
    load_pairs,
    load_tokenizer,
    share_weights,
    write_pairs,
)
from benchmark_measure import CUDA, Phases, Side, Turn, operator_shares  # noqa: E402

from stepdpo_trl import StepDPOConfig, StepDPOTrainer  # noqa: E402

NAMES = ("DPOTrainer", "StepDPOTrainer")
LEAN = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
# Options of DPOTrainer and of StepDPOTrainer
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "same": ({}, {}),
    "recommended": ({}, LEAN),
    "tuned": (LEAN, LEAN),
}
TABLE = [("math-step-dpo", settings) for settings in SETTINGS] + [
    (lengths, "same") for lengths in ("equal", "four-per-problem", "ultrafeedback")
]
CPU_NOTE = (
    "On CPU, TRL's fused head scores every position, so a large vocabulary would favor the trainer with fewer\n"
    "positions. The vocabulary of the small model therefore has only 2,000 tokens."
)
CHECKED = ("loss", "logps/chosen", "logps/rejected", "grad_norm")  # logged values of the first step to compare
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative
FORMATS = {
    "pairs_per_second": ("pairs per second", "{:.2f}"),
    "positions_per_unique": ("positions computed / unique tokens", "{:.3f}"),
    "peak_memory_gib": ("peak memory, GiB", "{:.1f}"),
    "utilization": ("model FLOPs utilization", "{:.1%}"),
    "collator_share": ("share of time making batches", "{:.2%}"),
}


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lengths", choices=LENGTHS, help="lengths of the random pairs (default: math-step-dpo)")
    parser.add_argument(
        "--dataset", help="dataset id, or a .jsonl or .parquet file, to use instead of random pairs; needs --model"
    )
    parser.add_argument("--settings", choices=SETTINGS, help="options of the two trainers (default: same)")
    parser.add_argument("--all", action="store_true", help="measure all rows of the README's table")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="model id or folder")
    model.add_argument(
        "--config",
        default="small",
        help=f"{', '.join(CONFIGS)} or a config.json, for a model with random weights (default: %(default)s)",
    )
    parser.add_argument("--peft", action="store_true", help="train LoRA of rank 64 on all linear layers")
    parser.add_argument(
        "--dtype",
        choices=TOLERANCE,
        default="bfloat16" if CUDA else "float32",
        help="dtype of the weights (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=_count, default=8, help="number of pairs per step (default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=5, help="number of turns per trainer (default: %(default)s)")
    parser.add_argument(
        "--steps", type=_count, default=4, help="number of timed steps per turn (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of weights, pairs and order (default: %(default)s)"
    )
    parser.add_argument("--profile", action="store_true", help="also print the time profile of StepDPOTrainer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    if args.all and (args.lengths or args.settings or args.dataset):
        parser.error("--all selects the rows itself. Remove --lengths, --settings and --dataset.")
    if args.dataset and args.lengths:
        parser.error("--dataset and --lengths both select the pairs. Remove one of them.")
    if args.dataset and not args.model:
        parser.error("--dataset contains text and needs a tokenizer. Pass --model as well.")
    if args.dataset and args.dataset.endswith((".jsonl", ".json", ".parquet")) and not Path(args.dataset).is_file():
        parser.error(f"--dataset is {args.dataset!r}, which does not exist. Fix the path.")
    if args.config not in CONFIGS and not Path(args.config).exists():
        parser.error(f"--config is {args.config!r}, which is neither a file nor one of {', '.join(CONFIGS)}.")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json is in the folder {str(args.json.parent)!r}, which does not exist. Create it first.")
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def make_sides(
    base: Any, tokenizer: Any, pairs: datasets.Dataset, options: dict[str, Any], settings: str, args: Any
) -> list[Side]:
    """Create both trainers from the weights of a model. `options` are passed to StepDPOConfig."""
    common = {
        "per_device_train_batch_size": args.batch_size,
        "max_length": None,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "seed": args.seed,
        "bf16": args.dtype == "bfloat16",
        "use_cpu": not CUDA,
        "dataloader_pin_memory": CUDA,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "logging_first_step": True,  # the first step is not timed
        "save_strategy": "no",
        "report_to": "none",
    }
    stock, own = SETTINGS[settings]
    kinds = (
        # DPOTrainer cannot tokenize steps: it starts with one pair and gets the tokens of StepDPOTrainer later
        (trl.DPOTrainer, trl.DPOConfig(args.output_dir, **common, **stock), pairs.select([0])),
        (StepDPOTrainer, StepDPOConfig(args.output_dir, **common, **own, **options), pairs),
    )
    lora = peft.LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    sides = []
    for kind, config, rows in kinds:
        transformers.set_seed(args.seed)  # same adapter for both
        trainer = kind(
            model=share_weights(base) if args.peft else copy.deepcopy(base),
            ref_model=None if args.peft or config.precompute_ref_log_probs else share_weights(base),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora if args.peft else None,
        )
        sides.append(Side(trainer, args.steps, count_linear(base)))
    return sides


def check_first_step(sides: list[Side], pairs: datasets.Dataset, dtype: str) -> dict[str, float]:
    """
    Train both sides on a small batch and compare the values that they log.

    Returns:
        `dict`: Relative difference of each value. Empty if the device runs out of memory.

    Raises:
        SystemExit: If a difference is larger than rounding errors.
    """
    stock, own = (side.first_step(pairs) for side in sides)
    if stock is None or own is None:
        return {}
    differences = {name: abs(own[name] - stock[name]) / abs(stock[name]) for name in CHECKED}
    print(f"    Loss of the first step: {stock['loss']:.6f} and {own['loss']:.6f}. Relative differences:")
    print("    " + ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items()), flush=True)
    if not all(difference <= TOLERANCE[dtype] for difference in differences.values()):  # also fails for NaN
        raise SystemExit(
            f"A difference exceeds the tolerance of {TOLERANCE[dtype]:.0e}: the trainers do not compute the same loss."
        )
    return differences


def run_row(base: Any, tokenizer: Any, lengths: str, settings: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row of the table and print it."""
    turn_pairs = (args.steps + 2) * args.batch_size  # one more for warmup, one more because batches are prefetched
    number = turn_pairs * args.rounds
    if args.dataset:
        pairs = load_pairs(args.dataset, number, args.seed)
    else:
        pairs = write_pairs(lengths, number, len(tokenizer), args.seed)
    grouped = lengths == "four-per-problem"
    print(f"\n{lengths}, settings: {settings}{', StepDPOTrainer with group_by_prompt' if grouped else ''}", flush=True)
    options = {"shared_prefix": "on", "group_by_prompt": grouped}
    sides = make_sides(base, tokenizer, pairs, options, settings, args)
    tokens = sides[1].trainer.train_dataset
    differences = check_first_step(sides, tokens.select(range(min(2, args.batch_size))), args.dtype)
    turns: list[list[Turn | None]] = [[], []]
    for start in range(0, number, turn_pairs):
        rows = tokens.select(range(start, start + turn_pairs))
        for side, own in zip(sides, turns, strict=True):
            own.append(None if None in own else side.measure(rows))
    row = {"lengths": lengths, "settings": settings, "pairs": number, "first_step_differences": differences}
    row |= summarize(turns)
    print_row(row)
    if args.profile and None not in turns[1]:
        print_shares("Operators of StepDPOTrainer", operator_shares(lambda: sides[1].measure(rows)))
        phases = Phases(sides[1])
        sides[1].measure(rows)
        print_shares("Training step of StepDPOTrainer", phases.shares())
    return row


def summarize(turns: list[list[Turn | None]]) -> dict[str, Any]:
    """
    Summarize the turns of DPOTrainer and StepDPOTrainer.

    Args:
        turns (`list[list[Turn | None]]`):
            Turns of DPOTrainer and turns of StepDPOTrainer. `None` if the device ran out of memory.

    Returns:
        `dict`: `turns` and `medians` by trainer, and `ratios` of StepDPOTrainer to DPOTrainer: the ratio of the
        medians, and the smallest and largest ratio of a round. Unknown values are `None`.
    """
    medians: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    ratios: dict[str, Any] = {}
    for figure in (field.name for field in fields(Turn)):
        columns: list[list[Any]] = [[getattr(turn, figure, None) for turn in own] for own in turns]
        for name, values in zip(NAMES, columns, strict=True):
            medians[name][figure] = None if None in values else statistics.median(values)
        stock, own = (medians[name][figure] for name in NAMES)
        ratios[figure] = None
        if stock is not None and own is not None:
            quotients = [mine / theirs for theirs, mine in zip(*columns, strict=True)]
            ratios[figure] = {"of_medians": own / stock, "least": min(quotients), "greatest": max(quotients)}
    raw = {name: [turn and asdict(turn) for turn in own] for name, own in zip(NAMES, turns, strict=True)}
    return {"turns": raw, "medians": medians, "ratios": ratios}


def print_row(row: dict[str, Any]) -> None:
    """Print the medians of both sides and their ratios."""
    print(f"    {'':<36}{NAMES[0]:>16}{NAMES[1]:>16}   ratio (range over the rounds)")
    fits = [None not in row["turns"][name] for name in NAMES]
    for figure, (title, style) in FORMATS.items():
        values = [row["medians"][name][figure] for name in NAMES]
        if any(fits) and values == [None, None]:
            continue  # not available on this machine
        cells = ["out of memory" if value is None else style.format(value) for value in values]
        ratio = row["ratios"][figure]
        text = "{of_medians:.2f} ({least:.2f} to {greatest:.2f})".format(**ratio) if ratio else "-"
        print(f"    {title:<36}{cells[0]:>16}{cells[1]:>16}   {text}", flush=True)


def print_shares(title: str, shares: dict[str, float]) -> None:
    """Print the shares of a profile."""
    print(f"    {title}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)


def describe_machine() -> dict[str, Any]:
    """Return the processor, the GPU and the versions of the libraries."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, trl, peft)},
    }


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    start = time.perf_counter()
    datasets.disable_progress_bars()
    transformers.set_seed(args.seed)
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    base = load_model(args.model, args.config, getattr(torch, args.dtype), "cuda" if CUDA else "cpu")
    tokenizer = load_tokenizer(args.model if args.dataset else None, base.config.vocab_size)
    lora = ", LoRA of rank 64" if args.peft else ""
    print(f"Model: {base.num_parameters():,} parameters, {args.dtype}{lora}. Batches of {args.batch_size} pairs.")
    if not CUDA:
        print(CPU_NOTE)
    rows = TABLE if args.all else [(args.dataset or args.lengths or "math-step-dpo", args.settings or "same")]
    results = []
    with tempfile.TemporaryDirectory() as args.output_dir:
        for lengths, settings in rows:
            results.append(run_row(base, tokenizer, lengths, settings, args))
            gc.collect()
    if args.json:
        command = shlex.join(["python", *sys.argv])
        args.json.write_text(json.dumps({"command": command, "machine": machine, "rows": results}, indent=2) + "\n")
    print(f"\nTook {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
