"""
Log-probabilities of rows under the reference of a stage.

They give gamma_ref, and with `precompute_ref_log_probs=True` they replace the reference model.
"""

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
from .stages import Stage, StageCallback, combine_digests, row_digests

if TYPE_CHECKING:
    from trl import DPOTrainer
else:
    DPOTrainer = object  # a mixin for DPOTrainer and its subclasses

SCORES = ("ref_chosen_logps", "ref_rejected_logps")  # column names in DPOTrainer
GAMMA_ROWS = 1000  # sample size for gamma_ref if the rows need not be scored for training


class StageScoring(DPOTrainer):
    """
    Scoring part of [`StagedTraining`]. It has no effect until an [`SDPOCallback`] is attached.

    Attributes:
        sdpo ([`SDPOCallback`], *optional*):
            The callback, if one is attached.
        stages (`list[Stage]`):
            All stages, set by the callback.
        stage (`Stage`, *optional*):
            The current stage.
        reference ([`ModelReference`], [`AdapterReference`] or [`ScoredReference`]):
            The reference.
    """

    args: Any
    model: Any
    sdpo: StageCallback | None = None
    stages: list[Stage] = []  # noqa: RUF012  (replaced, never changed)
    stage: Stage | None = None
    reference: ModelReference | AdapterReference | ScoredReference
    _eval_data: Any = None  # `eval_dataset` without scores
    _loader: Any = None  # of the current stage

    def _start_id(self, stage: Stage) -> str:
        """Return the id of the start of a stage. It changes if training resumes from an earlier checkpoint."""
        assert self.sdpo is not None
        return self.sdpo.record["ids"][stage.number - 1]

    def _scores_id(self, stage: Stage, dataset: Dataset) -> str:
        """Return an id of the stage's start and the rows that are scored."""
        rows = stage.digest if dataset is stage.dataset else combine_digests(row_digests(dataset))
        return f"{self._start_id(stage)}-{rows}"

    def _on_main_process(self, function: Callable[[], Any]) -> Any:
        """Call a function on the main process, and return its result, or raise its error, on all processes."""
        result: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                result = [function()]
            except Exception as error:
                result = [error]
        broadcast_object_list(result, from_process=0)
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    @property
    def _output_dir(self) -> str:
        return str(self.args.output_dir)

    def read_gamma(self, stage: Stage) -> np.ndarray:
        """Read gamma_ref of a stage from disk, of shape `(rows,)` in nats, or empty if the stage has not started."""
        assert self.sdpo is not None
        if stage.number > len(self.sdpo.record["ids"]):
            return np.array([])
        file = scores_file(self._output_dir, stage.number, "train")
        scores = read_scores(file, self._scores_id(stage, stage.dataset))
        return np.array([]) if scores is None else scores[0] - scores[1]

    def _score_stage(self, stage: Stage) -> np.ndarray:
        """
        Score the rows of a stage with its reference and set `train_dataset` and `eval_dataset`.

        Returns:
            `np.ndarray`: gamma_ref of the rows, of shape `(rows,)`, in nats. If there is a reference model or adapter,
            a sample of at most `GAMMA_ROWS` rows.
        """
        args = self.args
        self.train_dataset = stage.dataset
        if self.reference.kind != "scores":
            rows = np.random.default_rng(args.seed).permutation(len(stage.dataset))[:GAMMA_ROWS]
            chosen, rejected = self._score(stage, "train", stage.dataset, args.per_device_train_batch_size, rows)
            return chosen - rejected
        size = args.precompute_ref_batch_size
        scores = self._score(stage, "train", stage.dataset, size or args.per_device_train_batch_size)
        self.train_dataset = with_scores(stage.dataset, scores)
        eval_size = size or args.per_device_eval_batch_size
        self._map_eval(lambda name, data: with_scores(data, self._score(stage, name, data, eval_size)))
        return scores[0] - scores[1]

    def _score(
        self, stage: Stage, name: str, dataset: Dataset, batch_size: int, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Score a dataset, or only the given rows of it, and write the scores to disk."""
        scores = reference_logps(self, dataset if rows is None else dataset.select(rows), name, batch_size)
        if self.is_world_process_zero():
            file = scores_file(self._output_dir, stage.number, name)
            write_scores(file, scores, self._scores_id(stage, dataset))
        self.accelerator.wait_for_everyone()
        return scores

    def _map_eval(self, function: Callable[[str, Dataset], Dataset]) -> None:
        self._stop_workers()
        self.__dict__.pop("_eval_dataloaders", None)  # persistent workers would keep the previous scores
        if isinstance(self._eval_data, dict):
            self.eval_dataset = {name: function(f"eval-{name}", data) for name, data in self._eval_data.items()}
        elif self._eval_data is not None:
            self.eval_dataset = function("eval", self._eval_data)

    def _restore_scores(self, stage: Stage) -> None:
        """Read the scores of a stage from disk, to resume within it."""

        def restore(name: str, dataset: Dataset) -> Dataset:
            file = scores_file(self._output_dir, stage.number, name)
            scores = self._on_main_process(lambda: read_scores(file, self._scores_id(stage, dataset)))
            if scores is None:
                raise ValueError(
                    f"Cannot resume in stage {stage.number}: {file}, which holds the scores of its reference, is "
                    f"missing, from another run, or for other data than the {len(dataset)} {name} rows. Resume from a "
                    "checkpoint of an earlier stage, or start a new run."
                )
            return with_scores(dataset, scores)

        self.train_dataset = restore("train", stage.dataset)
        self._map_eval(restore)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Skip precomputation when the trainer is created, since the references of the stages do not exist yet."""
        if self.sdpo is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if not self.stages:  # in the constructor of the trainer
            return dataset
        if self.stage is not None and self.stage.number > 1:
            raise ValueError(
                "With `precompute_ref_log_probs=True`, a dataset passed to `evaluate()` cannot be scored after the "
                "first stage, because there is no reference model. Pass it to the trainer as `eval_dataset`, which is "
                "scored at the start of each stage."
            )
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the model against the reference of the current stage."""
        if self.sdpo is not None and self.reference.kind == "scores" and self.stage is None:
            size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            self._map_eval(lambda name, data: super(StageScoring, self)._precompute_ref_logps(data, name, size))
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self.sdpo is not None and not self.is_in_train:
                self._stop_workers()

    def _stop_workers(self) -> None:
        """Stop the persistent workers of all data loaders."""
        for loader in (self._loader, *getattr(self, "_eval_dataloaders", {}).values()):
            stop_workers(loader)


def stop_workers(loader: Any) -> None:
    """
    Stop the persistent workers of a data loader.

    Torch does so when a data loader is deleted. It waits five seconds for each worker if the garbage collector deletes
    the loader, as it does here, since trainer and callback refer to each other. The loaders of earlier stages would
    live as long as the accelerator.

    Args:
        loader (`DataLoader`, *optional*):
            Data loader of accelerate. It starts new workers if it is used again.
    """
    if loader is not None:
        loader.base_dataloader._iterator = None


def reference_logps(trainer: Any, dataset: Dataset, name: str, batch_size: int) -> np.ndarray:
    """
    Compute the log-probabilities of rows under the reference.

    Args:
        trainer ([`StagedTraining`]):
            Trainer whose model has been prepared for training.
        dataset (`Dataset`):
            Tokenized rows.
        name (`str`):
            Name of the dataset in the progress bar.
        batch_size (`int`):
            Number of pairs per batch and process.

    Returns:
        `np.ndarray`: Log-probabilities of chosen and rejected, of shape `(2, rows)`, in nats.
    """
    order = longest_first(dataset) if getattr(trainer, "shares_prefixes", False) else np.arange(len(dataset))
    loader = DataLoader(
        dataset.select(order),
        batch_size=batch_size,
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
        pin_memory=trainer.args.dataloader_pin_memory,
    )
    scores, scored = np.empty((2, len(dataset)), np.float32), 0
    # A run that resumes after the scoring must see the same random numbers
    with _preserve_random_state(), _scoring_model(trainer) as model:
        for batch in tqdm(
            trainer.accelerator.prepare(loader),
            desc=f"Scoring the {name} rows with the stage's reference",
            disable=trainer.args.disable_tqdm or not trainer.is_local_process_zero(),
        ):
            logps = trainer.accelerator.gather_for_metrics(trainer.compute_ref_log_probs(model, batch))
            end = scored + len(logps[0])
            scores[:, order[scored:end]] = torch.stack(logps).float().cpu().numpy()
            scored = end
    return scores


def with_scores(dataset: Dataset, scores: np.ndarray) -> Dataset:
    """Add scores of shape `(2, rows)` as the columns that [`~trl.DPOTrainer`] reads."""
    for name, values in zip(SCORES, scores, strict=True):
        dataset = dataset.add_column(name, values)
    return dataset


def without_scores(dataset: Any) -> Any:
    """Remove the score columns, which an existing trainer has computed for its initial reference."""
    if not isinstance(dataset, Dataset):
        return dataset
    return dataset.select_columns([name for name in dataset.column_names if name not in SCORES])


@contextmanager
def _scoring_model(trainer: Any) -> Iterator[torch.nn.Module]:
    """Yield the model that scores, without dropout. Without a reference model, this is the policy with its adapter."""
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
def _preserve_random_state() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
