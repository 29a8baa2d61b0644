"""Loop of pairs and training: order, interruptions, and two stages with the quickstart model."""

import contextlib
import json
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl.cli import train
from stepdpo_trl.cli.loop import _resume, merge_adapter
from stepdpo_trl.cli.main import main
from stepdpo_trl.pipeline.loop import MODEL, PAIRS, run_loop
from stepdpo_trl.quickstart import MODEL_PATH, make_problems
from stepdpo_trl.runs.run_directory import RunDirectory, RunError

CPU = ("--use_cpu", "true", "--bf16", "false")


class StoppedError(Exception):
    """An interruption."""


class Work:
    """Records the parts that it is asked to do, and stops before or after one of them."""

    def __init__(self, stop_at=None, after=False):
        self.asked, self.stop_at, self.after = [], stop_at, after

    def do(self, what, number, model, to):
        if len(self.asked) == self.stop_at and not self.after:
            raise StoppedError
        self.asked.append((what, number, model))
        to.mkdir() if what == "train" else to.write_text("")
        if len(self.asked) - 1 == self.stop_at and self.after:
            raise StoppedError

    def make_pairs(self, number, model, folder):
        self.do("pairs", number, model, folder / PAIRS)

    def train(self, number, model, folder):
        self.do("train", number, model, folder / MODEL)

    def run(self, out, stages=3, **settings):
        run_loop(out, "M0", stages, self.make_pairs, self.train, settings)


def expected(out, stages=3):
    models = ["M0", *(str(out / f"stage-{number}" / "model") for number in range(1, stages))]
    return [(what, n, model) for n, model in enumerate(models, start=1) for what in ("pairs", "train")]


def test_each_stage_uses_the_model_of_the_previous_one(tmp_path):
    work = Work()
    work.run(tmp_path)
    assert work.asked == expected(tmp_path)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stop_at", range(6))
def test_an_interrupted_loop_resumes(stop_at, after, tmp_path):
    """No part is done twice or left out."""
    first, second = Work(stop_at, after), Work()
    with pytest.raises(StoppedError):
        first.run(tmp_path)
    second.run(tmp_path)
    assert first.asked + second.asked == expected(tmp_path)


def test_stages_can_be_added_but_settings_cannot_change(tmp_path):
    Work().run(tmp_path, stages=2, seed=0)
    work = Work()
    work.run(tmp_path, stages=3, seed=0)
    assert work.asked == expected(tmp_path)[4:]
    with pytest.raises(RunError, match=r"was started with other settings:\n  seed: 0 in this run, 1 now\n"):
        Work().run(tmp_path, stages=3, seed=1)


def test_settings_are_written_after_the_first_pairs(tmp_path):
    """A failed first command can be corrected."""
    with pytest.raises(StoppedError):
        Work(stop_at=0).run(tmp_path, seed=0)
    work = Work()
    work.run(tmp_path, seed=1)
    assert work.asked == expected(tmp_path)


def test_one_process_at_a_time(tmp_path):
    with RunDirectory(tmp_path), pytest.raises(RunError, match="Another process"):
        Work().run(tmp_path)


def test_processes_of_a_killed_loop_keep_the_lock(tmp_path):
    """A training process that survives the loop may still write to the folder."""
    started = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], close_fds=False)"
    script = (
        "import sys; from pathlib import Path; from stepdpo_trl.pipeline.loop import run_loop\n"
        f"def work(*args):\n    print('at work', flush=True); {started}\n"
        "run_loop(Path(sys.argv[1]), 'M0', 1, work, work, {})"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        time.sleep(1)  # until the child process has started
        process.kill()
        process.wait()
        with pytest.raises(RunError, match=f"process {process.pid} or its children on "):
            Work().run(tmp_path)
        process.stdin.close()  # ends the child process
        for _ in range(100):
            with contextlib.suppress(RunError):
                Work().run(tmp_path)
                break
            time.sleep(0.1)
    assert (tmp_path / "stage-3" / "model").exists()


def test_a_failed_part_reports_how_to_continue(tmp_path, capfd):
    argv = [
        "loop",
        "--model",
        str(MODEL_PATH),
        "--output-dir",
        str(tmp_path / "out"),
        "--problems",
        str(tmp_path / "none.jsonl"),
    ]
    assert main([*argv, "--", *CPU]) == 2
    error = capfd.readouterr().err
    assert "There is no file" in error
    assert "stage-1: `stepdpo data` ended with status 2" in error
    assert f"remove {tmp_path / 'out' / 'stage-1'}" in error


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        (["--output-file", "x.jsonl"], [], "--output-file cannot be given"),
        ([], ["--dataset_name", "x"], "--dataset_name cannot be given"),
        ([], ["--output_dir=x"], "--output_dir cannot be given"),
        ([], ["--prompt_suffix", "step-dpo", *CPU], "word for word"),
        ([], ["--learning_rat", "1", *CPU], "Did you mean --learning_rate?"),
        (["--num-sampels", "3"], [], "--num-sampels is not a known argument. Did you mean --num-samples?"),
        (["--stages", "0"], [], "at least 1"),
        (["--base-url", "http://localhost:1/v1"], [], "would keep answering with the model that it has loaded"),
    ],
)
def test_invalid_options_are_refused_first(data, training, message, tmp_path, capsys):
    argv = [
        "loop",
        "--model",
        "M",
        "--output-dir",
        str(tmp_path / "out"),
        "--problems",
        "p.jsonl",
        *data,
        "--",
        *training,
    ]
    try:
        status = main(argv)
    except SystemExit as stopped:  # by argparse
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merged_adapter_equals_the_adapted_model(chat_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([tokenizer("What is 2 + 3?")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained(chat_model)
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged(ids).logits, plain(ids).logits, atol=1e-2)
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())


def test_training_resumes_from_the_last_complete_checkpoint(tmp_path):
    assert _resume(tmp_path) == []
    for number, content in ((2, '{"global_step": 2}'), (4, "{")):  # the second is truncated
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    assert _resume(tmp_path) == ["--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]


@pytest.mark.slow
def test_two_stages_with_adapters(tmp_path, monkeypatch, capfd):
    """All parts run in this process, which saves imports. test_cli launches a training."""

    def run(command):
        what, *argv = command[3:]
        return (main([what, *argv]) if what == "data" else train.main(argv)) or 0

    monkeypatch.setattr("stepdpo_trl.cli.loop.run_process", run)
    with (tmp_path / "problems.jsonl").open("w") as file:
        for problem in make_problems(24, "pairs"):
            file.write(json.dumps({"problem": problem.text, "answer": problem.answer}) + "\n")
    out = tmp_path / "loop"
    command = ["loop", "--model", str(MODEL_PATH), "--output-dir", str(out)]
    command += ["--stages", "2", "--problems", str(tmp_path / "problems.jsonl"), "--judge", "arithmetic"]
    command += ["--prompt", "plain", "--temperature", "1", "--top-p", "1", "--max-new-tokens", "160"]
    command += ["--", "--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", "--max_steps", "2", *CPU]
    command += ["--gradient_checkpointing", "false", "--report_to", "none"]
    assert main(command) == 0
    assert "2 stages done" in capfd.readouterr().out
    first = (out / "stage-1" / "pairs.jsonl").read_text()
    assert first != (out / "stage-2" / "pairs.jsonl").read_text()
    settings = json.loads((out / "stage-2" / "run" / "settings.jsonl").read_text().split("\n")[0])
    assert settings["model"]["model"] == str(out / "stage-1" / "model")
    weights = [AutoModelForCausalLM.from_pretrained(path) for path in (MODEL_PATH, *out.glob("stage-*/model"))]
    projections = [model.model.layers[0].self_attn.q_proj.weight for model in weights]
    assert all((one - other).abs().max() > 1e-5 for one, other in pairwise(projections))
