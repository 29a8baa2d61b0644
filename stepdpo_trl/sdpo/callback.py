"""Stepwise DPO (sDPO, arXiv 2403.19270): the reference of each stage is the model that the stage before it made."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .checks import check_arguments
from .reference import AdapterReference, ModelReference, ScoredReference
from .report import check_plotting, write_report
from .scoring import without_scores
from .stages import STAGE_OPTIONS, Stage, check_fractions, find_stages
from .training import StagedTraining

if TYPE_CHECKING:
    from trl import DPOTrainer

logger = get_logger(__name__)

SCHEDULES = ("restart", "continuous")
# At the first batch of a stage: how far margin / beta (in nats) and loss may be off, in float32 and in 16 bits
TOLERANCES = {False: (0.01, 0.001), True: (0.5, 0.05)}
# From this share of rows with gamma_ref > 0 and this mean on (in nats; the paper has 84 for a reference that was
# trained on the data, -25 and -39 for others), the reference has probably seen them
SEEN_SHARE, SEEN_GAMMA = 0.95, 20


class SDPOCallback(TrainerCallback, ExportableState):
    """
    Spends preference data in stages, each with the previous stage's aligned model as reference and starting point
    (sDPO, arXiv 2403.19270).

    Each stage is a DPO run of its own, in one run of the trainer: warm-up, decay and optimizer start afresh, epochs
    count per stage, and so does `max_steps`. At its end the model is saved to `output_dir/stage-N` and becomes the
    reference, in place:

    - full fine-tuning: the weights are copied into the reference model, under ZeRO-3 and FSDP2 shard to shard;
    - LoRA and QLoRA: the adapter is copied into a frozen adapter `"ref"` on the same base;
    - `precompute_ref_log_probs=True` (recommended): there is no reference model; at the start of a stage, where policy
      and reference are the same weights, the policy scores the stage's data.

    The stages are a list or dict of data sets passed to [`StepDPOTrainer`], a column `stage` of one data set, or
    `fractions` of one data set.

    Args:
        trainer ([`~trl.DPOTrainer`], *optional*):
            A trainer that is made already, with one data set: `trainer.add_callback(SDPOCallback(trainer))`. Not
            needed in `StepDPOTrainer(..., callbacks=[SDPOCallback()])`.
        fractions (`list[float]`, *optional*):
            Share of the rows in each stage, in their order; they sum to 1.
        schedule (`str`, *optional*, defaults to `"restart"`):
            `"restart"` begins optimizer, warm-up and decay anew in each stage, as in the paper; `"continuous"` keeps
            one course over all of them.
        stage_options (`dict[str, dict]`, *optional*):
            Options of single stages by their name ("1", "2", ... in a list): `beta`, `learning_rate` and
            `num_train_epochs`, in place of the trainer's.

    Raises:
        ValueError: If an option is unknown or unusable, or if trainer and stages do not go together.

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
            raise ValueError(f"Unknown schedule {schedule!r}: it is 'restart' or 'continuous'.")
        self.fractions = None if fractions is None else [float(fraction) for fraction in fractions]
        if self.fractions is not None:
            check_fractions(self.fractions)
        self.schedule = schedule
        stages = stage_options or {}
        if not isinstance(stages, Mapping) or not all(isinstance(options, Mapping) for options in stages.values()):
            raise ValueError(
                f"stage_options={stage_options!r} must map names of stages to their options, like "
                "{'2': {'beta': 0.05}}."
            )
        self.stage_options = {str(name): dict(options) for name, options in stages.items()}
        for name, options in self.stage_options.items():
            _check_options(name, options, schedule)
        self.record: dict[str, Any] = {}  # run and stages, as checkpoints keep them
        self.trainer: Any = None
        if trainer is not None:
            self.attach(trainer)

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in a checkpoint."""
        names = ("fractions", "schedule", "stage_options")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"record": self.record}}

    def attach(self, trainer: "DPOTrainer", names: Sequence[Any] = ()) -> None:
        """
        Make a trainer train in stages.

        Args:
            trainer ([`~trl.DPOTrainer`]): The trainer.
            names (`list`, *optional*): Stages that there were before rows were left out as overlong.
        """
        staged: Any = trainer
        if getattr(staged, "stages", []):
            raise ValueError("The trainer has an SDPOCallback already. One runs all stages.")
        if staged.ref_model is not None and isinstance(staged.model, PeftModel):
            raise ValueError(
                "A `ref_model` was given together with an adapter. In stages the reference is the adapter of the "
                "stage before, on the same base: leave `ref_model` out."
            )
        check_arguments(staged, self.schedule, self.stage_options)
        if not isinstance(trainer, StagedTraining):
            # The loop is the trainer's own, with what differs between stages put before it
            trainer.__class__ = type(f"Staged{type(trainer).__name__}", (StagedTraining, type(trainer)), {})
        stages = find_stages(staged.train_dataset, self.fractions)
        emptied = [str(name) for name in names if str(name) not in stages]
        if emptied:
            raise ValueError(
                f"Stage {emptied[0]!r} is empty: all its rows are longer than max_length={staged.args.max_length}. "
                "Raise that, or leave the stage out."
            )
        unknown = [name for name in self.stage_options if name not in stages]
        if unknown:
            nearest = get_close_matches(unknown[0], list(stages), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"`stage_options` names the stage {unknown[0]!r}, and the stages are {list(stages)}. Did you mean "
                f"{nearest!r}?"
            )
        defaults = {name: getattr(staged.args, name) for name in STAGE_OPTIONS}
        staged.stages = [
            Stage(number, name, without_scores(rows), **{**defaults, **self.stage_options.get(name, {})})
            for number, (name, rows) in enumerate(stages.items(), start=1)
        ]
        _warn_of_rows(staged.stages)
        staged.reference = _reference(staged)
        evaluation = staged.eval_dataset
        staged._eval_data = (
            {name: without_scores(data) for name, data in evaluation.items()}
            if isinstance(evaluation, dict)
            else without_scores(evaluation)
        )
        staged.train_dataset, staged.beta = staged.stages[0].dataset, staged.stages[0].beta
        staged.sdpo, self.trainer = self, trainer
        check_plotting()

    def registered(self, trainer: Any) -> "SDPOCallback":
        """This callback as the trainer has it, which may have been made anew from a checkpoint."""
        callback = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, SDPOCallback))
        callback.trainer = trainer
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to do nothing."""
        if self.trainer is None:
            raise ValueError(
                "SDPOCallback does not know the trainer. Pass it to StepDPOTrainer as `callbacks=[SDPOCallback()]`, "
                "or to another trainer as `trainer.add_callback(SDPOCallback(trainer))`."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At a stage's last update log, so that no figure mixes stages, and save where a run's end is saved."""
        stage = self.trainer.stage
        if state.global_step == stage.last_update:
            control.should_log = control.should_log or args.logging_strategy != "no"
            control.should_save = control.should_save or args.save_strategy == "steps"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report."""
        last = self.trainer.stages[-1]
        if state.global_step < last.last_update:
            logger.warning(
                f"Training has ended at global_step={state.global_step} of {last.last_update}, in stage "
                f"{self.trainer.stage.number} of {last.number}. The stages after it have not been trained."
            )
        if state.is_world_process_zero:
            write_report(self.trainer)

    def check_gamma(self, stage: Stage, gamma: np.ndarray) -> dict[str, float]:
        """Warn where the reference seems to have been trained on the stage's data; returns what is logged."""
        share = float((gamma > 0).mean())
        if share >= SEEN_SHARE and gamma.mean() >= SEEN_GAMMA:
            logger.warning(
                f"Stage {stage.number} ({stage.name!r}): its reference prefers the chosen answer in {share:.1%} of "
                f"{len(gamma)} rows, with a mean gamma_ref of {gamma.mean():.1f}. It seems to have been trained on "
                "them, which leaves little to learn. Check that the stages share no data with each other or with what "
                "the model was trained on before."
            )
        return {"sdpo/gamma_ref": float(gamma.mean()), "sdpo/ref_accuracy": share}

    def check_first_batch(self, trainer: Any, loss: float, margins: float, accuracies: float) -> dict[str, float]:
        """Warn where policy and reference differ at the first batch of a stage; returns what is logged."""
        stage = trainer.stage
        plain = trainer.loss_types == ["sigmoid"] and not trainer.use_weighting and trainer.args.loss_weights is None
        short = (
            trainer.args.bf16 or trainer.args.fp16 or any(p.dtype.itemsize == 2 for p in trainer.model.parameters())
        )
        margin_tolerance, loss_tolerance = TOLERANCES[short]
        off = plain and abs(loss - math.log(2)) > loss_tolerance
        if trainer.args.disable_dropout and (off or abs(margins) > margin_tolerance * stage.beta):
            logger.warning(
                f"Stage {stage.number} ({stage.name!r}) does not start from its reference: at its first batch the "
                f"loss is {loss:.4f} (ln 2 = 0.6931 is expected) and the reward margin {margins:.4f} (0 is expected). "
                "In the first stage a `ref_model` other than the model does this; otherwise look for dropout, or for "
                "layers that differ between training and evaluation."
            )
        return {
            "sdpo/first_batch_loss": loss,
            "sdpo/first_batch_margin": margins,
            "sdpo/first_batch_accuracy": accuracies,
        }


def _check_options(stage: str, options: dict[str, Any], schedule: str) -> None:
    for name, value in options.items():
        if name not in STAGE_OPTIONS:
            nearest = get_close_matches(name, STAGE_OPTIONS, n=1, cutoff=0.0)[0]
            raise ValueError(f"Stage {stage!r} has an unknown option {name!r}. Did you mean {nearest!r}?")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} of stage {stage!r} must be a positive number.")
        if name == "learning_rate" and schedule == "continuous":
            raise ValueError(
                f"Stage {stage!r} has a learning rate of its own, but schedule='continuous' keeps one course over all "
                "stages. Use schedule='restart'."
            )


def _reference(trainer: Any) -> ModelReference | AdapterReference | ScoredReference:
    if trainer.precompute_ref_logps:
        return ScoredReference()
    if isinstance(trainer.model, PeftModel):
        return AdapterReference(trainer)
    return ModelReference(trainer)


def _warn_of_rows(stages: list[Stage]) -> None:
    if len(stages) == 1:
        logger.warning(f"There is one stage, {stages[0].name!r}: this is plain DPO.")
    seen: dict[bytes, Stage] = {}
    for stage in stages:
        earlier = [first for first in (seen.setdefault(row, stage) for row in stage.digests) if first is not stage]
        if earlier:
            logger.warning(
                f"{len(earlier)} rows of stage {stage.number} ({stage.name!r}) are also in an earlier stage, the "
                f"first of them in {earlier[0].name!r}: their reference will have been trained on them."
            )
