"""A short run of the miniature's experiments, and tests of their parts."""

import json
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from stepdpo_trl.data.answers import check_answer
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.quickstart import PAIRS_PATH, make_problems, write_solution
from stepdpo_trl.runs.log import Log

from ..distributed.launcher import run_script

FOLDER = Path(__file__).parents[2] / "examples" / "paper_in_miniature"
ENDS = {"chosen_ends_solution": False, "rejected_ends_solution": False}
ROWS = [{**json.loads(line), **ENDS} for line in PAIRS_PATH.read_text().splitlines()[:3]]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))  # parts that are shared with other experiments
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the script sets it for the whole process


def test_other_model_continues_from_any_right_step():
    from pairs import OtherModel

    model = OtherModel()
    for problem in make_problems(30, "held_out", (2, 6)):
        solution = write_solution(problem)
        steps = split_steps(solution)
        for number in range(1, len(steps) + 1):
            prefix = steps.prefix(number)
            text = prefix + model.complete(model.render(problem.text, prefix)).text
            assert check_answer(problem.answer, text).outcome == "right"
            continued = split_steps(text, steps.style)
            assert len(continued) == len(steps)
            assert continued.texts()[: number - 1] == steps.texts()[: number - 1]
            assert " makes " in continued.step(number)  # the wording of the other model


def test_rows_hold_the_same_pair_in_each_format():
    from training import rows_for

    forms = (rows_for(method, ROWS) for method in ("step", "dpo", "stock", "sft"))
    for row, step, dpo, stock, sft in zip(ROWS, *forms, strict=True):
        whole = [row["initial_reason_steps"] + row[f"full_{which}"] for which in ("chosen", "rejected")]
        assert [dpo["chosen"][0]["content"], dpo["rejected"][0]["content"]] == whole
        assert sft["completion"] == dpo["chosen"]
        for which in ("chosen", "rejected"):
            assert stock[which] == step[which] == row[which]
        user = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert stock["prompt"] == user + row["initial_reason_steps"]


def test_intervals_count_seeds_and_problems():
    from report import mean_and_half

    one = np.array([[1.0, 0, 1, 1, 0, 1, 1, 1]])
    mean, half = mean_and_half(one)
    assert (mean, half) == (75.0, pytest.approx(196 * np.sqrt(one.var(ddof=1) / 8)))
    same = np.repeat(one, 5, axis=0)  # seeds that agree do not narrow the interval
    assert mean_and_half(same) == (mean, half)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):  # problems vary in difficulty, seeds in luck
        difficulty, luck = rng.normal(0.7, 0.15, 200), rng.normal(0, 0.05, (6, 1))
        mean, half = mean_and_half((rng.random((6, 200)) < difficulty + luck).astype(float))
        inside += abs(mean - 70) < half
    assert inside / 300 > 0.88  # below 0.95, since six seeds are few


def test_ties_between_settings_go_to_the_lowest(tmp_path):
    from report import best_settings

    log = Log(tmp_path / "runs.jsonl")
    for rate, beta, *counts in ((6e-5, 0.1, 8, 9), (3e-5, 0.4, 9, 8), (3e-5, 0.1, 5, 5), (1e-4, 0.1, 10, 6)):
        for seed, solved in zip((100, 101), counts, strict=True):
            result = {"greedy": {"solved": [1] * solved + [0] * (10 - solved)}}
            log.append(f"tune/Step-DPO/{rate:g}/{beta:g}/{seed}", {"result": result})
    assert best_settings(log, "Step-DPO") == best_settings(log, "Step-DPO, rollout") == (3e-5, 0.4)


@pytest.mark.long
def test_quick_run_writes_tables_and_figures(tmp_path):
    done = run_script(FOLDER / "run.py", "--quick", "--processes", 1, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = (tmp_path / "tables.md").read_text()
    for words in ("| Step-DPO, other model's steps |", "| rollout |", "| sDPO, stage 2 from S |", "| fresh pairs |"):
        assert words in tables
    assert {picture.name for picture in tmp_path.glob("*.png")} == {
        f"{name}.png" for name in ("methods", "tuning", "curves", "stages", "turns")
    }


def test_finished_jobs_are_not_repeated(tmp_path):
    from experiments import Runs

    class Pool:
        def submit(self, work, *given):
            future = Future()
            future.set_result(work(*given))
            return future

    log, asked = Log(tmp_path / "runs.jsonl"), []

    def work(number):
        if number == 2 and len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(number)
        return {"number": number}

    jobs = [(f"job/{number}", work, (number,)) for number in range(4)]
    Runs(log, Pool()).do("First", iter(jobs[:2]))
    with pytest.raises(KeyboardInterrupt):
        Runs(log, Pool()).do("Stopped", iter(jobs))
    asked.append("again")
    Runs(Log(tmp_path / "runs.jsonl"), Pool()).do("Again", iter(jobs))
    assert asked == [0, 1, "again", 2, 3]
    assert {key: record["result"]["number"] for key, record in Log(tmp_path / "runs.jsonl").items()} == {
        f"job/{number}": number for number in range(4)
    }


def test_changed_scale_raises(tmp_path, monkeypatch):
    import experiments

    (tmp_path / "runs.jsonl").write_text('{"key": "scale", "problems": 1}\n')
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="another scale"):
        experiments.main()
