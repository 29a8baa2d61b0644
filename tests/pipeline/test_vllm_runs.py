"""Runs with servers that the fake `vllm` starts: what a run remembers, and commands that are interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("openai", reason="needs the extra openai")

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.answers import check_answer
from stepdpo_trl.data.prompts import StepPrompt
from stepdpo_trl.evaluation.evaluate import open_evaluation
from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.records import Problem
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.pipeline.stage_directory import StageDirectory
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.run_directory import RunError

from ..fake_vllm import leave_server, left_processes, records, session_of
from ..test_docs import RECIPES, commands

MODEL = str(MODEL_PATH)
RESULTS = ("generations.policy.jsonl", "solutions.jsonl", "checks.jsonl")


@pytest.fixture
def problems(tmp_path):
    """A file of problems whose answer is 42."""
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"problem": f"Problem {n}?", "answer": "42"}) + "\n" for n in range(6)))
    return str(file)


def collect(problems, run, *options):
    argv = ["collect", "--model", MODEL, "--backend", "vllm", "--problems", problems, "--output-dir", str(run)]
    return [*argv, "--num-samples", "2", *options]


def words_of(folder):
    return [record["words"] for record in records(folder, "started")]


class Checker:
    """Answer checker without worker processes."""

    def check(self, solutions, checker=None, stop=None):
        return [check_answer(problem["answer"], text) for problem, text in solutions]

    def __exit__(self, *error):
        pass


def test_a_run_remembers_vllm_and_its_arguments(fake_vllm, tmp_path):
    """Later stages start the same servers. Arguments for hardware may change, those that change answers may not."""
    run, problems = tmp_path / "run", [Problem(str(number), f"Problem {number}?", "42") for number in range(4)]
    prompt = StepPrompt("{{ problem }}", "Step 1:")

    def collect(vllm_args):
        with Session(checker=Checker()) as session:
            session.collect(
                run, problems, "p", ModelSpec(MODEL, "vllm", vllm_args=vllm_args), prompt, Sampling(), num_samples=2
            )

    def localize(**changes):
        with Session(checker=Checker()) as session:
            session.localize(run, "rollout", JudgeOptions(4), changes)

    collect("--quantization fp8 --tensor-parallel-size 1")
    localize(max_concurrent_requests=3)
    assert [words[-4:] for words in words_of(fake_vllm)] == [
        ["--quantization", "fp8", "--tensor-parallel-size", "1"]
    ] * 2
    with pytest.raises(RunError, match="--quantization fp8 there, --quantization awq now"):
        localize(vllm_args="--quantization awq")
    with pytest.raises(RunError, match=r"vllm_args: '--quantization fp8' in this run, '--quantization awq' now"):
        collect("--quantization awq")
    localize(vllm_args="--quantization fp8 --enforce-eager")  # complete, so no server starts
    assert len(words_of(fake_vllm)) == 2


@pytest.mark.long
def test_commands_remember_vllm(fake_vllm, problems, capsys, tmp_path):
    run = tmp_path / "run"
    assert main(collect(problems, run, "--vllm-args", "--quantization fp8 --tensor-parallel-size 1")) == 0
    assert main(["localize", str(run), "--judge", "rollout", "--num-rollouts", "4"]) == 0
    assert main(["rectify", str(run), "--vllm-args", "--max-num-seqs 2 --quantization fp8"]) == 0
    assert (run / "corrections.rollout.jsonl").read_text()
    tails = [words[-4:] for words in words_of(fake_vllm)]
    assert tails[:2] == [["--quantization", "fp8", "--tensor-parallel-size", "1"]] * 2
    assert tails[2] == ["--max-num-seqs", "2", "--quantization", "fp8"]
    assert len(words_of(fake_vllm)) == 3
    assert not left_processes(fake_vllm)

    for command in (
        ["localize", str(run), "--judge", "rollout", "--num-rollouts", "4", "--vllm-args", "--quantization awq"],
        collect(problems, run, "--vllm-args", "--quantization awq"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "--quantization fp8" in error
        assert "--quantization awq" in error
    # A complete stage starts no server
    assert main(collect(problems, run, "--vllm-args", "--quantization fp8 --enforce-eager")) == 0
    assert len(words_of(fake_vllm)) == 3


def test_dry_run_prints_the_command_lines(fake_vllm, problems, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    options = ("--vllm-args", "--enforce-eager", "--dry-run")
    assert main(["data", *collect(problems, tmp_path / "run", *options)[1:], "--output-file", "pairs.jsonl"]) == 0
    printed = capsys.readouterr().out
    for gpu in "01":
        assert f"\nCUDA_VISIBLE_DEVICES={gpu} vllm serve {MODEL} --host 127.0.0.1 --port PORT " in printed
    assert printed.count(" --enforce-eager\n") == 2
    assert not words_of(fake_vllm)


@pytest.mark.long
@pytest.mark.parametrize("failure", ["killed", "dead engine"])
def test_a_server_that_dies_ends_the_command(fake_vllm, problems, capsys, tmp_path, monkeypatch, failure):
    """The error has vLLM's message and no traceback. The same command resumes with the result of an unhurt run."""
    monkeypatch.setenv("FAKE_VLLM", failure)
    assert main(collect(problems, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "vLLM was killed by SIGKILL" in error or "The engine of vLLM died without a message" in error
    assert f"The log is {tmp_path / 'run' / 'vllm-0.log'}." in error
    assert "Traceback" not in error
    assert not left_processes(fake_vllm)
    answered = len((tmp_path / "run" / "generations.policy.jsonl").read_text().splitlines())
    assert 1 <= answered <= 3
    monkeypatch.delenv("FAKE_VLLM")
    asked = len(records(fake_vllm, "asked"))
    assert main(collect(problems, tmp_path / "run")) == 0
    assert len(records(fake_vllm, "asked")) == asked + 12 - answered
    assert main(collect(problems, tmp_path / "unhurt")) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "unhurt")


def contents(run):
    return {name: sorted((run / name).read_text().splitlines()) for name in RESULTS}


@pytest.mark.long
def test_servers_of_other_models_are_stopped(fake_vllm, tmp_path):
    """Only the models of the current stage run: they share the GPUs."""
    problems = [Problem(str(number), f"Problem {number}?", "42") for number in range(6)]
    policy, rectifier = ModelSpec(MODEL, "vllm"), ModelSpec(MODEL, "vllm", dtype="float32")
    with Session() as session:
        prompt = StepPrompt("{{ problem }}", "Step 1:")
        session.collect(tmp_path / "run", problems, "problems", policy, prompt, Sampling(), 2)
        session.localize(tmp_path / "run", "rollout", JudgeOptions())
        assert list(session.generators) == [policy]
        assert len(words_of(fake_vllm)) == 1  # both stages used the same server
        session.rectify(tmp_path / "run", rectifier=rectifier)
        assert list(session.generators) == [rectifier]
        first, second = records(fake_vllm, "started")
        assert not session_of(first["pid"])
        assert session_of(second["pid"])
    assert not left_processes(fake_vllm)


@pytest.mark.long
def test_the_other_address_of_a_run(fake_vllm, problems, capsys, tmp_path):
    """A run that was sampled with vLLM may continue at a server, and the other way round."""
    run = tmp_path / "run"
    assert main(collect(problems, run, "--vllm-args", "--quantization fp8")) == 0
    assert main(["localize", str(run), "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "Cannot connect to the server at http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert main(["localize", str(run), "--backend", "transformers", "--dry-run"]) == 0


@pytest.mark.long
def test_evaluation_of_an_adapter(fake_vllm, problems, tmp_path, capsys):
    """Model and baseline are served one after the other."""
    (tmp_path / "lora").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": MODEL, "r": 8}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    argv = ["eval", "--model", str(tmp_path / "lora"), "--baseline", MODEL, "--backend", "vllm"]
    argv += ["--problems", problems, "--output-dir", str(tmp_path / "eval"), "--max-new-tokens", "50"]
    assert main([*argv, "--vllm-args", "--max-num-seqs 4"]) == 0
    first, second = words_of(fake_vllm)
    assert "--enable-lora" in first
    assert "--enable-lora" not in second
    assert first[-2:] == second[-2:] == ["--max-num-seqs", "4"]
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert [sum(result["solutions"].values()) for result in results["results"]] == [6, 6]
    assert sorted(file.name for file in (tmp_path / "eval").glob("*.log")) == ["vllm-0.log"]


def start(argv, fake_vllm, failure):
    """Run a command in another process, until the server has received four requests."""
    environment = {**os.environ, "FAKE_VLLM": failure}
    process = subprocess.Popen(
        [sys.executable, "-m", "stepdpo_trl.cli.main", *argv],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored if the tests run under nohup
    )
    while len(records(fake_vllm, "asked")) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


@pytest.mark.long
@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT]],
    ids=["ctrl-c", "sigterm", "sighup", "twice"],
)
def test_interrupted_commands_stop_their_servers(fake_vllm, problems, tmp_path, signals):
    process = start(collect(problems, tmp_path / "run"), fake_vllm, "hangs")
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    for file in (tmp_path / "run").glob("*.pid"):  # after a second Ctrl-C
        file.unlink()
    assert not left_processes(fake_vllm)
    assert main(collect(problems, tmp_path / "run")) == 0


@pytest.mark.long
def test_the_next_command_stops_the_servers_of_a_killed_one(fake_vllm, problems, tmp_path, caplog):
    process = start(collect(problems, tmp_path / "run"), fake_vllm, "hangs")
    process.kill()
    process.communicate()
    left = left_processes(fake_vllm)
    assert len(left) == 2
    assert main(collect(problems, tmp_path / "run")) == 0
    assert "Stopping a vLLM server" in caplog.text
    assert not left_processes(fake_vllm)
    assert main(collect(problems, tmp_path / "uninterrupted")) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "uninterrupted")


def start_a_stage(folder):
    with StageDirectory(folder) as run:
        run.start_stage("collect", {})


def start_an_evaluation(folder):
    with open_evaluation(folder, {}):
        pass


@pytest.mark.parametrize("start", [start_a_stage, start_an_evaluation])
def test_commands_without_vllm_stop_the_servers_of_a_killed_one(fake_vllm, tmp_path, caplog, start):
    server = leave_server(MODEL, tmp_path)
    start(tmp_path)
    assert not session_of(server.process.pid)
    assert "Stopping a vLLM server" in caplog.text
    assert not (tmp_path / "vllm-0.pid").exists()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_loop_stops_its_servers(fake_vllm, problems, tmp_path, number):
    argv = ["loop", "--model", MODEL, "--problems", problems, "--output-dir", str(tmp_path / "loop")]
    argv += ["--backend", "vllm", "--vllm-args", "--enforce-eager", "--", "--use_cpu", "true", "--bf16", "false"]
    process = start(argv, fake_vllm, "hangs")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not left_processes(fake_vllm)
    assert words_of(fake_vllm)[0][-1] == "--enforce-eager"


@pytest.mark.long
def test_the_72b_pipeline_of_the_recipes(fake_vllm, problems, tmp_path, monkeypatch):
    """The commands of recipes/README.md use eight GPUs as two groups of four."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "Another problem?", "answer": "42"}))
    shutil.copytree(MODEL, tmp_path / "outputs" / "qwen2-72b-step-dpo")  # stands in for the training
    found = [words[1:] for words in commands(RECIPES) if "72b" in " ".join(words) and words[0] == "stepdpo"]
    assert [words[0] for words in found] == ["collect", "collect", "localize", "rectify", "build", "report", "eval"]
    for words in found:
        assert main([MODEL if word == "Qwen/Qwen2-72B-Instruct" else word for word in words]) == 0
    started = records(fake_vllm, "started")
    # collect, rectify and both models of eval: the wrong equations need no rollouts
    assert sorted(record["gpus"] for record in started) == ["0,1,2,3"] * 4 + ["4,5,6,7"] * 4
    assert all(record["words"][-3:] == ["4", "--max-model-len", "4096"] for record in started)
    assert len((tmp_path / "pairs-72b.jsonl").read_text().splitlines()) > 0


@pytest.mark.long
def test_shards(fake_vllm, problems, tmp_path):
    """Shards in one process share the server; with Ray, each worker starts its own."""
    pytest.importorskip("ray", reason="needs the extra ray")
    for index in range(2):
        assert main(collect(problems, tmp_path / "shards", "--shard", f"{index}/2")) == 0
    assert len(words_of(fake_vllm)) == 2
    argv = collect(problems, tmp_path / "ray", "--engine", "ray", "--shards", "2")
    done = subprocess.run([sys.executable, "-m", "stepdpo_trl.cli.main", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(words_of(fake_vllm)) == 4
    for index in range(2):
        folder = f"shard-{index}-of-2"
        assert contents(tmp_path / "ray" / folder) == contents(tmp_path / "shards" / folder)
        assert (tmp_path / "ray" / folder / "vllm-0.log").is_file()
    assert main(["localize", str(tmp_path / "shards"), "--judge", "rollout"]) == 0
    assert len(words_of(fake_vllm)) == 5
