"""The example with code: its problems, the limits of its checker, and step pairs from a simulated model."""

import importlib.util
import json
import random
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from stepdpo_trl.data.answers import AnswerChecker
from stepdpo_trl.data.checkers import CheckerError, resolve_checker
from stepdpo_trl.data.prompts import StepPrompt
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.generation import Completion, ModelSpec, Sampling
from stepdpo_trl.pipeline.build import build
from stepdpo_trl.pipeline.judge_options import DEFAULT_CHECK, JudgeOptions
from stepdpo_trl.pipeline.records import read_problems
from stepdpo_trl.pipeline.session import Session

from ..simulated import Student

FOLDER = Path(__file__).parents[2] / "examples" / "code_steps"
ROWS = [json.loads(line) for line in (FOLDER / "problems.jsonl").read_text().splitlines()]


def load(name):
    spec = importlib.util.spec_from_file_location(f"code_steps_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv("ALLOW_CODE_EXECUTION", "1")
    forkserver._forkserver._stop()  # its children have the environment in which it started
    yield
    forkserver._forkserver._stop()


@pytest.fixture
def checker(allowed):
    return load("checker")


def in_block(code):
    return f"```python\n{code}\n```"


def test_there_are_enough_different_problems():
    assert len({row["id"] for row in ROWS}) == len({row["problem"] for row in ROWS}) == len(ROWS) >= 60
    for row in ROWS:
        assert f"`{row['function']}(" in row["problem"]
        assert f"def {row['function']}(" in row["solution"]
        assert len(row["tests"]) >= 3
        assert row["solution"] != row["wrong"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_solutions_pass_and_wrong_variants_fail(row):
    """Without the sandbox, which would take a process each; see test_a_sample_in_the_sandbox."""
    outcomes = []
    for which in ("solution", "wrong"):
        space = {}
        try:
            exec(row[which], space)
            for test in row["tests"]:
                exec(test, space)
            outcomes.append(True)
        except Exception:
            outcomes.append(False)
    assert outcomes == [True, False]


@pytest.mark.parametrize("count", [4, pytest.param(len(ROWS), marks=pytest.mark.long)])
def test_a_sample_in_the_sandbox(checker, count):
    for row in random.Random(0).sample(ROWS, count):
        assert checker.passes(row, in_block(row["solution"])) is True, row["id"]
        assert checker.passes(row, in_block(row["wrong"])) is False, row["id"]


ADD = {"function": "add", "tests": ["assert add(1, 2) == 3"]}


@pytest.mark.parametrize(
    ("solution", "passes"),
    [
        ("def add(a, b):\n    return a + b", None),  # no block
        (in_block("def sub(a, b):\n    return a + b"), None),
        ("Sure:\n```\nx = 1\n```\n" + in_block("def add(a, b):\n    return a + b"), True),
        ("```python\ndef add(a, b):\n    return a + b\n", True),  # without the end of the block
        *((f"```{name}\ndef add(a, b):\n    return a + b\n```", True) for name in ("", "Python", "python3", "py ")),
        ("```json\ndef add(a, b):\n    return a + b\n```", None),
        (in_block("def add(a, b):\n    return a - b"), False),
        (in_block("import numpy\ndef add(a, b):\n    return a + b"), False),  # no site-packages
        (in_block("def add(a, b:\n    return a + b"), False),
        (in_block("def add(a, b):\n    return a + b\nraise SystemExit(0)"), False),
        (in_block("import os\ndef add(a, b):\n    os._exit(0)"), False),
        (in_block("def add(a, b):\n    print('x')\n    return a + b"), True),
        (in_block("import math, re, itertools\ndef add(a, b):\n    return math.floor(a + b)"), True),
    ],
)
def test_outcomes(checker, solution, passes):
    assert checker.passes(ADD, solution) is passes


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "x = bytearray(2**30)",
        "open('file', 'w').write('x')",
        "import os; os.remove(PATH)",
        "import os; os.system('touch ' + PATH + '.new')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import shutil; shutil.rmtree(PATH)",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import ctypes; ctypes.CDLL(None)",
        "[open('/dev/null') for _ in range(100)]",
    ],
)
def test_limits(checker, tmp_path, monkeypatch, body):
    """Each body fails although the function returns the right value after it."""
    monkeypatch.setattr(checker, "TIME_LIMIT", 1.0)
    kept = tmp_path / "kept"
    kept.write_text("kept")
    code = f"def add(a, b):\n    {body.replace('PATH', repr(str(kept)))}\n    return a + b"
    assert checker.passes(ADD, in_block(code)) is False
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_without_permission_nothing_runs(monkeypatch, capsys):
    monkeypatch.delenv("ALLOW_CODE_EXECUTION", raising=False)
    with pytest.raises(CheckerError, match="runs code that a model has written; read"):
        resolve_checker(f"{FOLDER / 'checker.py'}:passes")
    refused = subprocess.run([sys.executable, FOLDER / "execute.py", "data"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "then pass --allow-code-execution" in refused.stderr


def test_run_adds_the_options_of_the_example(monkeypatch, capsys, allowed):
    complete = load("execute").complete
    words = complete(["data", "--model", "M", "--output-dir", "run", "--output-file", "p.jsonl", "--limit", "7"])
    from stepdpo_trl.cli.main import main

    assert main([*words, "--dry-run"]) == 0
    assert " 7\n" in capsys.readouterr().out
    assert complete(["report", "run"]) == ["report", "run"]
    assert "--steps=line" not in complete(["data", "--steps", "line"])


class Coder(Student):
    """Continues with the lines of the reference solution or of the wrong variant. The first solution is wrong."""

    rows = {row["problem"]: row for row in ROWS}  # noqa: RUF012

    def answer(self, request):
        rng = random.Random(request.seed)
        user, _, prefix = request.prompt.partition("\n---\n")
        row = self.rows[user]
        lines, wrong = row["solution"].splitlines(keepends=True), row["wrong"].splitlines(keepends=True)
        written = prefix.removeprefix("```python\n").splitlines(keepends=True)
        first = request.key.endswith("/0") and not written
        if first or rng.random() < 0.3:
            lines = wrong
        return Completion("".join(lines[len(written) :]) + "\n```", "stop", 1, 1)


def test_pairs_of_a_simulated_model(tmp_path, allowed):
    """The rejected step is the wrong line, and the preferred step the right one."""
    checker = resolve_checker(f"{FOLDER / 'checker.py'}:passes")
    steps = load("execute").OPTIONS["--steps"]
    problems = read_problems(FOLDER / "problems.jsonl", 2, checker)
    model, prompt = ModelSpec("coder"), StepPrompt("{{ problem }}", "```python\n")
    arguments = (tmp_path, problems, "code", model, prompt, Sampling(), 1)
    with AnswerChecker(2) as pool:
        session = Session({model: Coder()}, pool)
        counts = session.collect(*arguments, checker=checker, steps=steps)
        assert counts == {"wrong": 2}
        session.localize(tmp_path, "rollout", JudgeOptions(num_rollouts=4))
        session.rectify(tmp_path, check=DEFAULT_CHECK, max_attempts=4)
    pairs, _ = build([tmp_path])
    assert len(pairs) == 2
    by_text = {row["problem"]: row for row in ROWS}
    for pair in pairs:
        row = by_text[pair["prompt"]]
        whole = pair["initial_reason_steps"] + pair["full_chosen"]
        assert split_steps(whole, steps).step(pair["step_index"]) == pair["chosen"]
        assert row["solution"] in whole
        assert row["wrong"] in pair["initial_reason_steps"] + pair["full_rejected"]
        right, wrong = row["solution"].splitlines(), row["wrong"].splitlines()
        first = next(number for number, two in enumerate(zip(right, wrong, strict=True)) if two[0] != two[1])
        lines = [pair[which].removesuffix("\n```") for which in ("chosen", "rejected")]  # the end of the block
        assert lines == [right[first], wrong[first]]
