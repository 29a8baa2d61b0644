"""Trainers for tiny models, and helpers to compare their results."""

import torch
from datasets import Dataset

from stepdpo_trl import StepDPOConfig, StepDPOTrainer

from .tiny import step_rows

BETA = 0.4


def config(output_dir, cls=StepDPOConfig, **options):
    defaults = {
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "beta": BETA,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return cls(str(output_dir), **{**defaults, **options})


def make_trainer(model, output_dir, rows=None, cls=StepDPOTrainer, config_cls=StepDPOConfig, **options):
    """Create a trainer on step rows. Trainer arguments are passed to the trainer, all others to its config."""
    names = ("callbacks", "compute_metrics", "eval_dataset", "peft_config", "processing_class")
    names += ("quantization_config", "ref_model", "optimizers")
    trainer_options = {name: options.pop(name) for name in names if name in options}
    torch.manual_seed(0)  # older TRL versions initialize the adapter without setting the seed
    rows = step_rows() if rows is None else rows
    dataset = Dataset.from_list(rows) if isinstance(rows, list) and isinstance(rows[0], dict) else rows
    return cls(model, args=config(output_dir, config_cls, **options), train_dataset=dataset, **trainer_options)


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
