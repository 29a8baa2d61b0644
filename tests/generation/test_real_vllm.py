"""The whole life of a run with a real vLLM, on GPUs or on a CPU, with the quickstart's model. Takes minutes."""

import json
import os
import shutil
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("openai", reason="needs the extra openai")

from stepdpo_trl.cli.main import main
from stepdpo_trl.quickstart import MODEL_PATH, make_problems

# Path of the command `vllm`, if it is not on PATH. It may be in another virtual environment
VLLM = os.environ.get("VLLM_EXECUTABLE") or shutil.which("vllm")
CPU_FEATURES = "avx512f"  # without it, vLLM takes hours on a CPU
# A seeded request ends the engine of vLLM 0.32 for CPUs with chunked prefill
ON_CPU = " --no-enable-chunked-prefill"


def reason_to_skip():
    if VLLM is None:
        return "needs a command vllm on PATH, or its path in VLLM_EXECUTABLE"
    cpu = Path("/proc/cpuinfo")
    if not torch.cuda.is_available() and not (cpu.is_file() and CPU_FEATURES in cpu.read_text()):
        return f"needs a GPU, or a CPU with {CPU_FEATURES}"
    return None


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    """Arguments of vLLM. All of its processes have ended after the test."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    monkeypatch.setenv("PATH", str(Path(VLLM).absolute().parent), prepend=os.pathsep)
    monkeypatch.delenv("OMP_NUM_THREADS")  # set for the other tests
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield "--enforce-eager --max-num-seqs 32" + ("" if torch.cuda.is_available() else ON_CPU)
    assert not processes_in(tmp_path)
    assert not list(tmp_path.rglob("*.pid"))


def processes_in(folder):
    """Return the processes whose working directory is a folder, apart from this one and its answer checkers."""
    found = [process for process in psutil.process_iter(["cwd", "cmdline"]) if process.info["cwd"] == str(folder)]
    return [p for p in found if p.pid != os.getpid() and "multiprocessing" not in " ".join(p.info["cmdline"])]


@pytest.fixture
def problems(tmp_path):
    """A file of problems of the quickstart."""
    drawn = make_problems(16, "held_out")
    lines = [json.dumps({"problem": problem.text, "answer": problem.answer}) for problem in drawn]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "problems.jsonl")


def texts(folder):
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [[row["models"][name]["samples"][0]["text"] for row in rows] for name in rows[0]["models"]]


@pytest.mark.long
def test_collect_localize_and_rectify(arguments, problems, tmp_path, capsys):
    run = str(tmp_path / "run")
    vllm = ["--model", str(MODEL_PATH), "--backend", "vllm", "--vllm-args", arguments]
    sampling = ["--prompt", "plain", "--temperature", "1", "--top-p", "1", "--max-new-tokens", "96"]
    command = ["collect", *vllm, *sampling, "--problems", problems, "--output-dir", run, "--num-samples", "4"]
    assert main(command) == 0
    assert main(["localize", run, "--judge", "rollout"]) == 0
    assert main(["rectify", run]) == 0
    printed = capsys.readouterr().out
    assert " 0 right" not in printed
    assert " 0 pairs" not in printed
    assert "unreadable" not in printed  # a doubled or missing BOS, or a wrong prompt, would confuse the model

    rejected = ["--vllm-args", f"{arguments} --max-model-len 9999999"]
    assert main(["localize", run, "--judge", "rollout", "--num-rollouts", "9", *rejected]) == 2
    error = capsys.readouterr().err
    assert "User-specified max_model_len (9999999) is greater than the derived max_model_len" in error
    assert "Traceback" not in error


@pytest.mark.long
def test_greedy_answers_are_those_of_transformers(arguments, problems, tmp_path):
    """Of the model, and of an adapter that changes its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=12, lora_alpha=24, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_PATH), config)
    adapted.save_pretrained(tmp_path / "lora")
    command = ["eval", "--model", str(tmp_path / "lora"), "--baseline", str(MODEL_PATH), "--dtype", "float32"]
    command += ["--prompt", "plain", "--max-new-tokens", "96", "--problems", problems, "--output-dir"]
    assert main([*command, str(tmp_path / "vllm"), "--backend", "vllm", "--vllm-args", arguments]) == 0
    assert main([*command, str(tmp_path / "transformers")]) == 0
    served, expected = texts(tmp_path / "vllm"), texts(tmp_path / "transformers")
    assert sum(pair[0] != pair[1] for pair in zip(*expected, strict=True)) >= 4
    for found, right in zip(served, expected, strict=True):
        # Rounding may decide between two tokens that are about equally likely
        assert sum(pair[0] == pair[1] for pair in zip(found, right, strict=True)) >= 15
