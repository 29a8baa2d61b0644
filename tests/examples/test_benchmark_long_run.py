"""Long runs: nothing accumulates with the updates, nothing is left behind, and the benchmark reports it."""

import gc
import importlib.util
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from stepdpo_trl import SDPOCallback

from ..tiny import step_rows
from ..training import make_trainer

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_long_run.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_long_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CountObjects(TrainerCallback):
    """Counts the objects that the garbage collector knows, by type, at some updates."""

    def __init__(self, updates):
        self.updates, self.counts = updates, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.updates:
            gc.collect()
            self.counts.append(Counter(type(thing) for thing in gc.get_objects()))


@pytest.mark.parametrize("staged", [False, True])
def test_nothing_accumulates(staged, chat_model, tmp_path):
    """Between two updates, only the log and what the Trainer keeps of the two evaluations grow."""
    counter = CountObjects((10, 18))
    callbacks = [counter, *([SDPOCallback(fractions=[0.25, 0.75])] if staged else [])]
    options = {"eval_dataset": Dataset.from_list(step_rows(4)), "eval_strategy": "steps", "eval_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, "logging_steps": 4}
    options |= {"num_train_epochs": 9 if staged else 18, "per_device_train_batch_size": 8}
    make_trainer(chat_model, tmp_path, callbacks=callbacks, **options).train()
    grown = counter.counts[1] - counter.counts[0]
    own = {kind: count for kind, count in grown.items() if kind.__module__.startswith("stepdpo_trl")}
    assert not own
    assert grown[torch.Tensor] == grown[torch.nn.Parameter] == 0
    assert grown[dict] + grown[list] + grown[tuple] < 30


def test_leftovers(script, tmp_path, monkeypatch):
    """Files and processes that are left behind are found."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = script.leftovers()
    with (tmp_path / "kept.txt").open("w"), subprocess.Popen(["sleep", "60"]) as process:
        after = script.leftovers()
        process.kill()
    left = {kind: after[kind] - before[kind] for kind in after}
    assert [name.split(" ")[1] for name in left["open files"]] == [str(tmp_path / "kept.txt")]
    assert left["processes"] == {f"{process.pid} sleep"}
    assert left["temporary files"] == {str(tmp_path / "kept.txt")}
    assert not left["shared memory"]


@pytest.mark.parametrize(
    ("first", "last", "expected"), [(0.1, 0.1, "+0.0%"), (0.1, 0.105, "+5.0%"), (0.2, 0.1, "-50.0%")]
)
def test_line(script, first, last, expected):
    """Memory after a tenth and at the end, times of the second and the last tenth."""
    cpu = [0, 7, 7 + first, *[8] * 6, 9, 9 + last]
    records = [{"megabytes": 500 + number, "cpu": time, "wall": 3 * time} for number, time in enumerate(cpu)]
    found = {"records": records, "seconds to end": 1.25, "left": {"processes": ["7 worker"], "open files": []}}
    line = script.line("sDPO", "fork", script.summarize(found), tenth=10)
    milliseconds = [f"{100 * value:.1f}" for value in (first, last, 3 * first, 3 * last)]
    numbers = ["501.0", "510.0", "+1.8%", *milliseconds[:2], expected, *milliseconds[2:], expected, "1.2"]
    assert line.split() == ["sDPO", "fork", *numbers, "processes:", "7", "worker"]


@pytest.mark.long
@pytest.mark.parametrize(("trainer", "workers"), [("StepDPOTrainer", "0"), ("sDPO", "spawn")])
def test_long_run(script, trainer, workers):
    """Memory and CPU time per update are constant, and nothing is left behind. `make bench-long` trains longer."""
    numbers = script.summarize(script.measure(trainer, workers, updates=1000, every=50))
    first, last = numbers["memory"]
    assert last < 1.03 * first
    second, tenth = numbers["cpu"]
    assert tenth < 1.1 * second
    assert not numbers["left"]
