"""Combine both papers: every stage samples fresh step pairs from its reference, the model of the previous stage."""

import tempfile
from pathlib import Path
from typing import Any

from experiment_parts import read_rows, write_rows
from pairs import fresh_pairs
from training import fit, load, measure, options, rows_for, tokenizer

from stepdpo_trl import StepDPOConfig, StepDPOTrainer
from stepdpo_trl.pipeline.loop import MODEL, PAIRS, RUN, run_loop
from stepdpo_trl.quickstart import MODEL_PATH

# Pairs of a stage: sampled from the previous stage's model, different pairs of the initial model, or always the same
KINDS = ("fresh pairs", "the first model's pairs", "the first stage's pairs")


def first_folder(out: str, seed: int) -> Path:
    """Return the folder with the pairs of the initial model, which two kinds share."""
    return Path(out) / "loop" / f"first-model-{seed}"


def first_pairs(out: str, seed: int, scale: Any) -> int:
    """Collect enough pairs of the initial model for all stages, and return their number."""
    folder = first_folder(out, seed)
    count = scale.stages * scale.stage_pairs
    rows = fresh_pairs(folder / RUN, str(MODEL_PATH), count, 1000 * seed, 64)
    write_rows(folder / PAIRS, rows)
    return len(rows)


def loop_run(out: str, kind: str, seed: int, settings: tuple[float, float], scale: Any) -> list[dict[str, Any]]:
    """
    Train in stages and evaluate the model of each stage.

    Args:
        out (`str`):
            Folder of the experiments.
        kind (`str`):
            Pairs of the stages, one of [`KINDS`].
        seed (`int`):
            Random seed for problems, samples and the order of the pairs.
        settings (`tuple[float, float]`):
            Learning rate and beta.
        scale (`Scale`):
            Size of the experiments.

    Returns:
        `list[dict]`: Evaluation results of each stage.
    """
    rate, beta = settings
    updates = max(1, scale.epochs * scale.stage_pairs // scale.batch)
    found: list[dict[str, Any]] = []

    def make_pairs(number: int, model: str, folder: Path) -> None:
        if kind == KINDS[0]:
            rows = fresh_pairs(folder / RUN, model, scale.stage_pairs, 1000 * seed + number, 64)
        else:
            available = read_rows(first_folder(out, seed) / PAIRS)
            begin = scale.stage_pairs * (number - 1) if kind == KINDS[1] else 0
            rows = available[begin : begin + scale.stage_pairs]
        write_rows(folder / PAIRS, rows)

    def train(number: int, model: str, folder: Path) -> None:
        rows = read_rows(folder / PAIRS)
        with tempfile.TemporaryDirectory() as output_dir:
            trained = load(model)
            given = options(output_dir, updates, scale.batch, rate, seed)
            args = StepDPOConfig(**given, beta=beta, precompute_ref_log_probs=True)
            fit(StepDPOTrainer(trained, args=args, train_dataset=rows_for("step", rows), processing_class=tokenizer()))
        trained.save_pretrained(folder / MODEL)
        tokenizer().save_pretrained(folder / MODEL)

    folder = Path(out) / "loop" / f"{kind.replace(' ', '-')}-{seed}"
    run_loop(
        folder,
        str(MODEL_PATH),
        scale.stages,
        make_pairs,
        train,
        {"kind": kind, "seed": seed, "settings": list(settings)},
    )
    for number in range(1, scale.stages + 1):
        found.append(dict(measure(load(folder / f"stage-{number}" / MODEL), scale.test, False, (0.0,))))
    return found
