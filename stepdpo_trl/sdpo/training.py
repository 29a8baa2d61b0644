"""
The training loop of sDPO (arXiv 2403.19270): one run of the Trainer in which each stage is a DPO run of its own.

The Trainer's loop is kept, with its logging, checkpoints and back ends. What it asks for is answered per stage: the
epochs and their batches, the learning rate, the reference. Nothing here acts until an [`SDPOCallback`] is attached.
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
from transformers import EarlyStoppingCallback

from .checks import compares_references
from .files import (
    check_record,
    find_checkpoint,
    is_whole,
    seal,
    stage_folder,
)
from .scoring import StageScoring
from .stages import Stage

logger = get_logger(__name__)


class StagedTraining(StageScoring):
    """Mixin for [`~trl.DPOTrainer`] and its subclasses: trains the stages of an [`SDPOCallback`] one after another."""

    _first_batch_is_due = False
    _pending_logs: dict[str, float] = {}  # noqa: RUF012  (replaced, never changed)

    # ------------------------------------------------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train all stages. Resumes as the Trainer does, from the last checkpoint that is whole."""
        if self.sdpo is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if self.sdpo not in self.callback_handler.callbacks:
            self.add_callback(self.sdpo)
        self._plan()
        if not resume_from_checkpoint:
            if self.stage is not None:
                raise RuntimeError(
                    "This trainer has already trained, and its reference is no longer the first stage's. Make a new "
                    "trainer, or pass `resume_from_checkpoint`."
                )
            self.sdpo.record = {"ids": [], **self._description()}
            return super().train(None, *args, **kwargs)
        path, state = self._agree(lambda: find_checkpoint(self._output_dir, resume_from_checkpoint))
        self.sdpo.record = check_record(path, state, self._description())
        stage = self._stage_at(state["global_step"])
        if stage.number == 1 and self.stage is not None and self.stage.number > 1:
            raise RuntimeError(
                f"{path} is from the first stage, whose reference this trainer no longer has. Make a new trainer and "
                "resume from there."
            )
        self.stage = None
        if stage.first_update < state["global_step"]:
            self._reopen(stage)
        return super().train(str(path), *args, **kwargs)

    def _plan(self) -> None:
        """Count the batches, updates and epochs of each stage."""
        epoch, update = 0, 0
        for stage in self.stages:
            options = copy.copy(self.args)
            options.num_train_epochs = stage.num_train_epochs
            self.train_dataset = stage.dataset
            loader = self.get_train_dataloader()
            if len(loader) == 0:
                raise ValueError(
                    f"Stage {stage.name!r} has {len(stage.dataset)} rows, fewer than one batch, and "
                    "`dataloader_drop_last=True` drops them all. Set it to False, or lower the batch size."
                )
            values = super().set_initial_training_values(options, loader)
            stage.epochs, stage.updates_per_epoch, _, _, _, batches, stage.updates = values
            stage.batches = int(batches or 0)
            stage.first_epoch, stage.first_update = epoch, update
            epoch, update = epoch + stage.epochs, update + stage.updates
        self.train_dataset = self.stages[0].dataset

    def _stage_at(self, update: int) -> Stage:
        """The stage that the next update belongs to; after the last update, the last one."""
        return next((stage for stage in self.stages if update < stage.last_update), self.stages[-1])

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Sum up the stages."""
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
        """Find epoch and batch to go on from, in epochs of different lengths."""
        values = super()._init_training_state(*args, **kwargs)
        if self.sdpo is None:
            return values
        self.sdpo = self.sdpo.registered(self)  # which the Trainer may have made anew from the checkpoint
        stage = self._stage_at(self.state.global_step)
        done = self.state.global_step - stage.first_update
        if done == stage.updates:  # all is trained
            return stage.first_epoch + stage.epochs, 0
        epochs, updates = divmod(done, stage.updates_per_epoch)
        return stage.first_epoch + epochs, updates * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap and load the model, then open the stage."""
        values = super()._prepare_for_training(*args, **kwargs)
        if self.sdpo is not None:
            if self.stage is None and self.state.global_step < self.stages[-1].last_update:
                self._begin(self._stage_at(self.state.global_step))
            elif self.stage is not None:
                self._open_loader()
        return values

    def _run_epoch(self, *, epoch: int, epochs_trained: int, **kwargs: Any) -> None:  # type: ignore[override]
        """Run an epoch of a stage. Epochs are counted from the start of the stage, as in a run of its own."""
        if self.sdpo is None:
            super()._run_epoch(epoch=epoch, epochs_trained=epochs_trained, **kwargs)
            return
        stage = next(stage for stage in self.stages if epoch < stage.first_epoch + stage.epochs)
        local = epoch - stage.first_epoch
        if epoch != epochs_trained and self.state.global_step != stage.first_update + local * stage.updates_per_epoch:
            raise RuntimeError(
                f"An epoch before epoch {local + 1} of stage {stage.number} was cut short, by a callback that sets "
                "`control.should_epoch_stop`. Stages count updates: stop training instead, or train for fewer epochs."
            )
        if stage is not self.stage:
            self._begin(stage)
        updates = min(stage.updates_per_epoch, stage.updates - local * stage.updates_per_epoch)
        whole = updates == stage.updates_per_epoch
        kwargs["train_dataloader"] = self._loader
        kwargs["num_update_steps_per_epoch"] = updates
        kwargs["steps_in_epoch"] = stage.batches if whole else updates * self.args.gradient_accumulation_steps
        super()._run_epoch(epoch=local, epochs_trained=local if epoch == epochs_trained else -1, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Save the last stage's model."""
        if self.sdpo is not None and self.state.global_step == self.stages[-1].last_update:
            self._save_stage(self.stages[-1])
        return super()._finalize_training(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """With `schedule="restart"`, warm-up and decay of each stage one after the other."""
        if self.sdpo is None or self.sdpo.schedule == "continuous" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        factors = [self._factor(stage) for stage in self.stages]

        def factor(update: int) -> float:
            stage = self._stage_at(update)
            return factors[stage.number - 1](update - stage.first_update)

        whose: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(whose, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, stage: Stage) -> Callable[[int], float]:
        """The stage's learning rate after each of its updates, as a multiple of `args.learning_rate`."""
        scheduler = super().create_scheduler(stage.updates, torch.optim.SGD([torch.zeros(1)], lr=stage.learning_rate))
        self.lr_scheduler = None
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={str(self.args.lr_scheduler_type)!r} follows the loss and has no course that "
                "could begin anew in each stage. Choose another, or SDPOCallback(schedule='continuous')."
            )
        if stage.learning_rate == self.args.learning_rate:
            return scheduler.lr_lambdas[0]
        ratio = stage.learning_rate / self.args.learning_rate
        return lambda update: ratio * scheduler.lr_lambdas[0](update)

    # ------------------------------------------------------------------------------------------------ a stage

    def _begin(self, stage: Stage) -> None:
        """Start a stage: what has been trained so far becomes the reference, and the optimizer starts afresh."""
        assert self.sdpo is not None
        # What belongs to this start of the stage carries its id: model of the stage before, scores, checkpoints
        self.sdpo.record["ids"] = [*self.sdpo.record["ids"][: stage.number - 1], self._agree(lambda: uuid.uuid4().hex)]
        if stage.number > 1:
            self._save_stage(self.stages[stage.number - 2])
            self.reference.become_policy()
            if self.sdpo.schedule == "restart":
                clear_optimizer_state(self.optimizer)
                _set_course(self.lr_scheduler, stage.first_update)
            forget_best(self)
        self.stage, self.beta = stage, stage.beta
        logger.info(f"Stage {stage.number} of {len(self.stages)}, {stage.name!r}: {len(stage.dataset)} rows.")
        gamma = self._score(stage)
        self._first_batch_is_due = True
        self._open_loader()
        self._pending_logs = self.sdpo.check_gamma(stage, gamma)

    def _reopen(self, stage: Stage) -> None:
        """Restore the reference of a stage that a checkpoint was saved in."""
        assert self.sdpo is not None
        if stage.number > 1:
            folder = stage_folder(self._output_dir, stage.number - 1)
            if not self._agree(lambda: is_whole(folder, self._id(stage))):
                raise ValueError(
                    f"Cannot resume in stage {stage.number}: its reference is the model in {folder}, which is "
                    "missing, incomplete or of another run. Put that of the checkpoint's run there, resume from a "
                    "checkpoint of an earlier stage, or train anew."
                )
            self.reference.restore(folder)
        self.stage, self.beta, self.train_dataset = stage, stage.beta, stage.dataset
        self._first_batch_is_due, self._pending_logs = False, {}
        if self.reference.kind == "scores":
            self._reopen_scores(stage)

    def _open_loader(self) -> None:
        self._loader = self.get_train_dataloader()
        self.callback_handler.train_dataloader = self._loader

    def _save_stage(self, stage: Stage) -> None:
        """Save the stage's model to `output_dir/stage-N`, which appears when all of it is written."""
        assert self.sdpo is not None
        record = {"id": self.sdpo.record["ids"][-1], **stage.record()}
        folder = stage_folder(self._output_dir, stage.number)
        partial = folder.with_name(f"{folder.name}.partial")
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(partial), _internal_call=True)
        self.accelerator.wait_for_everyone()
        self._agree(lambda: seal(partial, folder, record))

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait for everyone, so that `trainer_state.json`, which follows, says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        if self.sdpo is not None:
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights in the type they were trained in: PEFT makes the adapter of QLoRA float32."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(*args, **kwargs)
        if self.sdpo is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.dtype != dtypes[name]:
                    parameter.data = parameter.data.to(dtypes[name])

    def _description(self) -> dict[str, Any]:
        assert self.sdpo is not None
        stages = [stage.record() for stage in self.stages]
        return {"schedule": self.sdpo.schedule, "reference": self.reference.kind, "stages": stages}

    # ------------------------------------------------------------------------------------------------ what it tells

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Look at the first batch of a stage, where policy and reference are the same."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._first_batch_is_due and self.model.training:
            assert self.sdpo is not None
            self._first_batch_is_due = False
            metrics = {name: self._metrics["train"][f"rewards/{name}"][-1] for name in ("margins", "accuracies")}
            loss_value = self.accelerator.gather(loss.detach().float().reshape(1)).mean().item()
            self._pending_logs |= self.sdpo.check_first_batch(self, loss_value, **metrics)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the stage."""
        if self.stage is not None:
            logs["sdpo/stage"] = self.stage.number
            if "loss" in logs:  # of training
                logs |= self._pending_logs
                self._pending_logs = {}
        super().log(logs, *args, **kwargs)


def forget_best(trainer: Any) -> None:
    """Begin anew what compares losses or rewards of evaluations: those of a stage are against its own reference."""
    if not compares_references(trainer.args):
        return
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            callback.early_stopping_patience_counter = 0


def _set_course(scheduler: Any, update: int) -> None:
    """Put the learning rate where it is at an update; it lags where fp16 has skipped updates."""
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    if scheduler.last_epoch != update:
        scheduler.last_epoch = update - 1
        scheduler.step()


def clear_optimizer_state(optimizer: Any) -> None:
    """
    Make an optimizer as if it had taken no step, wherever accelerate and DeepSpeed have wrapped it.

    Optimizers make their state anew in the next step, on the parameters that they hold (with ZeRO the shards).
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)  # where DeepSpeed's FusedAdam counts
