"""The loop that joins both papers: each stage's pairs come anew from the model of the last one, its reference too."""

import tempfile
from pathlib import Path
from typing import Any

from pairs import fresh_pairs, read_rows, write_rows
from training import fit, load, measure, options, rows_for, tokenizer

from stepdpo_trl import StepDPOConfig, StepDPOTrainer
from stepdpo_trl.pipeline.loop import MODEL, PAIRS, RUN, run_loop
from stepdpo_trl.quickstart import MODEL_PATH

# Whose pairs a stage has: the last stage's model's; the first model's, others in each stage; those of the first stage
KINDS = ("fresh pairs", "the first model's pairs", "the first stage's pairs")


def first_folder(out: str, seed: int) -> Path:
    """Where the first model's pairs are, which two kinds share."""
    return Path(out) / "loop" / f"first-model-{seed}"


def first_pairs(out: str, seed: int, scale: Any) -> int:
    """Make the first model's pairs, enough for all stages."""
    folder = first_folder(out, seed)
    count = scale.stages * scale.stage_pairs
    rows = fresh_pairs(folder / RUN, str(MODEL_PATH), count, 1000 * seed, 64)
    write_rows(folder / PAIRS, rows)
    return len(rows)


def loop_run(out: str, kind: str, seed: int, settings: tuple[float, float], scale: Any) -> list[dict[str, Any]]:
    """
    Train in stages and measure after each.

    Args:
        out (`str`):
            Folder of the experiments.
        kind (`str`):
            One of [`KINDS`].
        seed (`int`):
            Seed of problems, samples and order.
        settings (`tuple`):
            Learning rate and beta.
        scale (`Scale`):
            Stages, pairs, problems.

    Returns:
        `list[dict]`: For each stage, what was measured and the samples that the pairs took.
    """
    rate, beta = settings
    updates = max(1, scale.epochs * scale.stage_pairs // scale.batch)
    found: list[dict[str, Any]] = []

    def make_pairs(number: int, model: str, folder: Path) -> None:
        if kind == KINDS[0]:
            rows = fresh_pairs(folder / RUN, model, scale.stage_pairs, 1000 * seed + number, 64)
        else:
            of_first = read_rows(first_folder(out, seed) / PAIRS)
            begin = scale.stage_pairs * (number - 1) if kind == KINDS[1] else 0
            rows = of_first[begin : begin + scale.stage_pairs]
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
