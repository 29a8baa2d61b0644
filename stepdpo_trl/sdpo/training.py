"""
Training loop of sDPO (arXiv 2403.19270): a single run of the Trainer in which each stage is a separate DPO run.

The Trainer's loop, logging, checkpoints and distributed strategies are inherited. The overridden methods return the
epochs, batches, learning rate and reference of the current stage.
"""

import copy
import shutil
import uuid
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..data.files import partial_path
from .diagnostics import first_batch_metrics, gamma_metrics
from .files import (
    check_record,
    find_checkpoint,
    is_complete,
    publish_stage_folder,
    reading_checkpoint,
    stage_folder,
)
from .restart import clear_optimizer_state, reset_best_metric, set_scheduler_step
from .scoring import StageScoring, stop_workers
from .stages import Stage

logger = get_logger(__name__)


class StagedTraining(StageScoring):
    """
    Mixin for [`~trl.DPOTrainer`] and its subclasses that trains the stages of an [`SDPOCallback`] one after another.

    It has no effect until the callback is attached.
    """

    _is_first_batch = False
    _pending_logs: dict[str, float] = {}  # noqa: RUF012  (replaced, never changed)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train all stages.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` for the last complete checkpoint in `output_dir`.
            *args, **kwargs:
                Passed to [`~transformers.Trainer.train`].

        Raises:
            ValueError: If there is no complete checkpoint, or if it was saved by a run with other stages.
            RuntimeError: If the trainer no longer has the reference of the first stage.
        """
        if self.sdpo is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        callback: Any = self.sdpo
        if callback not in self.callback_handler.callbacks:
            self.add_callback(callback)
        self._plan_stages()
        try:
            return super().train(self._find_start(resume_from_checkpoint), *args, **kwargs)
        finally:
            self._stop_workers()

    def _find_start(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint that training resumes from, if any, after restoring the stage that it is in."""
        assert self.sdpo is not None
        if not resume_from_checkpoint:
            if self.stage is not None:
                raise RuntimeError(
                    "This trainer has already trained, so its reference is no longer that of the first stage. Create "
                    "a new trainer, or pass `resume_from_checkpoint`."
                )
            self.sdpo.record = {"ids": [], **self._describe_run()}
            return None
        path, state = self._on_main_process(lambda: find_checkpoint(self._output_dir, resume_from_checkpoint))
        self.sdpo.record = check_record(path, state, self._describe_run())
        stage = self._stage_at(state["global_step"])
        if stage.number == 1 and self.stage is not None and self.stage.number > 1:
            raise RuntimeError(
                f"{path} is a checkpoint from the first stage, whose reference this trainer no longer has. Create a "
                "new trainer to resume from it."
            )
        self.stage = None
        if stage.first_update < state["global_step"]:
            self._restore_stage(stage)
        return str(path)

    def _plan_stages(self) -> None:
        """Compute the batches, optimizer steps and epochs of each stage."""
        epoch, update = 0, 0
        for stage in self.stages:
            options = copy.copy(self.args)
            options.num_train_epochs = stage.num_train_epochs
            self.train_dataset = stage.dataset
            loader = self.get_train_dataloader()
            if len(loader) == 0:
                raise ValueError(
                    f"Stage {stage.name!r} has {len(stage.dataset)} rows, which is less than one batch, and "
                    "`dataloader_drop_last=True` drops them all. Set it to False, or decrease the batch size."
                )
            values = super().set_initial_training_values(options, loader)
            stage.epochs, stage.updates_per_epoch, _, _, _, batches, stage.updates = values
            stage.batches = int(batches or 0)
            stage.first_epoch, stage.first_update = epoch, update
            epoch, update = epoch + stage.epochs, update + stage.updates
        self.train_dataset = self.stages[0].dataset

    def _stage_at(self, update: int) -> Stage:
        """Return the stage of the next optimizer step, or the last stage after the last step."""
        return next((stage for stage in self.stages if update < stage.last_update), self.stages[-1])

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Return the values of [`~transformers.Trainer`] summed over all stages."""
        values = super().set_initial_training_values(args, dataloader)
        if self.sdpo is None:
            return values
        last = self.stages[-1]
        samples = sum(len(stage.dataset) * stage.num_train_epochs for stage in self.stages)
        rows = sum(len(stage.dataset) for stage in self.stages)
        first = self.stages[0]
        epochs = last.first_epoch + last.epochs
        return epochs, first.updates_per_epoch, rows, samples, values[4], first.batches, last.last_update

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the epoch and batch to resume from. Epochs of different stages differ in length."""
        values = super()._init_training_state(*args, **kwargs)
        if self.sdpo is None:
            return values
        self.sdpo = self.sdpo.registered(self)  # the Trainer may have recreated it from the checkpoint
        stage = self._stage_at(self.state.global_step)
        done = self.state.global_step - stage.first_update
        if done == stage.updates:  # the run is finished
            return stage.first_epoch + stage.epochs, 0
        epochs, updates = divmod(done, stage.updates_per_epoch)
        return stage.first_epoch + epochs, updates * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap and load the model, then start or continue the stage."""
        values = super()._prepare_for_training(*args, **kwargs)
        if self.sdpo is not None:
            if self.stage is None and self.state.global_step < self.stages[-1].last_update:
                self._start_stage(self._stage_at(self.state.global_step))
            elif self.stage is not None:
                self._create_loader()
        return values

    def _run_epoch(self, *, epoch: int, epochs_trained: int, **kwargs: Any) -> None:  # type: ignore[override]
        """Run one epoch of a stage, numbered from the start of the stage as in a separate run."""
        if self.sdpo is None:
            super()._run_epoch(epoch=epoch, epochs_trained=epochs_trained, **kwargs)
            return
        stage = next(stage for stage in self.stages if epoch < stage.first_epoch + stage.epochs)
        local = epoch - stage.first_epoch
        if epoch != epochs_trained and self.state.global_step != stage.first_update + local * stage.updates_per_epoch:
            raise RuntimeError(
                f"A callback ended an epoch early (`control.should_epoch_stop`), before epoch {local + 1} of stage "
                f"{stage.number}. The boundaries of stages are counted in optimizer steps, so this is not supported. "
                "Use `control.should_training_stop`, or fewer epochs."
            )
        if stage is not self.stage:
            self._start_stage(stage)
        updates = min(stage.updates_per_epoch, stage.updates - local * stage.updates_per_epoch)
        is_full = updates == stage.updates_per_epoch
        kwargs["train_dataloader"] = self._loader
        kwargs["num_update_steps_per_epoch"] = updates
        kwargs["steps_in_epoch"] = stage.batches if is_full else updates * self.args.gradient_accumulation_steps
        super()._run_epoch(epoch=local, epochs_trained=local if epoch == epochs_trained else -1, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model of the last stage."""
        if self.sdpo is not None and self.state.global_step == self.stages[-1].last_update:
            self._save_stage(self.stages[-1])
        return super()._finalize_training(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create the scheduler. With `schedule="restart"`, warmup and decay are repeated for each stage."""
        if self.sdpo is None or self.sdpo.schedule == "continuous" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        factors = [self._stage_schedule(stage) for stage in self.stages]

        def factor(update: int) -> float:
            stage = self._stage_at(update)
            return factors[stage.number - 1](update - stage.first_update)

        scheduled: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(scheduled, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _stage_schedule(self, stage: Stage) -> Callable[[int], float]:
        """Return the learning rate of a stage as a multiple of `args.learning_rate`, by optimizer step."""
        scheduler = super().create_scheduler(stage.updates, torch.optim.SGD([torch.zeros(1)], lr=stage.learning_rate))
        self.lr_scheduler = None
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={str(self.args.lr_scheduler_type)!r} is not a function of the step, so it cannot "
                "restart in each stage. Use another scheduler, or SDPOCallback(schedule='continuous')."
            )
        if stage.learning_rate == self.args.learning_rate:
            return scheduler.lr_lambdas[0]
        ratio = stage.learning_rate / self.args.learning_rate
        return lambda update: ratio * scheduler.lr_lambdas[0](update)

    def _start_stage(self, stage: Stage) -> None:
        """Save the previous stage, copy the policy into the reference, reset the optimizer and score the rows."""
        assert self.sdpo is not None
        # Links the saved model, the scores and the checkpoints to this start of the stage
        start_id = self._on_main_process(lambda: uuid.uuid4().hex)
        self.sdpo.record["ids"] = [*self.sdpo.record["ids"][: stage.number - 1], start_id]
        if stage.number > 1:
            self._save_stage(self.stages[stage.number - 2])
            self.reference.become_policy()
            if self.sdpo.schedule == "restart":
                clear_optimizer_state(self.optimizer)
                set_scheduler_step(self.lr_scheduler, stage.first_update)
            reset_best_metric(self)
        self.stage, self.beta = stage, stage.beta
        logger.info(f"Stage {stage.number} of {len(self.stages)}, {stage.name!r}: {len(stage.dataset)} rows.")
        gamma = self._score_stage(stage)
        self._is_first_batch = True
        self._create_loader()
        self._pending_logs = gamma_metrics(stage, gamma)

    def _restore_stage(self, stage: Stage) -> None:
        """Restore the reference of a stage, to resume within it."""
        assert self.sdpo is not None
        if stage.number > 1:
            folder = stage_folder(self._output_dir, stage.number - 1)
            record = {"id": self._start_id(stage), **self.stages[stage.number - 2].record()}
            if not self._on_main_process(lambda: is_complete(folder, record)):
                raise ValueError(
                    f"Cannot resume in stage {stage.number}: its reference is the model in {folder}, which is "
                    "missing, incomplete, or from another stage or run. Restore that folder, resume from a checkpoint "
                    "of an earlier stage, or start a new run."
                )
            self.reference.restore(folder)
        self.stage, self.beta, self.train_dataset = stage, stage.beta, stage.dataset
        self._is_first_batch, self._pending_logs = False, {}
        if self.reference.kind == "scores":
            self._restore_scores(stage)

    def _create_loader(self) -> None:
        stop_workers(self._loader)
        self._loader = self.get_train_dataloader()
        self.callback_handler.train_dataloader = self._loader

    def _save_stage(self, stage: Stage) -> None:
        """Save the model of a stage to `output_dir/stage-N`."""
        assert self.sdpo is not None
        record = {"id": self.sdpo.record["ids"][-1], **stage.record()}
        folder = stage_folder(self._output_dir, stage.number)
        partial = partial_path(folder)
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(partial), _internal_call=True)
        self.accelerator.wait_for_everyone()
        self._on_main_process(lambda: publish_stage_folder(folder, record))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states and wait, so that `trainer_state.json` is written after the files of all ranks."""
        super()._save_rng_state(output_dir)
        if self.sdpo is not None:
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load a checkpoint and keep the dtypes of the parameters. PEFT converts QLoRA adapters to float32."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        with reading_checkpoint(args[0]):
            super()._load_from_checkpoint(*args, **kwargs)
        if self.sdpo is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.dtype != dtypes[name]:
                    parameter.data = parameter.data.to(dtypes[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer state of a checkpoint."""
        with reading_checkpoint(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random states of a checkpoint."""
        with reading_checkpoint(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _describe_run(self) -> dict[str, Any]:
        """Return the properties of the run that must match those in a checkpoint to resume from it."""
        assert self.sdpo is not None
        stages = [stage.record() for stage in self.stages]
        return {"schedule": self.sdpo.schedule, "reference": self.reference.kind, "stages": stages}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss. At the first batch of a stage, check that policy and reference are equal."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._is_first_batch and self.model.training:
            self._is_first_batch = False
            margin, accuracy = (self._metrics["train"][f"rewards/{name}"][-1] for name in ("margins", "accuracies"))
            mean_loss = self.accelerator.gather(loss.detach().float().reshape(1)).mean().item()
            self._pending_logs |= first_batch_metrics(self, mean_loss, margin, accuracy)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics with the number of the stage and, in its first training log, the metrics of its start."""
        if self.stage is not None:
            logs["sdpo/stage"] = self.stage.number
            if "loss" in logs:  # a training log
                logs |= self._pending_logs
                self._pending_logs = {}
        super().log(logs, *args, **kwargs)
