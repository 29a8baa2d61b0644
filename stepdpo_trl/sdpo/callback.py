"""Callback that trains in stages with a moving reference (sDPO, arXiv 2403.19270)."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..data.messages import did_you_mean
from .checks import check_arguments
from .reference import AdapterReference, ModelReference, ScoredReference
from .report import warn_without_matplotlib, write_stage_report
from .scoring import without_scores
from .stages import STAGE_OPTIONS, Stage, check_fractions, find_stages
from .training import StagedTraining

if TYPE_CHECKING:
    from trl import DPOTrainer

logger = get_logger(__name__)

SCHEDULES = ("restart", "continuous")


class SDPOCallback(TrainerCallback, ExportableState):
    """
    A [`~transformers.TrainerCallback`] that trains on preference data in stages. Each stage starts from the model of
    the previous stage and uses the same model as its reference (sDPO, arXiv 2403.19270).

    All stages are trained in a single call of `trainer.train()`. Each stage is equivalent to a separate DPO run:
    optimizer, warmup and decay restart, and `num_train_epochs` and `max_steps` are counted per stage. At the end of a
    stage, the model is saved to `output_dir/stage-N` and becomes the reference in place:

    - Full fine-tuning: The weights are copied into the reference model. Under ZeRO-3 and FSDP2, each process copies
      its shards.
    - LoRA and QLoRA: The adapter is copied into a frozen adapter `"ref"` on the same base model.
    - `precompute_ref_log_probs=True` (recommended): There is no reference model. The policy scores the data of a stage
      at its start, when policy and reference have the same weights.

    The stages are either a list or dict of datasets passed to [`StepDPOTrainer`], or parts of one dataset, by its
    column `stage` or by `fractions`.

    Args:
        trainer ([`~trl.DPOTrainer`], *optional*):
            Existing trainer to attach the callback to, as in `trainer.add_callback(SDPOCallback(trainer))`. Omit it in
            `StepDPOTrainer(..., callbacks=[SDPOCallback()])`.
        fractions (`list[float]`, *optional*):
            Fraction of the rows in each stage, in row order. They must sum to 1.
        schedule (`str`, *optional*, defaults to `"restart"`):
            `"restart"` resets the optimizer and restarts warmup and decay in each stage, as in the paper.
            `"continuous"` keeps the optimizer state and uses one schedule for the whole run.
        stage_options (`dict[str, dict[str, float]]`, *optional*):
            `beta`, `learning_rate` and `num_train_epochs` of single stages, which override the training arguments. The
            keys are names of stages: keys of the dict of datasets, values of the column `stage`, or otherwise
            "1", "2", ...

    Raises:
        ValueError: If an option is unknown or invalid, or if the trainer cannot train in stages.

    Example:

    ```python
    >>> trainer = StepDPOTrainer(model, args=args, train_dataset=[easy, hard], callbacks=[SDPOCallback()])
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: "DPOTrainer | None" = None,
        fractions: Sequence[float] | None = None,
        schedule: str = "restart",
        stage_options: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"Unknown schedule {schedule!r}. It must be 'restart' or 'continuous'.")
        self.fractions = None if fractions is None else [float(fraction) for fraction in fractions]
        if self.fractions is not None:
            check_fractions(self.fractions)
        self.schedule = schedule
        by_stage = stage_options or {}
        if not isinstance(by_stage, Mapping) or not all(isinstance(options, Mapping) for options in by_stage.values()):
            raise ValueError(
                f"stage_options={stage_options!r} is invalid. It must map names of stages to their options, as in "
                "{'2': {'beta': 0.05}}."
            )
        self.stage_options = {str(name): dict(options) for name, options in by_stage.items()}
        for name, options in self.stage_options.items():
            _check_options(name, options, schedule)
        self.record: dict[str, Any] = {}  # of the run and its stages, saved in checkpoints
        self.trainer: Any = None
        if trainer is not None:
            self.attach(trainer)

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer saves in checkpoints."""
        names = ("fractions", "schedule", "stage_options")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"record": self.record}}

    def attach(self, trainer: "DPOTrainer", names: Sequence[Any] = ()) -> None:
        """
        Attach the callback to a trainer, which then trains in stages.

        Args:
            trainer ([`~trl.DPOTrainer`]):
                Trainer to attach to.
            names (`list`, *optional*):
                Names of the stages before overlong rows were dropped, to detect stages that became empty.

        Raises:
            ValueError: If the trainer cannot train in stages, or if a stage is empty or unknown.
        """
        staged: Any = trainer
        if getattr(staged, "stages", []):
            raise ValueError("The trainer already has an SDPOCallback, which trains all stages. Remove one of them.")
        if staged.ref_model is not None and isinstance(staged.model, PeftModel):
            raise ValueError(
                "You passed a `ref_model` together with an adapter. With SDPOCallback, the reference is the adapter "
                "of the previous stage on the same base model. Remove `ref_model`."
            )
        check_arguments(staged, self.schedule, self.stage_options)
        if not isinstance(trainer, StagedTraining):
            # Put the mixin in front of the class of an existing trainer
            trainer.__class__ = type(f"Staged{type(trainer).__name__}", (StagedTraining, type(trainer)), {})
        stages = find_stages(staged.train_dataset, self.fractions)
        emptied = [str(name) for name in names if str(name) not in stages]
        if emptied:
            raise ValueError(
                f"Stage {emptied[0]!r} is empty: all its rows are longer than max_length={staged.args.max_length}. "
                "Increase max_length, or remove the stage."
            )
        unknown = [name for name in self.stage_options if name not in stages]
        if unknown:
            raise ValueError(
                f"`stage_options` has options for an unknown stage {unknown[0]!r}. The stages are {list(stages)}."
                f"{did_you_mean(unknown[0], stages)}"
            )
        defaults = {name: getattr(staged.args, name) for name in STAGE_OPTIONS}
        staged.stages = [
            Stage(number, name, without_scores(rows), **{**defaults, **self.stage_options.get(name, {})})
            for number, (name, rows) in enumerate(stages.items(), start=1)
        ]
        _warn_about_stages(staged.stages)
        staged.reference = _make_reference(staged)
        evaluation = staged.eval_dataset
        staged._eval_data = (
            {name: without_scores(data) for name, data in evaluation.items()}
            if isinstance(evaluation, dict)
            else without_scores(evaluation)
        )
        staged.train_dataset, staged.beta = staged.stages[0].dataset, staged.stages[0].beta
        staged.sdpo, self.trainer = self, trainer
        warn_without_matplotlib()

    def registered(self, trainer: Any) -> "SDPOCallback":
        """Return the instance registered with the trainer, which may have been recreated from a checkpoint."""
        callback = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, SDPOCallback))
        callback.trainer = trainer
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the callback is attached to a trainer."""
        if self.trainer is None:
            raise ValueError(
                "SDPOCallback is not attached to a trainer. Pass `callbacks=[SDPOCallback()]` to StepDPOTrainer, or "
                "use `trainer.add_callback(SDPOCallback(trainer))`."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log and save at the end of a stage, as at the end of a run, so that no logged mean spans two stages."""
        stage = self.trainer.stage
        if state.global_step == stage.last_update:
            control.should_log = control.should_log or args.logging_strategy != "no"
            control.should_save = control.should_save or args.save_strategy == "steps"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report of the stages."""
        last = self.trainer.stages[-1]
        if state.global_step < last.last_update:
            logger.warning(
                f"Training ended early, at global_step={state.global_step} of {last.last_update} in stage "
                f"{self.trainer.stage.number} of {last.number}. Later stages have not been trained."
            )
        if state.is_world_process_zero:
            stages = self.trainer.stages
            gammas = {stage.number: self.trainer.read_gamma(stage) for stage in stages}
            write_stage_report(str(args.output_dir), stages, self.record, state.log_history, gammas)


def _check_options(stage: str, options: dict[str, Any], schedule: str) -> None:
    for name, value in options.items():
        if name not in STAGE_OPTIONS:
            raise ValueError(
                f"Stage {stage!r} has an unknown option {name!r}.{did_you_mean(name, STAGE_OPTIONS)} Use "
                f"{', '.join(STAGE_OPTIONS)}."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} of stage {stage!r} is invalid. It must be a positive number.")
        if name == "learning_rate" and schedule == "continuous":
            raise ValueError(
                f"Stage {stage!r} sets learning_rate={value!r}, but schedule='continuous' uses one schedule for all "
                "stages. Use schedule='restart', or remove learning_rate."
            )


def _make_reference(trainer: Any) -> ModelReference | AdapterReference | ScoredReference:
    if trainer.precompute_ref_logps:
        return ScoredReference()
    if isinstance(trainer.model, PeftModel):
        return AdapterReference(trainer)
    return ModelReference(trainer)


def _warn_about_stages(stages: list[Stage]) -> None:
    """Warn if there is a single stage, or if stages share rows."""
    if len(stages) == 1:
        logger.warning(f"There is only one stage, {stages[0].name!r}, which is the same as plain DPO.")
    for stage in stages[1:]:
        seen = np.concatenate([earlier.digests for earlier in stages[: stage.number - 1]])
        shared = stage.digests[np.isin(stage.digests, seen)]
        if len(shared):
            first = next(earlier for earlier in stages if shared[0] in earlier.digests)
            logger.warning(
                f"{len(shared)} rows of stage {stage.number} ({stage.name!r}) are also in an earlier stage (the "
                f"first of them in {first.name!r}), so the reference of stage {stage.number} will have been "
                "trained on them. Remove them from one of the stages."
            )
