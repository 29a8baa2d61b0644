"""Options of `StepDPOConfig` that have an older name in some supported versions of transformers and TRL."""

import dataclasses
import warnings

import pytest
from trl import TrlParser

from stepdpo_trl import StepDPOConfig

from ..training import make_trainer

KWARGS = {"use_reentrant": True}


def make_config(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        return StepDPOConfig("unused", bf16=False, use_cpu=True, **options)


def both_names(config):
    return config.activation_checkpointing, config.gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),  # as in DPOConfig
        ({"activation_checkpointing": False}, False),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": False, "gradient_checkpointing": True}, False),  # the new name counts
    ],
    ids=str,
)
def test_names_of_checkpointing(options, expected):
    """Both names work without a warning, and both say what was set."""
    assert both_names(make_config(**options)) == (expected, expected)


@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
@pytest.mark.parametrize("value", [KWARGS, '{"use_reentrant": true}'], ids=["dict", "text"])
def test_names_of_checkpointing_arguments(name, value):
    config = make_config(**{name: value})
    assert config.activation_checkpointing_kwargs == config.gradient_checkpointing_kwargs == KWARGS


def test_copy_with_another_value():
    assert both_names(dataclasses.replace(make_config(), activation_checkpointing=False)) == (False, False)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_command_line(name):
    options = ["--output_dir", "unused", "--bf16", "false", "--use_cpu", "true"]
    for value, expected in ((["false"], False), (["true"], True), ([], True)):
        (config,) = TrlParser(StepDPOConfig).parse_args_and_config([*options, f"--{name}", *value])
        assert both_names(config) == (expected, expected)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_training_uses_the_option(name, chat_model, tmp_path):
    options = {"gradient_checkpointing": None, name: True}
    trainer = make_trainer(chat_model, tmp_path, max_steps=1, **options)
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
