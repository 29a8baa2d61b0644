"""The benchmark of large runs: its synthetic run, and memory that does not grow with the answers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_store.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_store", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stages(script, tmp_path, monkeypatch, capsys):
    """The synthetic run is one of `collect`, and the later stages use it."""
    monkeypatch.setattr(script, "IMPORTS", ())

    def measure_here(arguments, stages):
        for stage in stages:
            yield stage, script.measure(script.Benchmark(tmp_path, 60, 20), stage)
            if stage == "make the run":
                made.update({file.name: file.read_text() for file in (tmp_path / "run").glob("*.jsonl")})
            elif stage.startswith("collect"):
                assert made == {file.name: file.read_text() for file in (tmp_path / "run").glob("*.jsonl")}

    made = {}
    monkeypatch.setattr(script, "measure_in_processes", measure_here)
    monkeypatch.setattr(sys, "argv", ["benchmark_store.py", "--folder", str(tmp_path)])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[2:]] == list(script.Benchmark(tmp_path, 60, 20).stages())

    solutions = read(tmp_path / "run" / "solutions.jsonl")
    assert len(solutions) == len({solution["key"] for solution in solutions}) == 60
    assert {solution["steps"] for solution in solutions} == {5}
    assert 900 < sum(len(solution["text"]) for solution in solutions) / 60 < 1200
    wrong = [solution["key"] for solution in solutions if solution["outcome"] == "wrong"]
    verdicts = {name: read(tmp_path / "run" / f"verdicts.{name}.jsonl") for name in ("arithmetic", "rollout")}
    assert 5 < len(wrong) < 25
    assert [verdict["key"] for verdict in verdicts["arithmetic"]] == wrong
    assert all(verdict["step"] for verdict in verdicts["arithmetic"])
    assert [verdict["key"] for verdict in verdicts["rollout"]] == wrong
    assert len(read(tmp_path / "run" / "corrections.arithmetic.jsonl")) == len(wrong)
    records = read(tmp_path / "eval" / "records.jsonl")
    assert len(records) == 20
    assert all(len(record["models"]["simulated"]["samples"]) == 3 for record in records)


@pytest.mark.long
def test_memory_does_not_grow_with_the_answers(tmp_path):
    """A stage over 100,000 answers needs little more memory than one over 10,000."""

    def measure(count):
        options = ["--answers", str(count), "--problems", str(count // 4), "--folder", str(tmp_path / str(count))]
        done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return {line[:24].strip(): int(line[42:49]) for line in done.stdout.splitlines()[2:]}

    small, large = measure(10_000), measure(100_000)
    for stage, megabytes in large.items():
        assert megabytes - small[stage] < 60, (stage, small[stage], megabytes)
