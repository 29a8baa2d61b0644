"""A run killed many times and resumed gives the results of an uninterrupted one, without repeated requests."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from stepdpo_trl.pipeline.build import build

from ..distributed.launcher import run_script
from . import kill_pipeline

ROOT = Path(__file__).parents[2]


def start(path):
    """Start the run in a new interpreter, with worker processes that check the answers."""
    command = [sys.executable, "-m", "tests.pipeline.kill_pipeline", str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.mark.slow
def test_25_kills(tmp_path):
    kill_pipeline.run(tmp_path / "uninterrupted")
    whole = kill_pipeline.size(tmp_path / "uninterrupted")
    path = tmp_path / "killed"
    path.mkdir()
    rng = random.Random(0)
    stages = []
    for _ in range(2):  # with the worker processes; the other kills are in forks without them
        process = start(path)
        before = kill_pipeline.size(path)
        while process.poll() is None and kill_pipeline.size(path) < before + whole / 50:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            stages.append(kill_pipeline.last_stage(path))
        process.wait()
    done = run_script(kill_pipeline.__file__, path, "--kills", 23, "--size", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    stages += json.loads(done.stdout.splitlines()[-1])
    process = start(path)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    assert len(stages) >= 20, stages
    assert len(Counter(stages)) >= 3, stages  # kills in all pipeline stages
    for file in (tmp_path / "uninterrupted").glob("*.jsonl"):
        lines = [json.loads(line) for line in (path / file.name).read_text().splitlines()]
        assert len({line["key"] for line in lines}) == len(lines), file.name  # no request was repeated
        expected = [json.loads(line) for line in file.read_text().splitlines()]
        assert sorted(lines, key=str) == sorted(expected, key=str), file.name
    assert build([path]) == build([tmp_path / "uninterrupted"])


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.long)])
def test_kills_in_each_stage_against_a_server(tmp_path, kills):
    """Results are the same byte for byte. Answers arrive in any order, but none is stored twice."""
    pytest.importorskip("openai", reason="needs the extra openai")
    server = runpy.run_path(str(ROOT / "examples" / "benchmark_pipeline.py"))["simulated_server"]
    with server(slots=16, ms=0.05) as address:
        command = [sys.executable, "-m", "tests.pipeline.kill_server_run", str(tmp_path), address, str(kills)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = json.loads(done.stdout)
    assert all(number >= 0.75 * kills for number in killed.values()), killed
    names = {file.name for file in (tmp_path / "uninterrupted").glob("*.jsonl")}
    assert {file.name for file in (tmp_path / "killed").glob("*.jsonl")} == names
    for name in names:
        expected, found = ((tmp_path / folder / name).read_text() for folder in ("uninterrupted", "killed"))
        if name.startswith(("generations", "checks")):
            expected, found = (sorted(text.splitlines()) for text in (expected, found))
            assert len({json.loads(line)["key"] for line in found}) == len(found) > 40, name
        assert found == expected, name
    assert build([tmp_path / "killed"]) == build([tmp_path / "uninterrupted"])
