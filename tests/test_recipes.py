import json
import math
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from stepdpo_trl.train import parse_arguments

from .tiny import step_rows

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = {"prompt_suffix": "step-dpo", "max_length": 1024, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
# learning rate, beta, epochs, GPUs
SETTINGS = {
    "qwen2_7b": (5e-7, 0.5, 8, 8),
    "qwen2_7b_lora": (5e-6, 0.5, 8, 1),
    "qwen2_7b_qlora": (5e-6, 0.5, 8, 1),
    "qwen2_72b": (5e-7, 0.4, 4, 8),
}
ACCELERATE_CONFIGS = {
    "single_gpu": ("NO", 1, {}),
    "zero2": ("DEEPSPEED", 8, {"zero_stage": 2, "zero3_init_flag": False}),
    "zero3": ("DEEPSPEED", 8, {"zero_stage": 3, "zero3_init_flag": True, "offload_param_device": "none"}),
    "zero3_offload": (
        "DEEPSPEED",
        8,
        {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"},
    ),
    "fsdp2": ("FSDP", 8, {"fsdp_version": 2, "fsdp_reshard_after_forward": True}),
}


@pytest.fixture
def overrides(chat_model, tmp_path):
    """Command line that runs a recipe on a tiny model of its architecture, for two steps, on a CPU."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in step_rows(8)))
    options = {
        "model_name_or_path": chat_model,
        "dataset_name": pairs,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def test_every_recipe_is_tested():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == SETTINGS.keys()
    assert {path.stem for path in (RECIPES / "accelerate_configs").glob("*.yaml")} == ACCELERATE_CONFIGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    # bf16 is refused where there is no GPU
    argv = ["--config", str(RECIPES / f"{name}.yaml"), "--bf16", "false", "--use_cpu", "true"]
    (script, training, model, _, _), from_file, from_command_line = parse_arguments(argv)
    assert (from_file, from_command_line) == ([], [])
    learning_rate, beta, epochs, gpus = SETTINGS[name]
    assert (training.learning_rate, training.beta, training.num_train_epochs) == (learning_rate, beta, epochs)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 128
    assert {option: getattr(training, option) for option in PAPER} == PAPER
    assert script.dataset_name == "xinlai/Math-Step-DPO-10K"
    assert model.use_peft == ("lora" in name)
    assert model.load_in_4bit == ("qlora" in name)
    # read before the override
    assert yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["bf16"] is True


@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_on_a_tiny_model(name, overrides, tmp_path, monkeypatch):
    if name.endswith("qlora"):
        pytest.importorskip("bitsandbytes", reason="needs the extra quantization")
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
    config = ["--config", str(RECIPES / f"{name}.yaml")]
    monkeypatch.setattr(sys, "argv", ["qwen2_7b.py", *config * (name != "qwen2_7b"), *overrides])
    runpy.run_path(str(RECIPES / "qwen2_7b.py"), run_name="__main__")
    saved = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    assert (tmp_path / "out" / saved).is_file()


@pytest.mark.slow
def test_accelerate_launch(overrides, tmp_path):
    config = RECIPES / "accelerate_configs" / "single_gpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--cpu"]
    command += ["--mixed_precision", "no", str(RECIPES / "qwen2_7b.py"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Model saved to {tmp_path / 'out'}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_two_processes(name, overrides, tmp_path):
    """The optimizer updates float32 weights though the model is loaded in bfloat16, as the recipes say."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The configuration as shipped, with two processes instead of eight
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += [
        "--config_file",
        str(RECIPES / "accelerate_configs" / f"{name}.yaml"),
        "--main_process_port",
        str(port),
    ]
    command += [str(Path(__file__).parent / "distributed" / "recipe.py"), name, *overrides]
    changes = {"bf16": True, "dtype": "bfloat16", "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1}
    command += [str(part) for option, value in changes.items() for part in (f"--{option}", value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    loss = report.pop("loss")
    # In bfloat16, -40 would be rounded to the next 0.25. None: older TRL
    assert report.pop("type_of_log_probs") in ("torch.float32", None)
    assert report == {
        "distributed_type": ACCELERATE_CONFIGS[name][0],
        "processes": 2,
        "epochs": 2,  # a step is 2 rows x 2 accumulated x 2 processes, all the data
        "precomputed": True,
        "optimized_types": ["torch.float32"],
    }
    assert loss[0] == pytest.approx(math.log(2), abs=0.01)  # the policy is still the reference, up to bfloat16
    assert loss[1] < loss[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_accelerate_configs(name):
    path = RECIPES / "accelerate_configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    distributed_type, processes, options = ACCELERATE_CONFIGS[name]
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (
        distributed_type,
        processes,
        "bf16",
    )
    plugin = {**getattr(config, "deepspeed_config", {}), **getattr(config, "fsdp_config", {})}
    assert {option: plugin[option] for option in options} == options
    # The launcher takes each of them as an option of its own
    known = {action.dest for action in launch_command_parser()._actions}
    assert plugin.keys() <= known
