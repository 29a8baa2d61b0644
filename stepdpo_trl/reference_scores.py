"""Log-probabilities of a stage's rows under its reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

SCORES = ("ref_chosen_logps", "ref_rejected_logps")  # DPOTrainer's names of the columns


def reference_logps(trainer: Any, dataset: Dataset, name: str, batch_size: int) -> np.ndarray:
    """
    Score rows with the reference.

    Args:
        trainer (`StagedTraining`): A trainer whose model is prepared for training.
        dataset (`Dataset`): Tokenized rows.
        name (`str`): What the progress bar calls them.
        batch_size (`int`): Pairs a process scores at once.

    Returns:
        `np.ndarray`: Log-probabilities of chosen and of rejected, of shape `(2, rows)`, in nats.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
        pin_memory=trainer.args.dataloader_pin_memory,
    )
    parts = []
    # So that a run that resumes after the scoring goes on alike
    with _random_state_kept(), _evaluated(trainer) as model:
        for batch in tqdm(
            trainer.accelerator.prepare(loader),
            desc=f"Scoring the {name} rows with the stage's reference",
            disable=trainer.args.disable_tqdm or not trainer.is_local_process_zero(),
        ):
            logps = trainer.accelerator.gather_for_metrics(trainer.compute_ref_log_probs(model, batch))
            parts.append(torch.stack(logps).float().cpu())
    return torch.cat(parts, dim=1).numpy()


def with_scores(dataset: Dataset, scores: np.ndarray) -> Dataset:
    """Add scores as the columns that `DPOTrainer` reads."""
    for name, values in zip(SCORES, scores, strict=True):
        dataset = dataset.add_column(name, values)
    return dataset


def without_scores(dataset: Any) -> Any:
    """Remove scores, which for a trainer that is made already are those of the model before all stages."""
    if dataset is None:
        return None
    return dataset.select_columns([name for name in dataset.column_names if name not in SCORES])


@contextmanager
def _evaluated(trainer: Any) -> Iterator[torch.nn.Module]:
    """The model that scores, without dropout. Where no reference is kept that is the policy, adapters and all."""
    reference, policy = trainer.ref_model, trainer.model_wrapped
    was_training = policy.training
    policy.eval()
    if trainer.reference.kind == "scores":
        trainer.ref_model = policy
    try:
        yield trainer.ref_model or policy
    finally:
        trainer.ref_model = reference
        policy.train(was_training)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
