"""The benchmark of large data: its rows and its work, and memory that does not grow with the rows."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from stepdpo_trl.quickstart import MODEL_PATH

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_large_data.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_large_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows(script):
    """The lengths are those of Math-Step-DPO-10K: a prefix of 210 to 260 tokens and steps of 50 to 60."""
    rows = list(script.make_rows(200))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)

    def tokens(*columns):
        return np.mean([sum(len(tokenizer(row[name])["input_ids"]) for name in columns) for row in rows])

    assert 210 < tokens("prompt", "initial_reason_steps") < 270
    assert 50 < tokens("chosen") < 60
    assert 50 < tokens("rejected") < 60
    prompts = [row["prompt"] for row in rows]
    assert [prompts.count(prompt) for prompt in dict.fromkeys(prompts)] == [4] * 50


@pytest.mark.parametrize("work", ["stages", "stream"])
def test_work(script, tmp_path, work):
    script.write_rows(24, tmp_path)
    benchmark = script.Benchmark("StepDPOTrainer", 24, tmp_path)
    result = getattr(benchmark, work)()()
    if work == "stages":
        assert {stage.name: len(stage.dataset) for stage in result.trainer.stages} == {"stage 0": 12, "stage 1": 12}


@pytest.mark.long
def test_memory_does_not_grow_with_the_rows():
    """Work on 60,000 rows needs little more memory than on 10,000, and is not slower than DPOTrainer's."""
    options = ["--rows", "10000", "60000", "--dpo_rows", "10000"]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line.split() for line in done.stdout.splitlines()[1:]]
    found = {(int(rows), work, trainer): line for rows, work, trainer, *line in table}
    for work in script.WORK:
        small, large = (int(found[rows, work, "StepDPOTrainer"][-1]) for rows in (10_000, 60_000))
        assert large - small < 30, work
    for work in ("prepare", "stream"):
        own, stock = (float(found[10_000, work, trainer][1]) for trainer in ("StepDPOTrainer", "DPOTrainer"))
        assert own < 1.1 * stock, work
