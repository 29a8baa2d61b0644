"""Two processes equal one, on every back end. On CPU: what is tested is ours and the wiring, not the GPU kernels."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from ..tiny import step_rows
from ..training import assert_same_weights, logged, make_trainer

FOLDER = Path(__file__).parents[1] / "distributed"
# What the processes must report of themselves: a wrong set-up trains all the same, each process by itself
EXPECTED = {
    "ddp": {"distributed_type": "MULTI_CPU", "wrapper": "DistributedDataParallel", "sharded": False},
    "zero2": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "sharded": True},
    "zero3": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "sharded": True},
    "fsdp2": {"distributed_type": "FSDP", "wrapper": "FSDP", "sharded": True},
}

MODES = {"full": None, "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}


def launch(script, backend, *arguments):
    """Run a script of `distributed/` in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{backend}.yaml")]
    command += ["--main_process_port", str(port), str(FOLDER / script), backend, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def read_report(output_dir, backend):
    """What the processes said of themselves, which is checked against what they should have been."""
    report = json.loads((output_dir / "report.json").read_text())
    assert report["processes"] == 2
    expected = EXPECTED[backend]
    assert (report["distributed_type"], report["sharded"]) == (expected["distributed_type"], expected["sharded"])
    assert report["wrapper"].startswith(expected["wrapper"])
    return report


def saved_weights(model, output_dir, lora):
    """What `save_model` wrote, loaded as a user would."""
    if lora:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), output_dir)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(output_dir)
    return {name: parameter.detach() for name, parameter in loaded.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXPECTED)
def test_two_processes_equal_one(backend, chat_model, tmp_path):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    launch("train.py", backend, chat_model, tmp_path / "two", *MODES)
    for mode, peft_config in MODES.items():
        options = {"per_device_train_batch_size": 4, "max_length": 165, "shared_prefix": "off"}
        single = make_trainer(chat_model, tmp_path / "one" / mode, step_rows(12), peft_config=peft_config, **options)
        single.train()
        single.save_model()
        report = read_report(tmp_path / "two" / mode, backend)
        assert report["loss"] == pytest.approx(logged(single, "loss"), abs=1e-5), mode
        assert report["margins"] == pytest.approx(logged(single, "rewards/margins"), abs=1e-5), mode
        assert report["margins"][-1] > 1e-3  # something was learnt
        pairs = list(zip(*report["packs"], strict=True))  # what the two processes did at the same time
        assert any(one[0] != other[0] for one, other in pairs)
        assert all(one[1] == other[1] == max(one[0], other[0]) for one, other in pairs)
        one, two = (saved_weights(chat_model, tmp_path / folder / mode, mode == "lora") for folder in ("one", "two"))
        assert_same_weights(one, two, rtol=1e-4, atol=1e-6)
