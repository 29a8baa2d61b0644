"""Log-probabilities of a stage's rows under its reference: gamma_ref, and what `precompute_ref_log_probs` needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..shared_prefix.mixin import longest_first
from .files import read_scores, scores_file, write_scores
from .reference import AdapterReference, ModelReference, ScoredReference
from .stages import Stage, combined_digest, row_digests

if TYPE_CHECKING:
    from trl import DPOTrainer

    from .callback import SDPOCallback
else:
    DPOTrainer = object  # a mixin, put before whichever trainer it serves

SCORES = ("ref_chosen_logps", "ref_rejected_logps")  # DPOTrainer's names of the columns
GAMMA_ROWS = 1000  # how many rows gamma_ref is measured on where not all of them are scored anyway


class StageScoring(DPOTrainer):
    """The part of [`StagedTraining`] that scores rows. Does nothing until an [`SDPOCallback`] is attached."""

    args: Any
    model: Any
    sdpo: "SDPOCallback | None" = None
    stages: list[Stage] = []  # noqa: RUF012  (set when the callback is attached)
    stage: Stage | None = None  # the one in training
    reference: ModelReference | AdapterReference | ScoredReference
    _eval_data: Any = None  # eval_dataset without scores

    def _id(self, stage: Stage) -> str:
        """What tells a start of a stage from others."""
        assert self.sdpo is not None
        return self.sdpo.record["ids"][stage.number - 1]

    def _scores_id(self, stage: Stage, dataset: Dataset) -> str:
        """What tells a start of a stage and the rows that were scored from others."""
        rows = stage.digest if dataset is stage.dataset else combined_digest(row_digests(dataset))
        return f"{self._id(stage)}-{rows}"

    def _agree(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides, on all of them; its errors too."""
        decision: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                decision = [decide()]
            except Exception as error:
                decision = [error]
        broadcast_object_list(decision, from_process=0)
        if isinstance(decision[0], Exception):
            raise decision[0]
        return decision[0]

    @property
    def _output_dir(self) -> str:
        return str(self.args.output_dir)

    def _score(self, stage: Stage) -> np.ndarray:
        """
        Score the stage's rows with its reference.

        Returns:
            `np.ndarray`: gamma_ref of each row, or of `GAMMA_ROWS` of them where there is a reference model.
        """
        args = self.args
        self.train_dataset = stage.dataset
        if self.reference.kind != "scores":
            rows = np.random.default_rng(args.seed).permutation(len(stage.dataset))[:GAMMA_ROWS]
            chosen, rejected = self._scored(stage, "train", stage.dataset, args.per_device_train_batch_size, rows)
            return chosen - rejected
        size = args.precompute_ref_batch_size
        scores = self._scored(stage, "train", stage.dataset, size or args.per_device_train_batch_size)
        self.train_dataset = with_scores(stage.dataset, scores)
        eval_size = size or args.per_device_eval_batch_size
        self._map_eval(lambda name, data: with_scores(data, self._scored(stage, name, data, eval_size)))
        return scores[0] - scores[1]

    def _scored(
        self, stage: Stage, name: str, dataset: Dataset, batch_size: int, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Score a data set, or some rows of it, and keep the scores on disk."""
        scores = reference_logps(self, dataset if rows is None else dataset.select(rows), name, batch_size)
        if self.is_world_process_zero():
            file = scores_file(self._output_dir, stage.number, name)
            write_scores(file, scores, self._scores_id(stage, dataset))
        self.accelerator.wait_for_everyone()
        return scores

    def _map_eval(self, function: Callable[[str, Dataset], Dataset]) -> None:
        self.__dict__.pop("_eval_dataloaders", None)  # which persistent workers keep, with the scores of before
        if isinstance(self._eval_data, dict):
            self.eval_dataset = {name: function(f"eval-{name}", data) for name, data in self._eval_data.items()}
        elif self._eval_data is not None:
            self.eval_dataset = function("eval", self._eval_data)

    def _reopen_scores(self, stage: Stage) -> None:
        """Restore the scores of a stage that a checkpoint was saved in."""

        def restore(name: str, dataset: Dataset) -> Dataset:
            file = scores_file(self._output_dir, stage.number, name)
            scores = self._agree(lambda: read_scores(file, self._scores_id(stage, dataset)))
            if scores is None:
                raise ValueError(
                    f"Cannot resume in stage {stage.number}: {file}, which holds its reference, is missing, of "
                    f"another run, or for other data than the {len(dataset)} {name} rows. Resume from a checkpoint of "
                    "an earlier stage, or train anew."
                )
            return with_scores(dataset, scores)

        self.train_dataset = restore("train", stage.dataset)
        self._map_eval(restore)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Leave the scores to the stages, whose references do not exist yet."""
        if self.sdpo is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if not self.stages:  # while the trainer is made
            return dataset
        if self.stage is not None and self.stage.number > 1:
            raise ValueError(
                "With `precompute_ref_log_probs=True` no reference is kept, so data given to `evaluate()` cannot be "
                "scored after the first stage. Give it to the trainer as `eval_dataset`: it is scored in each stage."
            )
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, against the reference of the stage in training."""
        if self.sdpo is not None and self.reference.kind == "scores" and self.stage is None:
            size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            self._map_eval(lambda name, data: super(StageScoring, self)._precompute_ref_logps(data, name, size))
        return super().evaluate(*args, **kwargs)


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
    order = longest_first(dataset) if getattr(trainer, "shares_prefixes", False) else np.arange(len(dataset))
    loader = DataLoader(
        dataset.select(order),
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
    return torch.cat(parts, dim=1).numpy()[:, np.argsort(order)]


def with_scores(dataset: Dataset, scores: np.ndarray) -> Dataset:
    """Add scores as the columns that `DPOTrainer` reads."""
    for name, values in zip(SCORES, scores, strict=True):
        dataset = dataset.add_column(name, values)
    return dataset


def without_scores(dataset: Any) -> Any:
    """Remove scores, which for a trainer that is made already are those of the model before all stages."""
    if not isinstance(dataset, Dataset):
        return dataset
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
