"""Shards on a local Ray cluster give the same results as a single process."""

import json

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.pipeline.build import build, run_directories
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.ray import run_on_ray
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.quickstart import MODEL_PATH, make_problems
from stepdpo_trl.runs.log import Log, RunError

from ..simulated import Student, draw_records

MODEL = ModelSpec("student")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def shards(path):
    return [(path / f"shard-{index}-of-2", (index, 2)) for index in range(2)]


def work(session, folder, shard):
    session.generators[MODEL] = Student()
    session.collect(
        folder, draw_records(20), "drawn", MODEL, STEP_PROMPTS["plain"], Sampling(1.0, 1.0, 256), 2, shard=shard
    )
    session.localize(folder, "rollout", JudgeOptions())
    return session.rectify(folder)


@pytest.mark.slow
def test_shards_on_ray(tmp_path):
    done = run_on_ray(work, shards(tmp_path / "parts"))
    with Session() as session:
        counts = work(session, tmp_path / "whole", (0, 1))
    assert sum(row["counts"]["pairs"] for row in done) == counts["pairs"] > 0
    parts, whole = build(run_directories(tmp_path / "parts"))[0], build([tmp_path / "whole"])[0]
    assert sorted(map(json.dumps, parts)) == sorted(map(json.dumps, whole))


@pytest.mark.slow
def test_command_line_on_ray(tmp_path, capfd):
    """Two shards give the same solutions and the same error message as a single process, with the user's checker."""
    code = "def check(problem, solution):\n    return None if 'boxed' not in solution else problem['odd']\n"
    (tmp_path / "own.py").write_text(code)
    problems = [{"problem": one.text, "odd": n % 2 == 1} for n, one in enumerate(make_problems(6, "pairs"))]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    model = ["--model", str(MODEL_PATH), "--prompt", "plain", "--max-new-tokens", "160"]
    task = ["--checker", f"{tmp_path / 'own.py'}:check", "--steps", "label"]
    collect = ["collect", *model, "--problems", str(tmp_path / "problems.jsonl"), *task]
    ray = ["--engine", "ray", "--shards", "2"]
    assert main([*collect, "--output-dir", str(tmp_path / "parts"), *ray]) == 0
    assert main([*collect, "--output-dir", str(tmp_path / "whole")]) == 0
    parts = [Log(folder / "solutions.jsonl") for folder, _ in shards(tmp_path / "parts")]
    assert [len(part) for part in parts] == [6, 6]
    for part, outcome in zip(parts, ("wrong", "right"), strict=True):  # the second shard has the odd numbers
        assert {record["outcome"] for record in part.values()} <= {outcome, "unreadable"}
    assert {**parts[0], **parts[1]} == dict(Log(tmp_path / "whole" / "solutions.jsonl"))
    capfd.readouterr()
    assert main([*collect, "--output-dir", str(tmp_path / "parts"), *ray, "--seed", "1"]) == 2
    error = capfd.readouterr().err.partition("stepdpo collect: error: ")[2]
    shard = tmp_path / "parts" / "shard-0-of-2"
    assert error.startswith(f"`collect` in {shard} was started with other settings:\n  seed: 0 in this run, 1 now\n")
    assert error.count("was started with other settings") == 2  # one for each shard


@pytest.mark.slow
def test_error_in_one_shard_leaves_the_others(tmp_path, capsys):
    def work(session, folder, shard):
        if shard[0] == 0:
            raise ValueError("It is wrong here.")
        return {"solutions": 3}

    with pytest.raises(RunError, match=r"^It is wrong here\.$"):
        run_on_ray(work, shards(tmp_path))
    assert "shard-1-of-2: 3 solutions" in capsys.readouterr().out
