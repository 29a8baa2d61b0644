"""Calls of lm-evaluation-harness, with a stand-in for the package."""

import json
import logging
import os
import random
import shutil
import sys
import types
from contextlib import ExitStack

import pytest
import torch

from stepdpo_trl.cli.main import main
from stepdpo_trl.evaluation import harness, harness_models
from stepdpo_trl.evaluation.evaluate import answers_name
from stepdpo_trl.generation import ModelSpec
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.run_directory import RunError

from ..fake_vllm import records


def stepdpo(*arguments):
    return main([str(argument) for argument in arguments])


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


GSM8K = ("exact_match,strict-match", "exact_match,flexible-extract")
MATH = ("exact_match,none", "math_verify,none")
TASKS = ("gsm8k", "minerva_math", "sciq", "arc_easy", "wikitext")
SUBTASKS = {"leaderboard_math_hard": ["leaderboard_math_algebra_hard", "leaderboard_math_geometry_hard"]}
H4 = {"arc_challenge": (25, 0.71), "hellaswag": (10, 0.88), "mmlu": (5, 0.66), "truthfulqa_mc2": (0, 0.71)}


def stand_in_harness(monkeypatch):
    """Install a stand-in for lm-evaluation-harness 0.4.11. Returns the list of calls of its `simple_evaluate`."""
    calls = []

    class TaskManager:
        all_tasks = sorted({*TASKS, *H4, *SUBTASKS, *SUBTASKS["leaderboard_math_hard"]})

    def simple_evaluate(**arguments):
        calls.append(arguments)
        (task,) = arguments["tasks"]
        assert task in TaskManager.all_tasks
        value = H4.get(task, (0, 0.5))[1]
        # Every metric has a different value, so that a wrong metric is noticed
        metrics = {"alias": task, "acc,none": value, "acc_stderr,none": 0.01}
        if task in ("arc_challenge", "hellaswag"):
            metrics |= {"acc,none": 0.1, "acc_norm,none": value, "acc_norm_stderr,none": 0.01}
        for metric in (*GSM8K, *MATH):
            metrics |= {metric: len(metric) / 100, metric.replace(",", "_stderr,"): "N/A"}
        if task == "wikitext":
            metrics = {"alias": task, "word_perplexity,none": 12.345678, "word_perplexity_stderr,none": "N/A"}
        results = {task: metrics}
        if task in SUBTASKS:  # a group without an aggregated metric, which is reported as a blank
            results = {task: {" ": " ", "alias": task}, **dict.fromkeys(SUBTASKS[task], metrics)}
        # The number of shots of a task that is configured with 0 cannot be changed
        shots = arguments["num_fewshot"] if task not in ("sciq", "truthfulqa_mc2") else 0
        n_shot = dict.fromkeys(SUBTASKS.get(task, [task]), shots)
        sample = {"doc_id": 0, "target": 3, "filter": "none", "filtered_resps": [(-1.5, False)], "metrics": ["acc"]}
        samples = {task: [{**sample, "acc": 1.0, "doc": {"q": "?"}, "arguments": ["long"]}]}
        return {"results": results, "samples": samples, "n-shot": n_shot, "date": random.random()}

    module, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    module.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(harness, "version", lambda name: {"lm-eval": "0.4.11"}.get(name, "4.11.0"))
    return calls


@pytest.fixture
def calls(monkeypatch):
    return stand_in_harness(monkeypatch)


def test_a_model_without_a_chat_template_and_with_another_tokenizer(tmp_path, calls):
    shutil.copytree(MODEL_PATH, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    command = ("eval", "--tasks", "gsm8k", "gsm8k", "--model", tmp_path / "base", "--tokenizer", tmp_path / "base")
    assert stepdpo(*command, "--output-dir", tmp_path / "out") == 0
    (call,) = calls
    assert call["model_args"]["tokenizer"] == str(tmp_path / "base")


def test_h4(tmp_path, calls, capsys):
    command = ("eval", "--tasks", "h4", "--model", MODEL_PATH, "--limit", 8, "--output-dir", tmp_path)
    assert stepdpo(*command) == 0
    model = {"model": "hf", "model_args": {"pretrained": str(MODEL_PATH), "dtype": "auto"}}
    model |= (
        {"batch_size": "auto", "device": "cuda"} if torch.cuda.is_available() else {"batch_size": 1, "device": "cpu"}
    )
    name = answers_name(ModelSpec(str(MODEL_PATH)))
    assert calls == [
        {**model, "tasks": [t], "num_fewshot": shots, "limit": 8, "use_cache": str(tmp_path / f"answers.{t}.{name}")}
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
    assert len(calls) == 4  # no new calls
    assert contents(tmp_path) == before
    assert stepdpo(*command[:-4], "--output-dir", tmp_path) == 2
    assert "limit: 8 in this run, None now" in capsys.readouterr().err


def test_finished_tasks_are_not_repeated(tmp_path, calls, monkeypatch):
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


def test_missing_metric(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setitem(harness.HARNESS, "gsm8k", (harness.HarnessTask("mmlu", 5, ("acc_of_old,none",)),))
    assert stepdpo("eval", "--tasks", "gsm8k", "--model", MODEL_PATH, "--output-dir", tmp_path) == 2
    assert "0.4.11 does not report acc_of_old,none for mmlu, but 0.4.11 does" in capsys.readouterr().err


def test_gsm8k_and_math(tmp_path, calls, capsys):
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


def test_arguments_of_other_inference_backends():
    server = ModelSpec("m", "openai", "http://localhost:8000/v1", max_concurrent_requests=7)
    assert harness_models.model_arguments(server, None) == {
        "model": "local-completions",
        "model_args": {
            "model": "m",
            "base_url": "http://localhost:8000/v1/completions",
            "num_concurrent": 7,
            "max_retries": 10,
            "timeout": 600,
            "tokenizer": "m",
            "tokenizer_backend": "huggingface",
        },
        "batch_size": 1,
    }
    assert harness_models.model_arguments(ModelSpec("m", revision="v2"), None)["model_args"]["revision"] == "v2"
    with pytest.raises(RunError, match="--revision v2 and --tokenizer t cannot be combined with --tasks"):
        harness_models.model_arguments(ModelSpec("m", revision="v2", tokenizer="t"), None)


@pytest.fixture
def server():
    pytest.importorskip("openai", reason="needs the extra openai")
    from ..generation.test_openai import Server

    server = Server()
    yield server
    server.http.shutdown()


@pytest.mark.parametrize(
    ("listed", "length"), [({"max_model_len": 777}, 777), ({"max_model_len": "?"}, None), ({}, None)]
)
def test_a_server_is_tested_and_asked_for_its_length(server, tmp_path, monkeypatch, caplog, listed, length):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("OWN_KEY", "sk-own")
    models = [{"id": "other", "object": "model", "max_model_len": 5}, {"id": "m", "object": "model", **listed}]
    server.models = (200, json.dumps({"object": "list", "data": models}).encode())
    with ExitStack() as resources:
        spec = ModelSpec("m", "openai", server.url, api_key_env="OWN_KEY")
        arguments = harness_models.connect(spec, None, tmp_path, resources)["model_args"]
        assert os.environ["OPENAI_API_KEY"] == "sk-own"  # where lm-evaluation-harness reads it
    assert os.environ["OPENAI_API_KEY"] == "sk-of-another-server"
    assert arguments.get("max_length") == length
    assert ("cuts few-shot prompts to 2,048 tokens" in caplog.text) == (length is None)
    assert [(path, authorization) for path, _, authorization in server.bodies] == [
        ("/v1/completions", "Bearer sk-own")
    ]


def test_the_environment_is_restored_without_a_key(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ExitStack() as resources:
        harness_models.connect(ModelSpec("m", "openai", server.url), None, tmp_path, resources)
        assert os.environ["OPENAI_API_KEY"] == ""
    assert "OPENAI_API_KEY" not in os.environ


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            lambda handler, body: handler.reply(307, b"", location="http://127.0.0.1:9/v1"),
            "It redirects to http://127.",
        ),
        ("401", "Set the environment variable OPENAI_API_KEY to a valid API key"),
    ],
)
def test_a_server_that_cannot_be_used(server, tmp_path, calls, capsys, reply, message):
    """lm-evaluation-harness, which would follow a redirect with the prompts, is not started."""
    server.script = [reply]
    command = ("eval", "--tasks", "gsm8k", "--model", "m", "--base-url", server.url, "--tokenizer", MODEL_PATH)
    assert stepdpo(*command, "--output-dir", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_errors_of_lm_eval_at_a_server(server, tmp_path, calls, monkeypatch, capsys):
    """Its handling of an HTTP error raises another one, which hides the first."""

    def fail(**arguments):
        try:
            raise LookupError("503, message='Service Unavailable'")
        except LookupError:
            raise UnboundLocalError("cannot access local variable 'outputs'")  # noqa: B904

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fail)
    command = ("eval", "--tasks", "gsm8k", "--model", "m", "--base-url", server.url, "--tokenizer", MODEL_PATH)
    assert stepdpo(*command, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "ended gsm8k with an error (LookupError: 503, message='Service Unavailable')" in error
    assert "rerun the same command to resume" in error


@pytest.mark.long
def test_tasks_with_vllm(tmp_path, calls, fake_vllm, monkeypatch):
    """One server with all GPUs, whose address lm-evaluation-harness receives. It has stopped afterwards."""
    pytest.importorskip("openai", reason="needs the extra openai")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    keys = []
    evaluate = sys.modules["lm_eval"].simple_evaluate

    def with_key(**arguments):
        keys.append(os.environ["OPENAI_API_KEY"])
        return evaluate(**arguments)

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", with_key)
    command = ("eval", "--tasks", "gsm8k", "arc_easy", "--model", MODEL_PATH, "--output-dir", tmp_path / "out")
    assert stepdpo(*command, "--backend", "vllm", "--vllm-args", "-tp 2") == 0
    (started,) = records(fake_vllm, "started")
    assert (started["gpus"], started["words"][-4:]) == ("0,1,2,3", ["-tp", "2", "--data-parallel-size", "2"])
    port = started["words"][started["words"].index("--port") + 1]
    assert [call["model"] for call in calls] == ["local-completions"] * 2
    assert calls[0]["model_args"] == {
        "model": str(MODEL_PATH),
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "num_concurrent": 512,
        "max_retries": 10,
        "timeout": 600,
        "tokenizer": str(MODEL_PATH),
        "tokenizer_backend": "huggingface",
        "max_length": 512,
    }
    assert {request["authorization"] for request in records(fake_vllm, "asked")} == {"Bearer none"}
    assert keys == ["", ""]


def test_math_needs_its_parser(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setattr(harness, "version", lambda name: "4.13.2")
    assert stepdpo("eval", "--tasks", "h4", "math", "--model", MODEL_PATH, "--output-dir", tmp_path / "out") == 2
    assert "pip install 'lm-eval[math]'" in capsys.readouterr().err
    assert calls == []


TASK = ("--model", MODEL_PATH, "--output-dir")


def test_tasks_of_the_harness(tmp_path, calls, capsys):
    """Any task of lm-evaluation-harness, with its configured shots and all metrics, can be combined with `gsm8k`."""
    command = ("eval", "--tasks", "wikitext", "leaderboard_math_hard", "gsm8k", *TASK, tmp_path)
    assert stepdpo(*command) == 0
    assert [(call["tasks"], call["num_fewshot"]) for call in calls] == [
        (["wikitext"], None),
        (["leaderboard_math_hard"], None),
        (["gsm8k"], 5),
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["wikitext", "0", "word_perplexity,none", "12.3457"] in lines  # not an accuracy, so not in percent
    for name in SUBTASKS["leaderboard_math_hard"]:
        assert [name, "0", "acc,none", "0.5000", "±", "0.0100"] in lines
    assert ["gsm8k", "5", "exact_match,strict-match", "24.0%"] in lines
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tasks"][0] == {"name": "wikitext", "shots": None, "metrics": []}
    assert results["results"]["wikitext"]["num_fewshot"] == {"wikitext": 0}
    assert results["results"]["wikitext"]["results"]["wikitext"]["word_perplexity,none"] == 12.345678


def test_num_fewshot(tmp_path, calls, capsys, caplog):
    command = ("eval", "--tasks", "arc_easy", "gsm8k", "--num-fewshot", 2, *TASK, tmp_path)
    assert stepdpo(*command) == 0
    assert [call["num_fewshot"] for call in calls] == [2, 2]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["arc_easy", "2", "acc,none", "0.5000", "±", "0.0100"] in lines
    assert ["gsm8k", "2", "exact_match,strict-match", "24.0%"] in lines
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_fewshot"] == 2
    assert [task["shots"] for task in results["tasks"]] == [2, 2]
    assert results["results"]["gsm8k"]["num_fewshot"] == {"gsm8k": 2}
    assert caplog.text == ""
    assert stepdpo(*command[:-5], 3, *TASK, tmp_path) == 2  # in the settings
    assert "num_fewshot" in capsys.readouterr().err


def test_a_number_of_shots_that_the_harness_fixes(tmp_path, calls, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        assert stepdpo("eval", "--tasks", "sciq", "--num-fewshot", 3, *TASK, tmp_path) == 0
    assert "sciq was evaluated with 0 few-shot examples instead of 3" in caplog.text
    assert ["sciq", "0", "acc,none"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["arc_esay"], "--tasks 'arc_esay' is not a task of lm-evaluation-harness 0.4.11. Did you mean 'arc_easy'?"),
        (["leaderboard_math_algebra"], "Did you mean 'leaderboard_math_algebra_hard' or 'leaderboard_math_hard' or "),
        (["gms8k"], "Did you mean 'gsm8k'?"),
        (["gsm8k", "zzzzzz"], "0.4.11. Pass one of h4, gsm8k, math, or a name that `lm-eval ls tasks` lists"),
        (["h4", "mmlu"], "contains mmlu twice, with different numbers of few-shot examples"),
    ],
)
def test_wrong_tasks(tasks, message, tmp_path, calls, capsys):
    assert stepdpo("eval", "--tasks", *tasks, *TASK, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_a_failed_first_attempt_does_not_lock_the_folder(tmp_path, calls, monkeypatch, capsys):
    evaluate = sys.modules["lm_eval"].simple_evaluate
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", lambda **arguments: int("no such model"))
    assert stepdpo("eval", "--tasks", "h4", "--dtype", "float16", *TASK, tmp_path) == 2
    assert "no such model" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", evaluate)
    assert stepdpo("eval", "--tasks", "gsm8k", *TASK, tmp_path) == 0
    # lm-eval looks answers up by prompt alone, so another model must not find those of an interrupted first attempt
    names = [answers_name(ModelSpec(str(MODEL_PATH), dtype=dtype)) for dtype in ("auto", "float16")]
    assert calls[-1]["use_cache"] == str(tmp_path / f"answers.gsm8k.{names[0]}")
    assert names[0] != names[1]
