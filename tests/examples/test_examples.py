"""Short runs of the example scripts. The quickstart is tested in tests/quickstart."""

import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stepdpo_trl.quickstart import MODEL_PATH, PAIRS_PATH, make_problems, write_solution
from stepdpo_trl.runs.tasks import Ask

from ..distributed.launcher import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_lora_smollm2(chat_model, tmp_path):
    options = ["--model_name_or_path", chat_model, "--dataset", PAIRS_PATH, "--max_steps", 2, "--output_dir", tmp_path]
    done = run_script(EXAMPLES / "lora_smollm2.py", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out rewards/margins         0.0000 -> " in done.stdout
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16


def test_make_quickstart_model(monkeypatch):
    """Checks that the tokenizer equals the shipped one, after a single update instead of 15 minutes of training."""
    script = runpy.run_path(str(EXAMPLES / "make_quickstart_model.py"))
    monkeypatch.setitem(script["pretrain"].__globals__, "UPDATES", 1)
    model, tokenizer = script["pretrain"](seed=0)
    shipped = json.loads((MODEL_PATH / "tokenizer.json").read_text())
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == shipped["model"]
    assert model.config.vocab_size == len(tokenizer)


def test_students_make_the_documented_mistakes():
    script = runpy.run_path(str(EXAMPLES / "make_quickstart_model.py"))
    rng = script["random"].Random(0)
    problems = [problem for problem in make_problems(200, "corpus", 2) if problem.operators == ("+", "*")]
    # Students notice a mistake whose result exceeds 60
    problems = [problem for problem in problems if problem.work(0).value_at(0) <= 60] * 10
    assert len(problems) > 500
    wrong = sum(script["student_solution"](rng, problem) != write_solution(problem) for problem in problems)
    assert wrong / len(problems) == pytest.approx(0.7, abs=0.06)


def test_vision_steps(monkeypatch, tmp_path, capsys):
    """Two updates instead of minutes of training, and pairs from the students' solutions."""
    script = runpy.run_path(str(EXAMPLES / "vision_steps.py"))
    solve, rng = script["solve"], script["random"].Random(0)

    def solve_like_students(model, processor, problems, sampled=False):
        assert len(solve(model, processor, problems[:4], sampled)) == 4
        return [problem.steps(rng) for problem in problems]

    names = script["main"].__globals__
    monkeypatch.setitem(names, "solve", solve_like_students)
    options = {"updates": 2, "problems": 20, "held_out": 8, "epochs": 1, "output_dir": tmp_path}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["vision_steps.py", *words])
    script["main"]()
    out = capsys.readouterr().out
    pairs, problems = re.search(r"(\d+) step pairs from (\d+) problems", out).groups()
    assert 5 < int(pairs) <= 40
    assert problems == "20"
    assert out.count(" on 8 held-out images") == 2


def test_bar_charts():
    script = runpy.run_path(str(EXAMPLES / "vision_steps.py"))
    problem = script["Problem"](("red", "blue", "green", "yellow"), (4, 3, 5, 1), ("blue", "green"))
    assert problem.text == "What is blue + green?"
    assert problem.steps() == [" blue 3", " green 5", " 3 + 5 = 8"]
    pixels, colors = np.asarray(problem.draw()), script["COLORS"]
    rows_with = [(pixels == colors[name]).all(-1).any(1).sum() for name in problem.colors]
    assert [rows // script["UNIT"] for rows in rows_with] == [4, 3, 5, 1]
    wrong = [[" blue 4", " green 5", " 4 + 5 = 9"], [" blue 3", " green 4", " 3 + 4 = 7"]]
    rows = script["make_pairs"]([problem], [[problem.steps(), *wrong]])
    assert [(row["initial_reason_steps"], row["chosen"], row["rejected"]) for row in rows] == [
        ("Step 1:", " blue 3", " blue 4"),
        ("Step 1: blue 3\nStep 2:", " green 5", " green 4"),
    ]
    read = script["STEPS"].fullmatch
    assert read(script["write"](problem.steps())).groups() == tuple(problem.steps())
    assert not read("Step 1:\nStep 2: green 5\nStep 3: 3 + 5 = 8")  # an empty step


def test_bar_charts_have_the_same_tokens_in_training_and_sampling():
    script = runpy.run_path(str(EXAMPLES / "vision_steps.py"))
    _, processor = script["make_model"](hidden_size=8)
    problem = next(script["draw_problems"](0))
    steps = problem.steps()
    whole, prompt = (
        script["make_inputs"](processor, [problem], [text])["input_ids"][0].tolist()
        for text in (script["write"](steps), script["prefix_of"]([]))
    )
    assert whole[: len(prompt)] == prompt
    assert processor.tokenizer.decode(whole[len(prompt) :]) == script["write"](steps).removeprefix("Step 1:")


@pytest.mark.long
def test_benchmark_samples():
    """Seeds are fixed. With the default of 60 problems the two shares are 0.356 and 0.207."""
    done = run_script(EXAMPLES / "benchmark_samples.py", "--problems", 4)
    assert done.returncode == 0, done.stderr[-3000:]

    def figure(pattern):
        return float(re.search(pattern, done.stdout)[1])

    assert 0 < figure(r"rollouts, binary search .*: ([\d.]+)") <= 0.40
    assert figure(r"same verdict .* ([\d.]+)%") >= 80
    assert 0 < figure(r"samples, in rounds .*: ([\d.]+)") <= 0.50
    assert figure(r"samples, in rounds .* yield (\d+)") == figure(r"samples, flat .* yield (\d+)") > 0


def test_benchmark_pipeline():
    """A short run of each stage. Shares of busy slots need longer ones."""
    pytest.importorskip("openai", reason="needs the extra openai")
    command = [sys.executable, str(EXAMPLES / "benchmark_pipeline.py"), "--slots", "8", "--ms", "0.05"]
    done = subprocess.run([*command, "--problems", "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows = done.stdout.splitlines()
    setting, figures = ["slots", "ms/token", "tail", "problems", "samples"], ["seconds", "busy", "bound", "half"]
    assert head.split() == [*setting, "stage", "answers", *figures]
    pattern = r"    8      0\.05     0%        10        2  (\S.*?) +([\d,]+) +[\d.]+ +([\d.]+)% +([\d.]+)% +(\d+)%"
    found = [re.fullmatch(pattern, row).groups() for row in rows]
    assert [stage for stage, *_ in found] == ["collect", "localize rollout", "rectify"]
    assert found[0][1] == "20"
    assert all(int(answers) > 10 for _, answers, *_ in found)
    assert all(0 < float(busy) <= float(bound) <= 100 and 0 <= int(half) < 100 for *_, busy, bound, half in found)


def test_bound_of_benchmark_pipeline():
    """Three tasks of two requests in sequence, worked out by hand."""
    module = runpy.run_path(str(EXAMPLES / "benchmark_pipeline.py"))
    seconds = {"a0": 1, "a1": 5, "b0": 2, "b1": 1, "c0": 3, "c1": 1}

    def task(name):
        texts = []
        for number in range(2):
            replies = yield Ask("policy", (SimpleNamespace(key=f"{name}{number}"),))
            texts.append(replies[f"{name}{number}"])
        return texts

    # 13 s in all, of which a0 and a1 take 6 s
    for slots, expected in ((1, 1), (2, 1), (3, 13 / (3 * 6)), (10, 13 / (10 * 6))):
        client = module["UnlimitedSlots"](answer=lambda request: (request.key.upper(), seconds[request.key]))
        results = client.run_tasks(map(task, "abc"), {"policy": None})
        assert list(results) == [["A0", "A1"], ["B0", "B1"], ["C0", "C1"]]
        assert client.bound(slots) == pytest.approx(expected)


def test_progress_of_benchmark_pipeline(monkeypatch):
    """Ten tasks with an answer each, of which one is slow."""
    ends = runpy.run_path(str(EXAMPLES / "benchmark_pipeline.py"))["Ends"]()
    moments = iter([(0, False), *[(1, True)] * 3, *[(1, False)] * 6, (0, False), (1, False)])

    def run_tasks(tasks, services, progress):
        for now, moment in enumerate(moments):
            monkeypatch.setattr(time, "monotonic", lambda now=now: float(now + 1))
            progress(*moment)
        yield "result"

    monkeypatch.setattr("stepdpo_trl.runs.tasks.run_tasks", run_tasks)
    seen = []
    assert list(ends.run_tasks([], {}, lambda *moment: seen.append(moment))) == ["result"]
    assert seen[0] == (0, False)
    assert len(seen) == 12
    # Tasks end at 5 to 10 and at 12, counted from 1. Half of the time is over at 6.5
    assert ends.half() == pytest.approx(2 / 7)


def test_benchmark_checker():
    options = ["--checks", 40, "--processes", 1, "--checkers", "math", "function"]
    done = run_script(EXAMPLES / "benchmark_checker.py", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows = done.stdout.splitlines()
    assert head.split()[:3] == ["checker", "processes", "checks"]
    assert [row.split()[:3] for row in rows] == [["math", "1", "40"], ["function", "1", "40"]]
    assert all(float(row.split()[4].replace(",", "")) > 0 for row in rows)
