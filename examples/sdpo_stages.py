"""
DPO on all step pairs at once against sDPO in two stages, on the quickstart's small model and its 309 step pairs.

    python examples/sdpo_stages.py

Arms: `dpo` (all pairs), and sDPO with the stages `natural` (easy to hard), `reversed` and `random`. Sources are the
pairs of problems with 4 operations (146) and with fewer (163). The easier one is, as in the paper, where the model to
be trained more often prefers the chosen step (`measure_gamma`). `random` deals both sources over stages of the same
sizes. All arms make the same number of updates of 32 pairs each; sDPO makes half of them in each stage, with a
warm-up and a cosine decay of its own, so its learning rate rises from 0 twice. beta is 0.4 for all. It acts against
the reference, which moves with the second stage: sDPO can go further from the start at the same beta.

The learning rate is chosen for `dpo` and for sDPO (with `natural`) from one grid, with one seed, by greedy accuracy
on problems that are neither trained on nor reported on; of equals the first. Then every arm runs with each seed, which
orders the pairs and draws the random split, and is measured on the same 1,000 held-out problems.

Intervals of a mean over seeds, and of a difference from `dpo` at the same seeds and problems, are +-1.96 standard
errors, with se^2 = var(problems' means over seeds) / problems + var(seeds' means) / seeds. This counts the chance
within a run twice and is therefore rather too wide; few seeds make it rather too narrow. With one seed it covers the
choice of problems only. `results.json` holds every run with its Wilson interval, and is written after every run.

What to expect: 15 minutes of one core (23 minutes beside other work), and no difference between the arms, but for
the reversed order, which is last without being separable:

    right answers, %          before      dpo         natural     reversed    random
    greedy, mean of 5 seeds   76.0        97.9        97.7        97.6        97.9
      minus dpo                                       -0.2+-0.3   -0.3+-0.4   +0.0+-0.3
    sampled, mean of 5 seeds  71.1        91.0        90.9        90.4        91.1
      minus dpo                                       -0.1+-0.8   -0.6+-0.9   +0.2+-0.3

Both methods chose 3e-5. The paper's gain of sDPO over DPO (H4 72.67 to 74.31) does not show here: both stages hold
pairs of one origin, made by one model, and greedy accuracy is near its ceiling.
"""

import argparse
import json
import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed  # noqa: E402

from stepdpo_trl import SDPOCallback, StepDPOConfig, StepDPOTrainer, measure_gamma, split_stages  # noqa: E402
from stepdpo_trl.quickstart import (  # noqa: E402
    MODEL_PATH,
    PAIRS_PATH,
    Accuracy,
    Problem,
    final_answer,
    generate_solutions,
    make_problems,
)

ARMS = ("dpo", "natural", "reversed", "random")
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def parse_args() -> argparse.Namespace:
    """Read and check the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sdpo_stages"), help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (%(default)s)")
    parser.add_argument("--problems", type=int, default=1000, help="held-out problems (%(default)s)")
    parser.add_argument("--updates", type=int, default=40, help="of each run, an even number (%(default)s)")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1.5e-5, 3e-5, 6e-5], help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="see that it runs: 1 seed, 20 problems, 4 updates")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.problems, args.updates, args.learning_rates = 1, 20, 4, [3e-5]
    for name in ("seeds", "problems"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but there must be at least 1.")
    if args.updates < 2 or args.updates % 2:
        parser.error(f"--updates is {args.updates}, but must be even and at least 2: two stages share them.")
    if not all(0 < rate < math.inf for rate in args.learning_rates):
        parser.error(f"--learning_rates are {args.learning_rates}, but must be above 0.")
    return args


def config(folder: str, max_steps: int, learning_rate: float, seed: int) -> StepDPOConfig:
    """The quickstart's settings, with full batches only, so that every update sees as many pairs."""
    return StepDPOConfig(
        output_dir=folder,
        learning_rate=learning_rate,
        beta=0.4,
        seed=seed,
        max_steps=max_steps,  # with SDPOCallback: of each stage
        per_device_train_batch_size=32,
        dataloader_drop_last=True,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_length=None,
        precompute_ref_log_probs=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


def train(tokenizer: Any, data: Any, updates: int, learning_rate: float, seed: int) -> Any:
    """The model trained on one data set, or on a dict of stages."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    staged = isinstance(data, dict)
    with tempfile.TemporaryDirectory() as folder:
        trainer = StepDPOTrainer(
            model=model,
            args=config(folder, updates // 2 if staged else updates, learning_rate, seed),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[SDPOCallback()] if staged else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if trainer.state.global_step != updates:
        raise RuntimeError(f"{trainer.state.global_step} updates were made instead of {updates}.")
    return model


def solve(model: Any, tokenizer: Any, problems: list[Problem], temperature: float) -> list[bool]:
    """Which problems a model solves."""
    set_seed(0)  # the same draws for every model
    solutions = generate_solutions(model, tokenizer, [problem.text for problem in problems], temperature=temperature)
    return [final_answer(text) == problem.answer for text, problem in zip(solutions, problems, strict=True)]


def mean_and_half(solved: np.ndarray) -> tuple[float, float]:
    """Mean of (seeds, problems) and half its 95 % interval, as the docstring above says."""
    squared = sum(np.var(means, ddof=1) / len(means) for means in (solved.mean(0), solved.mean(1)) if len(means) > 1)
    return float(solved.mean()), 1.96 * math.sqrt(squared)


def main() -> None:
    """Choose learning rates, train, measure, report."""
    args = parse_args()
    start = time.perf_counter()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    first = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    pairs = datasets.Dataset.from_json(str(PAIRS_PATH))
    operations = [len(Problem.parse(prompt).operators) for prompt in pairs["prompt"]]
    pairs = pairs.add_column(
        "source", ["4 operations" if number == 4 else "2 or 3 operations" for number in operations]
    )
    with tempfile.TemporaryDirectory() as folder:
        gamma = measure_gamma(first, pairs, config(folder, 1, 3e-5, 0), tokenizer)
    natural = split_stages(pairs, "easy_to_hard", source_column="source", gamma=gamma)
    for name in natural:
        of_source = gamma[np.array(pairs["source"]) == name]
        print(f"{name}: {len(of_source)} pairs, reward accuracy before training {(of_source > 0).mean():.1%}")
    fractions = [len(stage) / len(pairs) for stage in natural.values()]

    def data_of(arm: str, seed: int) -> Any:
        if arm == "random":
            return split_stages(pairs, "stratified", fractions=fractions, source_column="source", seed=seed)
        return {"dpo": pairs, "natural": natural, "reversed": dict(reversed(natural.items()))}[arm]

    problems = make_problems(args.problems, "held_out")
    # Twice as many are drawn, so that enough are left
    others = [problem for problem in make_problems(2 * args.problems, "held_out", seed=1) if problem not in problems]
    validation = others[: args.problems // 2]
    results: dict[str, Any] = {
        "updates": args.updates,
        "stages": {name: len(stage) for name, stage in natural.items()},
        "validation": {},
        "runs": [],
    }
    solved: dict[tuple[str, str], list[list[bool]]] = {}

    def measure(model: Any, arm: str, seed: int | None) -> None:
        run: dict[str, Any] = {"arm": arm, "seed": seed}
        for how, temperature in TEMPERATURES.items():
            right = solve(model, tokenizer, problems, temperature)
            accuracy = Accuracy(sum(right), len(right))
            solved.setdefault((arm, how), []).append(right)
            run[how] = {"accuracy": accuracy.value, "interval": accuracy.interval, "solved": right}
            print(f"{arm}, seed {seed}, {how}: {accuracy}", flush=True)
        results["runs"].append(run)
        save()

    def save() -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "results.json").write_text(json.dumps(results))

    rates = {}
    for arm in ("dpo", "natural"):
        scores = {}
        for rate in args.learning_rates if len(args.learning_rates) > 1 else []:
            model = train(tokenizer, data_of(arm, 0), args.updates, rate, seed=0)
            scores[rate] = float(np.mean(solve(model, tokenizer, validation, 0.0)))
            print(f"{arm}, learning rate {rate:g}: {scores[rate]:.1%} on validation problems", flush=True)
        results["validation"][arm] = scores
        rates[arm] = max(scores, key=lambda rate: scores[rate]) if scores else args.learning_rates[0]
    results["learning_rates"] = rates

    measure(first, "before", None)
    for seed in range(args.seeds):
        for arm in ARMS:
            rate = rates["dpo" if arm == "dpo" else "natural"]
            measure(train(tokenizer, data_of(arm, seed), args.updates, rate, seed), arm, seed)

    print(f"\n{args.updates} updates, {args.seeds} seeds, {len(problems)} problems. Learning rates: {rates}\n")
    print(f"    {'':<10}{'':<10}{'mean (95 %)':<18}{'range':<18}minus dpo, points (95 %)")
    results["summary"] = []
    for how in TEMPERATURES:
        baseline = np.array(solved["dpo", how], dtype=float)
        for arm in ("before", *ARMS):
            table = np.array(solved[arm, how], dtype=float)
            by_seed = table.mean(1)
            mean, half = mean_and_half(table)
            difference, spread = mean_and_half(table - baseline)
            results["summary"].append(
                {"how": how, "arm": arm, "mean": mean, "half": half, "minus_dpo": difference, "minus_dpo_half": spread}
            )
            spans = f"{by_seed.min():.1%} to {by_seed.max():.1%}"
            against = "" if arm == "dpo" else f"{100 * difference:+.1f} +- {100 * spread:.1f}"
            print(f"    {how:<10}{arm:<10}{f'{mean:.1%} +- {100 * half:.1f}':<18}{spans:<18}{against}")
    results["seconds"] = time.perf_counter() - start
    save()
    print(f"\nTook {results['seconds']:.0f} s. Every run is in {str(args.output_dir / 'results.json')!r}.")


if __name__ == "__main__":
    main()
