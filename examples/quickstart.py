"""
Train a small model with Step-DPO and measure its accuracy before and after, in one or two minutes on a CPU.

    python examples/quickstart.py

The model (0.8 million parameters) and the step pairs, which were built from its own mistakes, are part of the package,
so nothing is downloaded. `examples/make_quickstart_model.py` created both.
"""

import argparse
import os
import time
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed  # noqa: E402

from stepdpo_trl import StepDPOConfig, StepDPOTrainer  # noqa: E402
from stepdpo_trl.evaluation.statistics import Accuracy  # noqa: E402
from stepdpo_trl.quickstart import MODEL_PATH, PAIRS_PATH, count_correct, make_problems  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", default="outputs/quickstart", help="folder for the trained model (default: %(default)s)"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-5, help="learning rate (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.4, help="beta of the DPO loss (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of the pairs (default: %(default)s)")
    parser.add_argument(
        "--problems", type=int, default=1000, help="number of held-out problems for evaluation (default: %(default)s)"
    )
    args = parser.parse_args()
    for name in ("learning_rate", "beta"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name} is {getattr(args, name)}, but must be positive. Remove it to use the default.")
    if args.problems < 1:
        parser.error(
            f"--problems is {args.problems}, but must be at least 1. With 1000, the 95% interval is +-3 points."
        )
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, but must not be negative. Pass a whole number of at least 0.")
    return args


def main() -> None:
    """Measure the accuracy, train the model, and measure again."""
    args = parse_args()
    start = time.perf_counter()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    pairs = datasets.Dataset.from_json(str(PAIRS_PATH))
    problems = make_problems(args.problems, "held_out")
    print(f"Model: {model.num_parameters():,} parameters. Training data: {len(pairs)} step pairs such as\n")
    for column in ("prompt", "initial_reason_steps", "chosen", "rejected"):
        print(f"    {column + ':':<22}{pairs[0][column]!r}")
    print(flush=True)

    def measure(when: str) -> dict[str, Accuracy]:
        set_seed(0)  # same random numbers before and after
        return {
            name: Accuracy(count_correct(model, tokenizer, problems, temperature, f"{when}, {name}"), len(problems))
            for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
        }

    before = measure("Before")
    trainer = StepDPOTrainer(
        model=model,
        args=StepDPOConfig(
            output_dir=args.output_dir,
            learning_rate=args.learning_rate,
            beta=args.beta,
            seed=args.seed,
            per_device_train_batch_size=32,
            num_train_epochs=4,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            max_length=None,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.train()
    after = measure("After")
    trainer.save_model(args.output_dir)

    print(
        f"\nRight final answers on {len(problems)} problems that are neither in the pairs nor in the pretraining data"
    )
    print("(with 95% intervals):\n")
    print(f"    {'':<32}{'before Step-DPO':<26}after Step-DPO")
    for name, how in (("greedy", "best token each time"), ("sampled", "temperature 1")):
        print(f"    {name + ' (' + how + ')':<32}{before[name]!s:<26}{after[name]}")
    print(f"\nTook {time.perf_counter() - start:.0f} s. The trained model is in {args.output_dir!r}.")


if __name__ == "__main__":
    main()
