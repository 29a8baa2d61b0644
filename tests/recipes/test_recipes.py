"""Settings of the recipes, short runs on a tiny model, and their accelerate configurations."""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from stepdpo_trl.cli.train import parse_arguments

from ..distributed.launcher import FOLDER, launch, run_script
from ..shared_prefix.vision_architectures import save_llava
from ..tiny import step_rows

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = {"prompt_suffix": "step-dpo", "max_length": 1024, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
# learning rate, beta, epochs, GPUs
SETTINGS = {
    "qwen2_7b": (5e-7, 0.5, 8, 8),
    "qwen2_7b_lora": (5e-6, 0.5, 8, 1),
    "qwen2_7b_qlora": (5e-6, 0.5, 8, 1),
    "qwen2_7b_step_sdpo": (5e-7, 0.5, 8, 8),
    "qwen2_72b": (5e-7, 0.4, 4, 8),
}
SOLAR_SETTINGS = {
    "solar_10_7b_sdpo": (5e-7, 0.01, 1, 8),
    "solar_10_7b_sdpo_lora": (5e-6, 0.01, 1, 1),
}
VISION = "qwen2_5_vl_7b"
# Recipes with their own script; the others run qwen2_7b.py
SCRIPTS = {
    "qwen2_7b_step_sdpo": "qwen2_7b_step_sdpo.py",
    **dict.fromkeys(SOLAR_SETTINGS, "solar_10_7b_sdpo.py"),
}
# Rows with the columns of the datasets on the Hub
HUB = {
    ("Intel/orca_dpo_pairs", "train"): [
        {
            "system": "You are an AI assistant." if i % 2 else "",
            "question": f"What is {i} + 1?",
            "chosen": f"It is {i + 1}.",
            "rejected": f"It is {i + 2}, I think.",
        }
        for i in range(8)
    ],
    ("allenai/ultrafeedback_binarized_cleaned", "train_prefs"): [
        {
            "source": "flan_v2_cot",
            "prompt": f"Spell {i}.",
            "prompt_id": f"{i:064x}",
            "chosen": [{"content": f"Spell {i}.", "role": "user"}, {"content": "o" * i, "role": "assistant"}],
            "rejected": [{"content": f"Spell {i}.", "role": "user"}, {"content": "e" * i, "role": "assistant"}],
            "messages": [{"content": f"Spell {i}.", "role": "user"}, {"content": "o" * i, "role": "assistant"}],
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        }
        for i in range(1, 7)
    ],
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
    """Command-line options that run a recipe for two steps on a tiny model on CPU."""
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


@pytest.fixture
def _hub(monkeypatch):
    """Replace the datasets of the Hub by a few rows of each."""

    def load_dataset(path, split, **options):
        return Dataset.from_list(HUB[path, split])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def run_recipe(monkeypatch, name, *options):
    """Run a recipe's script in this process."""
    script = SCRIPTS.get(name, "qwen2_7b.py")
    # A script loads the recipe with its own name by default
    config = [] if Path(script).stem == name else ["--config", str(RECIPES / f"{name}.yaml")]
    monkeypatch.setattr(sys, "argv", [script, *config, *options])
    runpy.run_path(str(RECIPES / script), run_name="__main__")


def test_every_recipe_is_tested():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*SETTINGS, *SOLAR_SETTINGS, VISION}
    assert {path.name for path in RECIPES.glob("*.py")} == {"qwen2_7b.py", *SCRIPTS.values()}
    assert {path.stem for path in (RECIPES / "accelerate_configs").glob("*.yaml")} == ACCELERATE_CONFIGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    # bf16 raises an error without a GPU
    argv = ["--config", str(RECIPES / f"{name}.yaml"), "--bf16", "false", "--use_cpu", "true"]
    (script, training, model, _, sdpo), from_file, from_command_line = parse_arguments(argv)
    assert (from_file, from_command_line) == ([], [])
    learning_rate, beta, epochs, gpus = SETTINGS[name]
    assert (training.learning_rate, training.beta, training.num_train_epochs) == (learning_rate, beta, epochs)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 128
    assert {option: getattr(training, option) for option in PAPER} == PAPER
    assert script.dataset_name == "xinlai/Math-Step-DPO-10K"
    assert model.use_peft == ("lora" in name)
    assert model.load_in_4bit == ("qlora" in name)
    assert sdpo.sdpo == ("sdpo" in name)
    # the value in the file, which the command line above overrides
    assert yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["bf16"] is True


@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_on_a_tiny_model(name, overrides, tmp_path, monkeypatch):
    if name.endswith("qlora"):
        pytest.importorskip("bitsandbytes", reason="needs the extra quantization")
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
    run_recipe(monkeypatch, name, *overrides)
    saved = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    assert (tmp_path / "out" / saved).is_file()
    if "sdpo" in name:
        assert [rows for rows, _ in stages(tmp_path / "out", saved)] == [4, 4]


def stages(folder, saved, tolerance=1e-4):
    """Return rows and beta of each stage; check that each was trained for two optimizer steps and saved."""
    report = json.loads((folder / "sdpo_report.json").read_text())["stages"]
    for stage in report:
        assert stage["updates"] == 2
        assert stage["first_batch"]["loss"] == pytest.approx(math.log(2), abs=tolerance)
        assert (folder / stage["folder"] / saved).is_file()
    return [(stage["rows"], stage["beta"]) for stage in report]


@pytest.mark.parametrize("name", SOLAR_SETTINGS)
def test_solar_settings(name):
    argv = ["--config", str(RECIPES / f"{name}.yaml"), "--bf16", "false", "--use_cpu", "true"]
    (_, training, model, data, sdpo), from_file, from_command_line = parse_arguments(argv)
    assert (from_file, from_command_line) == ([], [])
    learning_rate, beta, epochs, gpus = SOLAR_SETTINGS[name]
    assert (training.learning_rate, training.beta, training.num_train_epochs) == (learning_rate, beta, epochs)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 128
    assert [(part.path, part.split) for part in data.datasets] == list(HUB)
    assert (sdpo.sdpo, sdpo.stage_schedule, training.precompute_ref_log_probs) == (True, "restart", True)
    assert model.use_peft == ("lora" in name)


@pytest.mark.usefixtures("_hub")
@pytest.mark.parametrize("name", SOLAR_SETTINGS)
def test_two_steps_per_stage_of_solar(name, overrides, tmp_path, monkeypatch):
    run_recipe(monkeypatch, name, *overrides, "--dataset_name", "")
    saved = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    assert stages(tmp_path / "out", saved) == [(8, 0.01), (6, 0.01)]


def test_vision_settings():
    options = ["--dataset_name", "me/pairs", "--bf16", "false", "--use_cpu", "true"]
    (_, training, model, _, sdpo), from_file, from_command_line = parse_arguments(
        ["--config", str(RECIPES / f"{VISION}.yaml"), *options]
    )
    assert (from_file, from_command_line, sdpo.sdpo) == ([], [], False)
    assert (training.learning_rate, training.beta, training.num_train_epochs) == (5e-6, 0.4, 4)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
    assert (training.max_length, training.overlong_prefix, training.precompute_ref_log_probs) == (4096, "drop", True)
    with torch.device("meta"):
        modules = dict(AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen2_5_vl")).named_modules())
    adapted = {name for name in modules if re.fullmatch(model.lora_target_modules, name)}
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in adapted} == kinds
    assert not any("visual" in name for name in adapted)
    assert all(isinstance(modules[name], torch.nn.Linear) for name in adapted)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_steps_with_images(mode, overrides, tmp_path, monkeypatch):
    """The script loads the processor of the model, and trains on images from paths in a file."""
    for number, size in enumerate([(16, 16), (40, 24)]):
        Image.effect_noise(size, 90).save(tmp_path / f"{number}.png")
    pairs = tmp_path / "pairs.jsonl"
    rows = [{**row, "images": [str(tmp_path / f"{i % 2}.png")] * (i % 3)} for i, row in enumerate(step_rows(8))]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model_name_or_path": save_llava(tmp_path / "llava"), "use_peft": mode == "lora"}
    argv = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    run_recipe(monkeypatch, VISION, *overrides, *argv)
    saved = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    with safe_open(tmp_path / "out" / saved, "pt") as file:
        names = list(file.keys())
    assert ("vision" in " ".join(names)) == (mode == "full")
    assert (tmp_path / "out" / "processor_config.json").is_file()


def test_solar_conversion():
    convert = runpy.run_path(str(RECIPES / "solar_10_7b_sdpo.py"))["convert"]
    orca, ultrafeedback = (convert(Dataset.from_list(rows)) for rows in HUB.values())
    assert orca.features == ultrafeedback.features
    user = {"role": "user", "content": "What is 0 + 1?"}
    answers = [[{"role": "assistant", "content": text}] for text in ("It is 1.", "It is 2, I think.")]
    assert orca[0] == {"prompt": [user], "chosen": answers[0], "rejected": answers[1]}
    assert orca[1]["prompt"] == [
        {"role": "system", "content": "You are an AI assistant."},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    assert ultrafeedback[2] == {
        "prompt": [{"role": "user", "content": "Spell 3."}],
        "chosen": [{"role": "assistant", "content": "ooo"}],
        "rejected": [{"role": "assistant", "content": "eee"}],
    }


def test_early_errors_come_first():
    convert = runpy.run_path(str(RECIPES / "qwen2_7b_step_sdpo.py"))["early_errors_first"]
    rows = [{"initial_reason_steps": steps} for steps in ("abcd", None, "ab", "abcde")]
    assert convert(Dataset.from_list(rows))["stage"][:] == [2, 1, 1, 2]


@pytest.mark.slow
def test_accelerate_launch(overrides, tmp_path):
    config = RECIPES / "accelerate_configs" / "single_gpu.yaml"
    options = ["--config_file", str(config), "--cpu", "--mixed_precision", "no"]
    done = run_script(RECIPES / "qwen2_7b.py", *overrides, accelerate=options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Model saved to {tmp_path / 'out'}" in done.stdout


def two_processes(recipe, name, overrides):
    """Return the arguments of `launch` that run a recipe in bfloat16 on two processes instead of eight."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    changes = {"bf16": True, "dtype": "bfloat16", "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1}
    options = [str(part) for option, value in changes.items() for part in (f"--{option}", value)]
    config = RECIPES / "accelerate_configs" / f"{name}.yaml"
    return config, FOLDER / "recipe.py", name, RECIPES / recipe, *overrides, *options


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_two_processes(name, overrides, tmp_path):
    """The optimizer updates float32 weights although the model is loaded in bfloat16, as the recipes say."""
    launch(*two_processes("qwen2_7b.py", name, overrides), options=("--num_processes", "2"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    loss = report.pop("loss")
    # bfloat16 would round -40 to the next 0.25. None: older TRL
    assert report.pop("type_of_log_probs") in ("torch.float32", None)
    assert report == {
        "distributed_type": ACCELERATE_CONFIGS[name][0],
        "processes": 2,
        "epochs": 2,  # an optimizer step is 2 rows x 2 accumulated x 2 processes: all the data
        "precomputed": True,
        "optimized_types": ["torch.float32"],
    }
    assert loss[0] == pytest.approx(math.log(2), abs=0.01)  # the policy still equals the reference, up to bfloat16
    assert loss[1] < loss[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_stages_on_two_processes(overrides, tmp_path):
    """Runs the real `accelerate launch` with new interpreters. The other tests fork their processes."""
    config, *script = map(str, two_processes("qwen2_7b_step_sdpo.py", "zero3", overrides))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([*command, "--config_file", config, *script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # A bfloat16 row scored in one batch and trained in another differs by a tenth of a nat, times beta = 0.5
    assert [rows for rows, _ in stages(tmp_path / "out", "model.safetensors", tolerance=0.05)] == [4, 4]


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
    # Each key is also an option of the launcher
    known = {action.dest for action in launch_command_parser()._actions}
    assert plugin.keys() <= known
