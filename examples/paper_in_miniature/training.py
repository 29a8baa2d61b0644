"""Training and evaluation of the compared methods, with the same number of pairs and updates for each."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pairs import OPERATIONS
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from stepdpo_trl import SDPOCallback, StepDPOConfig, StepDPOTrainer, measure_gamma, split_stages
from stepdpo_trl.quickstart import MODEL_PATH, ArithmeticProblem, generate_solutions, make_problems, read_result

LARGEST_SET = 500  # maximum number of test or validation problems

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """
    Variant of a training method.

    Args:
        method (`str`):
            `"sft"` (SFT on right solutions), `"dpo"` (DPO on whole solutions), `"stock"` (trl.DPOTrainer on step rows)
            or `"step"` (Step-DPO).
        source (`str`, *optional*, defaults to `"arithmetic"`):
            Source of the pairs.
        split (`str`, *optional*):
            Split of the pairs into two sDPO stages: `"natural"`, `"reversed"`, `"random"`, or `"from S"`, which is
            `"natural"` with the second stage starting from the initial model instead of the reference. By default,
            there are no stages.
        tuned_as (`str`, *optional*):
            Arm of the same method whose settings to use. By default, the arm is tuned itself.
    """

    method: str
    source: str = "arithmetic"
    split: str | None = None
    tuned_as: str | None = None


ARMS = {
    "SFT": Arm("sft"),
    "DPO": Arm("dpo"),
    "DPOTrainer on steps": Arm("stock"),
    "Step-DPO": Arm("step"),
    "Step-DPO, other model's steps": Arm("step", "other", tuned_as="Step-DPO"),
    "Step-DPO, rollout": Arm("step", "rollout", tuned_as="Step-DPO"),
    "Step-DPO, random step": Arm("step", "random", tuned_as="Step-DPO"),
    "sDPO": Arm("step", split="natural"),
    "sDPO, reversed": Arm("step", split="reversed", tuned_as="sDPO"),
    "sDPO, random split": Arm("step", split="random", tuned_as="sDPO"),
    "sDPO, stage 2 from S": Arm("step", split="from S", tuned_as="sDPO"),
}


def load(path: Any = MODEL_PATH) -> Any:
    """Load a model, by default the quickstart model."""
    return AutoModelForCausalLM.from_pretrained(path)


def tokenizer() -> Any:
    """Load the tokenizer of the quickstart model."""
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def rows_for(method: str, rows: Rows) -> Dataset:
    """Convert step pairs to the dataset format of a method."""
    columns = (
        "prompt",
        "initial_reason_steps",
        "chosen",
        "rejected",
        "chosen_ends_solution",
        "rejected_ends_solution",
    )
    if method == "step":
        return Dataset.from_list([{name: row[name] for name in columns} for row in rows])
    if method == "stock":  # as with plain TRL: the rendered chat template and the prefix form the prompt
        template = tokenizer().apply_chat_template
        texts = [
            template([{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True)
            for row in rows
        ]
        return Dataset.from_list(
            [
                {"prompt": text + row["initial_reason_steps"], "chosen": row["chosen"], "rejected": row["rejected"]}
                for text, row in zip(texts, rows, strict=True)
            ]
        )

    def answer(row: dict[str, Any], which: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": row["initial_reason_steps"] + row[f"full_{which}"]}]

    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    if method == "sft":
        return Dataset.from_list(
            [{"prompt": p, "completion": answer(row, "chosen")} for p, row in zip(prompts, rows, strict=True)]
        )
    return Dataset.from_list(
        [
            {"prompt": p, "chosen": answer(row, "chosen"), "rejected": answer(row, "rejected")}
            for p, row in zip(prompts, rows, strict=True)
        ]
    )


def options(folder: str, updates: int, batch: int, learning_rate: float, seed: int, **more: Any) -> dict[str, Any]:
    """Return the training arguments that all trainers share."""
    return {
        "output_dir": folder,
        "max_steps": updates,  # per stage
        "learning_rate": learning_rate,
        "seed": seed,
        "per_device_train_batch_size": batch,
        "dataloader_drop_last": True,  # every update has the same number of pairs
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        **more,
    }


def fit(trainer: Any) -> list[dict[str, float]]:
    """Train and return the log history."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return list(trainer.state.log_history)


def train(
    arm: Arm, rows: Rows, held_out: Rows, updates: int, batch: int, learning_rate: float, beta: float, seed: int
) -> tuple[Any, list[dict[str, float]]]:
    """
    Train one model.

    Args:
        arm (`Arm`):
            The arm to train.
        rows (`list[dict]`):
            Training pairs.
        held_out (`list[dict]`):
            Evaluation pairs. Pass an empty list to skip evaluation during training.
        updates (`int`):
            Total number of updates of all stages.
        batch (`int`):
            Number of pairs per update.
        learning_rate (`float`):
            Learning rate.
        beta (`float`):
            Beta of the DPO loss. Ignored for SFT.
        seed (`int`):
            Random seed for the order of the rows and for a random split.

    Returns:
        `tuple[PreTrainedModel, list[dict]]`: The trained model and the log history.
    """
    model, data = load(), rows_for(arm.method, rows)
    follow: dict[str, Any] = {}
    if held_out:
        follow = {"eval_strategy": "steps", "eval_steps": max(1, updates // 8), "eval_on_start": True}
    with tempfile.TemporaryDirectory() as folder:
        if arm.split:
            log = train_in_stages(
                model, arm.split, data, options(folder, updates // 2, batch, learning_rate, seed), beta
            )
            return model, log
        given = options(folder, updates, batch, learning_rate, seed, **follow)
        both: dict[str, Any] = {"model": model, "train_dataset": data, "processing_class": tokenizer()}
        if arm.method == "sft":
            return model, fit(SFTTrainer(args=SFTConfig(**given), **both))
        both["eval_dataset"] = rows_for(arm.method, held_out) if held_out else None
        given |= {"beta": beta, "precompute_ref_log_probs": True}
        if arm.method == "stock":
            return model, fit(DPOTrainer(args=DPOConfig(**given), **both))
        return model, fit(StepDPOTrainer(args=StepDPOConfig(**given), **both))


def train_in_stages(
    model: Any, split: str, data: Dataset, given: dict[str, Any], beta: float
) -> list[dict[str, float]]:
    """Train in two stages and return the log history with the mean gamma of the second stage under both models."""
    stages = split_sources(data, split, given["seed"])
    if split != "from S":
        args = StepDPOConfig(**given, beta=beta, precompute_ref_log_probs=True)
        log = fit(
            StepDPOTrainer(
                model, args=args, train_dataset=stages, processing_class=tokenizer(), callbacks=[SDPOCallback()]
            )
        )
    else:
        first, second = stages.values()
        reference = load()
        args = StepDPOConfig(**given, beta=beta, precompute_ref_log_probs=True)
        log = fit(StepDPOTrainer(reference, args=args, train_dataset=first, processing_class=tokenizer()))
        args = StepDPOConfig(**given, beta=beta)
        log += fit(StepDPOTrainer(model, reference, args=args, train_dataset=second, processing_class=tokenizer()))
    second = list(stages.values())[1]
    for name, scorer in (("gamma_start", load()), ("gamma_end", model)):
        log.append({name: float(np.mean(gamma_of(scorer, second)))})
    return log


def gamma_of(model: Any, data: Dataset) -> np.ndarray:
    """Return log p(chosen) - log p(rejected) of each pair, of shape `(pairs,)`."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_gamma(model, data, StepDPOConfig(**options(folder, 1, 32, 1e-5, 0)), tokenizer())


def margins(model: Any, rows: Rows) -> dict[str, float]:
    """Return the mean growth of log p(chosen) - log p(rejected) during training, for steps and whole solutions."""
    found = {}
    for name, method in (("step", "step"), ("whole", "dpo")):
        data = rows_for(method, rows)
        found[name] = float(np.mean(gamma_of(model, data) - gamma_of(load(), data)))
    return found


def split_sources(data: Dataset, split: str, seed: int) -> dict[str, Dataset]:
    """Split pairs into two stages: problems with few and with many operations, in either order, or mixed."""
    sizes = [len(ArithmeticProblem.parse(prompt).operators) for prompt in data["prompt"]]
    middle = float(np.median(sizes))
    named = data.add_column("source", ["short" if size <= middle else "long" for size in sizes])
    gamma = gamma_of(load(), data)
    natural = split_stages(named, "easy_to_hard", source_column="source", gamma=gamma)
    if split == "random":
        fractions = [len(stage) / len(data) for stage in natural.values()]
        return split_stages(named, "stratified", fractions=fractions, source_column="source", seed=seed)
    return dict(reversed(natural.items())) if split == "reversed" else natural


@cache
def held_out_problems() -> list[ArithmeticProblem]:
    """Draw the test and the validation problems together, so that they do not overlap."""
    return make_problems(2 * LARGEST_SET, "held_out", OPERATIONS)


def measure(model: Any, count: int, tuning: bool, temperatures: Sequence[float]) -> Mapping[str, Any]:
    """
    Evaluate a model on held-out problems.

    Args:
        model (`PreTrainedModel`):
            The model.
        count (`int`):
            Number of problems.
        tuning (`bool`):
            Whether to use the validation problems instead of the test problems.
        temperatures (`Sequence[float]`):
            Sampling temperatures, with 0 for greedy decoding.

    Returns:
        `dict`: For `"greedy"` and `"sampled"`, whether each problem was solved, and the number of solutions without a
        final answer.
    """
    problems = held_out_problems()
    problems = problems[LARGEST_SET:][:count] if tuning else problems[:count]
    result: dict[str, Any] = {}
    for temperature in temperatures:
        set_seed(0)  # same random numbers for every model
        texts = [problem.text for problem in problems]
        solutions = generate_solutions(model, tokenizer(), texts, temperature=temperature)
        answers = [read_result(solution) for solution in solutions]
        result["greedy" if temperature == 0 else "sampled"] = {
            "solved": [int(answer == problem.answer) for answer, problem in zip(answers, problems, strict=True)],
            "no answer": sum(answer is None for answer in answers),
        }
    return result


def set_up() -> None:
    """Limit a worker process to one thread, which is fastest for such small matrices."""
    torch.set_num_threads(1)
