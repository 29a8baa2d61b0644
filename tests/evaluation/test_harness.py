"""What is handed over to lm-evaluation-harness, by a stand-in."""

import json
import random
import shutil
import sys
import types

import pytest
import torch

from stepdpo_trl.cli.main import main
from stepdpo_trl.evaluation import harness
from stepdpo_trl.generation import ModelSpec
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.run_directory import RunError


def stepdpo(*arguments):
    return main([str(argument) for argument in arguments])


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


GSM8K = ("exact_match,strict-match", "exact_match,flexible-extract")
MATH = ("exact_match,none", "math_verify,none")
H4 = {"arc_challenge": (25, 0.71), "hellaswag": (10, 0.88), "mmlu": (5, 0.66), "truthfulqa_mc2": (0, 0.71)}


def stand_in_harness(monkeypatch):
    """Puts a stand-in for lm-evaluation-harness 0.4.11 in place, and returns the calls of its `simple_evaluate`."""
    made = []

    def simple_evaluate(**arguments):
        made.append(arguments)
        (task,) = arguments["tasks"]
        value = H4.get(task, (0, 0.5))[1]
        # Each metric of the task another value, so that the wrong one is seen
        metrics = {"alias": task, "acc,none": value, "acc_stderr,none": 0.01}
        if task in ("arc_challenge", "hellaswag"):
            metrics |= {"acc,none": 0.1, "acc_norm,none": value, "acc_norm_stderr,none": 0.01}
        for metric in (
            "exact_match,strict-match",
            "exact_match,flexible-extract",
            "exact_match,none",
            "math_verify,none",
        ):
            metrics |= {metric: len(metric) / 100, metric.replace(",", "_stderr,"): "N/A"}
        sample = {"doc_id": 0, "target": 3, "filter": "none", "filtered_resps": [(-1.5, False)], "metrics": ["acc"]}
        samples = {task: [{**sample, "acc": 1.0, "doc": {"q": "?"}, "arguments": ["long"]}]}
        return {"results": {task: metrics}, "samples": samples, "date": random.random()}

    module = types.ModuleType("lm_eval")
    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setattr(harness, "version", lambda name: {"lm-eval": "0.4.11"}.get(name, "4.11.0"))
    return made


@pytest.fixture
def calls(monkeypatch):
    return stand_in_harness(monkeypatch)


def test_a_model_without_chat_and_another_tokenizer(tmp_path, calls):
    shutil.copytree(MODEL_PATH, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    command = ("eval", "--tasks", "gsm8k", "gsm8k", "--model", tmp_path / "base", "--tokenizer", tmp_path / "base")
    assert stepdpo(*command, "--output-dir", tmp_path / "out") == 0
    (call,) = calls
    assert call["model_args"]["tokenizer"] == str(tmp_path / "base")


def test_h4_is_handed_over(tmp_path, calls, capsys):
    command = ("eval", "--tasks", "h4", "--model", MODEL_PATH, "--limit", 8, "--output-dir", tmp_path)
    assert stepdpo(*command) == 0
    model = {"model": "hf", "model_args": {"pretrained": str(MODEL_PATH), "dtype": "auto"}}
    model |= (
        {"batch_size": "auto", "device": "cuda"} if torch.cuda.is_available() else {"batch_size": 1, "device": "cpu"}
    )
    assert calls == [
        {**model, "tasks": [t], "num_fewshot": shots, "limit": 8, "use_cache": str(tmp_path / f"answers.{t}")}
        for t, (shots, _) in H4.items()
    ]
    printed = capsys.readouterr().out
    assert "H4 (mean)" in printed
    assert "74.0%" in printed  # (0.71 + 0.88 + 0.66 + 0.71) / 4
    assert "88.0% ± 1.0%" in printed
    assert json.loads((tmp_path / "results.json").read_text())["h4"] == pytest.approx(0.74)
    kept = {"doc_id": 0, "target": 3, "filter": "none", "filtered_resps": [[-1.5, False]], "acc": 1.0}
    assert json.loads((tmp_path / "records.mmlu.jsonl").read_text()) == {"task": "mmlu", **kept}
    before = contents(tmp_path)
    assert stepdpo(*command) == 0
    assert len(calls) == 4  # nothing anew
    assert contents(tmp_path) == before
    assert stepdpo(*command[:-4], "--output-dir", tmp_path) == 2
    assert "limit=8 (now None)" in capsys.readouterr().err


def test_tasks_go_on(tmp_path, calls, monkeypatch):
    """What was done before a stop is not done again."""
    command = ("eval", "--tasks", "h4", "--model", MODEL_PATH, "--output-dir", tmp_path)
    answer = sys.modules["lm_eval"].simple_evaluate

    def stopped(**arguments):
        if arguments["tasks"] == ["mmlu"]:
            raise KeyboardInterrupt
        return answer(**arguments)

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", stopped)
    assert stepdpo(*command) == 130
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", answer)
    assert stepdpo(*command) == 0
    assert [call["tasks"] for call in calls] == [[task] for task in H4]


def test_a_metric_that_is_missing_is_said(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setitem(harness.HARNESS, "gsm8k", (harness.HarnessTask("mmlu", 5, ("acc_of_old,none",)),))
    assert stepdpo("eval", "--tasks", "gsm8k", "--model", MODEL_PATH, "--output-dir", tmp_path) == 2
    assert "0.4.11 does not report acc_of_old,none for mmlu" in capsys.readouterr().err


def test_standard_mathematics_is_handed_over(tmp_path, calls, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    command = ("eval", "--tasks", "gsm8k", "math", "--model", MODEL_PATH, "--adapter", tmp_path / "adapter")
    assert stepdpo(*command, "--batch-size", 4, "--output-dir", tmp_path / "out") == 0
    assert [(call["tasks"], call["num_fewshot"], call["batch_size"]) for call in calls] == [
        (["gsm8k"], 5, 4),
        (["minerva_math"], 4, 4),
    ]
    assert calls[0]["model_args"]["peft"] == str(tmp_path / "adapter")
    printed = capsys.readouterr().out
    for name, value in (("strict-match", "24.0%"), ("flexible-extract", "28.0%"), ("math_verify,none", "16.0%")):
        assert value in next(line for line in printed.splitlines() if name in line)


def test_other_back_ends_are_handed_over():
    server = ModelSpec("m", "openai", "http://localhost:8000/v1", max_concurrent_requests=7)
    assert harness.handed_over(server, None) == {
        "model": "local-completions",
        "model_args": {
            "model": "m",
            "base_url": "http://localhost:8000/v1/completions",
            "num_concurrent": 7,
            "tokenizer": "m",
        },
        "batch_size": 1,
    }
    assert harness.handed_over(ModelSpec("m", "vllm", dtype="bfloat16"), None) == {
        "model": "vllm",
        "model_args": {"pretrained": "m", "dtype": "bfloat16"},
        "batch_size": "auto",
    }
    with pytest.raises(RunError, match="OPENAI_API_KEY"):
        harness.handed_over(ModelSpec("m", "openai", "http://h/v1", api_key_env="KEY"), None)


def test_math_needs_its_grammar_before_anything_is_asked(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setattr(harness, "version", lambda name: "4.13.2")
    assert stepdpo("eval", "--tasks", "h4", "math", "--model", MODEL_PATH, "--output-dir", tmp_path / "out") == 2
    assert "pip install 'lm-eval[math]'" in capsys.readouterr().err
    assert calls == []
