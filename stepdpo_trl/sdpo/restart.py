"""Resetting the optimizer, the learning-rate schedule and the best metric at the start of a stage."""

from typing import Any

from transformers import EarlyStoppingCallback

from .checks import depends_on_reference


def clear_optimizer_state(optimizer: Any) -> None:
    """
    Reset an optimizer to the state before its first step.

    Optimizers recreate their state in the next step, for the parameters they hold (with ZeRO, the local shards).

    Args:
        optimizer (`torch.optim.Optimizer`):
            Optimizer, possibly wrapped by accelerate or DeepSpeed.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)  # DeepSpeed's FusedAdam counts steps here


def set_scheduler_step(scheduler: Any, step: int) -> None:
    """
    Move a learning-rate scheduler to an optimizer step. It lags behind `global_step` if fp16 has skipped steps.

    Args:
        scheduler (`torch.optim.lr_scheduler.LRScheduler`):
            Scheduler, possibly wrapped by accelerate.
        step (`int`):
            Optimizer step, as in `global_step`.
    """
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    if scheduler.last_epoch != step:
        scheduler.last_epoch = step - 1
        scheduler.step()


def reset_best_metric(trainer: Any) -> None:
    """Reset the best metric and early stopping, if the metric cannot be compared between stages."""
    if not depends_on_reference(trainer.args):
        return
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            callback.early_stopping_patience_counter = 0
