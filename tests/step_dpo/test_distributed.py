"""
Step-DPO on two processes under DDP, ZeRO and FSDP2, compared with one process.

On CPU: these tests cover our code and its wiring into accelerate, not the GPU kernels.
"""

import json

import pytest
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from ..distributed.launcher import FOLDER, launch
from ..tiny import step_rows
from ..training import assert_same_weights, logged, make_trainer

# Checked against the processes' reports: a wrong setup trains just as well, each process on its own
EXPECTED = {
    "ddp": {"distributed_type": "MULTI_CPU", "wrapper": "DistributedDataParallel", "sharded": False},
    "zero2": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "sharded": True},
    "zero3": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "sharded": True},
    "fsdp2": {"distributed_type": "FSDP", "wrapper": "FSDP", "sharded": True},
}

MODES = {"full": None, "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}


def launch_strategy(script, strategy, *arguments, options=()):
    """Run a script of `distributed/` in two processes under a distributed strategy."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    launch(FOLDER / f"{strategy}.yaml", FOLDER / script, strategy, *arguments, options=options)


def read_report(output_dir, strategy):
    """Read the report of a run and check that it used two processes and the requested strategy."""
    report = json.loads((output_dir / "report.json").read_text())
    assert report["processes"] == 2
    expected = EXPECTED[strategy]
    assert (report["distributed_type"], report["sharded"]) == (expected["distributed_type"], expected["sharded"])
    assert report["wrapper"].startswith(expected["wrapper"])
    return report


def saved_weights(model, output_dir, lora):
    """Load the weights written by `save_model` as a user would."""
    if lora:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), output_dir)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(output_dir)
    return {name: parameter.detach() for name, parameter in loaded.named_parameters()}


@pytest.fixture(scope="module")
def single_process(chat_model, tmp_path_factory):
    """Trainers and folders of the same runs on one process, by mode."""
    runs = {}
    for mode, peft_config in MODES.items():
        folder = tmp_path_factory.mktemp(mode)
        options = {"per_device_train_batch_size": 4, "max_length": 165, "shared_prefix": "off"}
        trainer = make_trainer(chat_model, folder, step_rows(12), peft_config=peft_config, **options)
        trainer.train()
        trainer.save_model()
        runs[mode] = trainer, folder
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EXPECTED)
def test_two_processes_equal_one(strategy, single_process, chat_model, tmp_path):
    launch_strategy("train.py", strategy, chat_model, tmp_path, *MODES)
    for mode, (single, folder) in single_process.items():
        report = read_report(tmp_path / mode, strategy)
        assert report["loss"] == pytest.approx(logged(single, "loss"), abs=1e-5), mode
        assert report["margins"] == pytest.approx(logged(single, "rewards/margins"), abs=1e-5), mode
        assert report["margins"][-1] > 1e-3  # the model has learned something
        pairs = list(zip(*report["packs"], strict=True))  # the two processes at the same batch
        assert any(one[0] != other[0] for one, other in pairs)
        assert all(one[1] == other[1] == max(one[0], other[0]) for one, other in pairs)
        one, two = (saved_weights(chat_model, path, mode == "lora") for path in (folder, tmp_path / mode))
        assert_same_weights(one, two, rtol=1e-4, atol=1e-6)
