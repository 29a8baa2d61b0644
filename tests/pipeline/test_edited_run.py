"""Run folders that a person has edited: errors name the record and how to fix it."""

import html
import json
import os
import re
import signal

import pytest

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.answers import WRONG
from stepdpo_trl.pipeline.build import run_directories
from stepdpo_trl.pipeline.pairs import normalize_problem
from stepdpo_trl.pipeline.policy import render_template
from stepdpo_trl.runs.run_directory import Log, RunDirectory, RunError

KEY = "1/0"
COLLECT = {
    "problems": "drawn",
    "prompt": {"user": "{{ problem }}", "response_prefix": ""},
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9, "top_k": 0},
    "num_samples": 1,
    "seed": 0,
    "model": {"model": "M", "backend": "transformers"},
    "shard": [0, 1],
}
SOLUTION = {"problem": "1", "outcome": WRONG, "answer": "3", "finish_reason": "stop", "steps": 2}
FOUND = {"key": "1/1", "text": "Step 1: 1 + 1 = 2\nStep 2: so 2", "finish": "stop", "check": {}}
VERDICT = {"step": 1, "judge": "arithmetic", "evidence": {}}
CORRECTION = {"step": 1, "samples": 1, "dropped": 0, "found": [FOUND]}


@pytest.fixture
def run(tmp_path):
    """Write a run with one problem, solution, verdict and correction."""
    for name, key, record in (
        ("settings", "collect", COLLECT),
        ("problems", "1", {"problem": "1 + 1?", "answer": "2", "solution": ""}),
        ("solutions", KEY, {**SOLUTION, "text": "Step 1: 1 + 1 = 3\nStep 2: so 3"}),
        ("verdicts.arithmetic", KEY, VERDICT),
        ("corrections.arithmetic", KEY, CORRECTION),
    ):
        Log(tmp_path / "run" / f"{name}.jsonl").append(key, record)
    return tmp_path / "run"


def build(run, *options):
    return main(["build", str(run), "--output-file", str(run.parent / "pairs.jsonl"), *options])


def test_the_run_can_be_built(run):
    assert build(run) == 0
    (pair,) = map(json.loads, (run.parent / "pairs.jsonl").read_text().splitlines())
    assert (pair["chosen"], pair["rejected"], pair["source"]) == (" 1 + 1 = 2", " 1 + 1 = 3", "arithmetic:1/1")
    assert pair["problem_id"] == "1"


def without(record, *path):
    record = json.loads(json.dumps(record))
    place = record
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return record


@pytest.mark.parametrize(
    ("name", "key", "record", "message"),
    [
        ("settings", "collect", without(COLLECT, "seed"), "settings.jsonl cannot be used: it lacks 'seed'. Restore"),
        ("settings", "collect", without(COLLECT, "prompt"), "settings.jsonl cannot be used: it lacks 'prompt'"),
        ("settings", "collect", without(COLLECT, "model", "backend"), "it lacks 'model.backend'"),
        (
            "settings",
            "collect",
            {**COLLECT, "prompt": {"user": "", "opening": ""}},
            "unexpected keyword argument 'opening'",
        ),
        (
            "settings",
            "collect",
            {**COLLECT, "model": {"model": "M", "backend": "x", "size": 7}},
            "unknown field 'size'",
        ),
        ("problems", "1", {"problem": "1 + 1?"}, "The problem '1' in "),
        ("problems", "1", {"problem": "1 + 1?", "answer": "2", "level": 3}, "unexpected keyword argument 'level'"),
        ("solutions", KEY, SOLUTION, "The solution '1/0' in"),
        ("solutions", KEY, {**SOLUTION, "text": 5}, "its text is not a string. Restore the file, or remove the line"),
        (
            "solutions",
            KEY,
            {**SOLUTION, "text": "a", "problem": "9"},
            "The problem '9' of the solution '1/0' is not in",
        ),
        ("verdicts.arithmetic", KEY, {"step": 1}, "arithmetic.jsonl cannot be used"),
        ("verdicts.arithmetic", KEY, {**VERDICT, "step": "1"}, "its step is not a number"),
        ("verdicts.arithmetic", KEY, {**VERDICT, "evidence": None}, "stepdpo localize "),
        ("corrections.arithmetic", KEY, {"step": 1}, "The correction of '1/0' in "),
        ("corrections.arithmetic", KEY, {**CORRECTION, "found": [{"text": "a"}]}, "run `stepdpo rectify` again"),
        (
            "corrections.arithmetic",
            KEY,
            {**CORRECTION, "found": [{**FOUND, "text": 5}]},
            "run `stepdpo rectify` again",
        ),
    ],
)
def test_edited_records(name, key, record, message, run, capsys):
    Log(run / f"{name}.jsonl").append(key, record)
    for command in (lambda: build(run), lambda: main(["report", str(run)])):
        assert command() == 2
        assert message in capsys.readouterr().err


def test_inspect_needs_only_the_prompt(run, capsys):
    Log(run / "settings.jsonl").append("collect", {"prompt": {"user": "{{ problem }}", "opening": ""}})
    assert main(["inspect", str(run)]) == 0
    assert "1 + 1?" in capsys.readouterr().out
    Log(run / "settings.jsonl").append("collect", {"prompt": {}})
    assert main(["inspect", str(run)]) == 2
    assert "settings.jsonl cannot be used: it lacks 'user'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["time.json", "build.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"a": "b"}', '{"collect": null}'])
def test_edited_files(name, content, run, capsys):
    (run / name).write_text(content)
    assert main(["report", str(run)]) == 2
    assert f"{run / name} cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize("step", [99, 0, -1])
def test_steps_that_do_not_exist(step, run, capsys):
    Log(run / "corrections.arithmetic.jsonl").append(KEY, {**CORRECTION, "step": step})
    Log(run / "verdicts.arithmetic.jsonl").append(KEY, {**VERDICT, "step": step})
    assert build(run) == 2
    assert f"cannot be used: step {step} is not in the solution, which has 2" in capsys.readouterr().err
    with RunDirectory(run) as directory:
        from stepdpo_trl.pipeline.rectify import rectify
        from stepdpo_trl.runs.runner import TaskRunner

        with pytest.raises(RunError, match=rf"verdict of '1/0' in .* is step {step}, but the solution has 2 steps"):
            rectify(TaskRunner(directory, "rectify"), None, "arithmetic", None)


@pytest.mark.parametrize("name", ["settings", "problems", "solutions"])
def test_removed_lines(name, run, capsys):
    (run / f"{name}.jsonl").write_text("")
    assert build(run) == 2
    error = capsys.readouterr().err
    assert "stepdpo collect" in error
    assert {"settings": "holds no", "problems": "The problem '1'", "solutions": "The solution '1/0'"}[name] in error


def test_a_kill_before_the_pairs_are_complete(run, monkeypatch):
    """There is no file, or the previous one, and the same command builds it."""
    assert build(run) == 0
    pairs = run.parent / "pairs.jsonl"
    first = pairs.read_text()
    Log(run / "corrections.arithmetic.jsonl").append(KEY, {**CORRECTION, "found": [{**FOUND, "key": "1/2"}]})
    if not (child := os.fork()):
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: os.kill(os.getpid(), 9) if b == pairs else replace(a, b))
        build(run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert pairs.read_text() == first
    assert pairs.with_name("pairs.jsonl.partial").exists()  # complete, but not renamed
    assert build(run) == 0
    assert json.loads(pairs.read_text())["source"] == "arithmetic:1/2"
    assert not pairs.with_name("pairs.jsonl.partial").exists()


def test_the_report_shows_texts_and_not_markup(run):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
    Log(run / "problems.jsonl").append("1", {"problem": hostile, "answer": "2", "solution": hostile})
    Log(run / "solutions.jsonl").append(KEY, {**SOLUTION, "text": f"Step 1: {hostile}\nStep 2: {hostile}"})
    Log(run / "corrections.arithmetic.jsonl").append(
        KEY, {**CORRECTION, "found": [{**FOUND, "text": f"Step 1: {hostile}!"}]}
    )
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count(html.escape(hostile)) >= 3
    assert not re.search(r"<script|<img", page)


def test_backups_of_shards_are_ignored(tmp_path):
    names = ["shard-0-of-2", "shard-1-of-2"]
    for name in (*names, "shard-0-of-2.bak", "shard-0-of-2 (copy)", "shard-x-of-y", "shard--1-of-2", "shard-0-of-1e9"):
        (tmp_path / name).mkdir()
    (tmp_path / "shard-2-of-3").write_text("a file")
    assert run_directories(tmp_path) == [tmp_path / name for name in names]
    for name in names:
        (tmp_path / name).rmdir()
    assert run_directories(tmp_path) == [tmp_path]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("5 \u2212 3", "5 - 3"),
        ("5 \u2013 3", "5-3"),
        ("3 x 4", "3 * 4"),
        ("3 \u00d7 4", r"3 \times 4"),
        (r"3 \cdot 4", "3 X 4"),
        ("6 \u00f7 2", r"6 \div 2"),
        ("Ame\u0301lie", "Am\u00e9lie"),
        ("\uff11\uff12 apples", "12 apples"),
        ("\ufb01ve", "five"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac12"),
        (r"\left( 1 \right)", "(1)"),
        ("x\u00b2", "x^{2}"),
        ("\u00bd", "1/2"),
        ("a \u2264 b", r"a \leq b"),
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_typographic_variants_of_a_problem_are_the_same(first, second):
    assert normalize_problem(first) == normalize_problem(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [("5 - 3", "5 + 3"), ("5\u00b2", "52"), ("3 * 4", "34"), ("3x", "3*"), ("1.5", "15"), (r"\leftarrow", "arrow")],
)
def test_different_problems_stay_different(first, second):
    assert normalize_problem(first) != normalize_problem(second)


def test_typographic_variants_of_test_problems_are_excluded(run, capsys):
    (run.parent / "test.jsonl").write_text(json.dumps({"problem": "\uff11 \uff0b 1?"}) + "\n")
    assert build(run, "--exclude", str(run.parent / "test.jsonl")) == 2
    assert "All 1 pairs were dropped (1 in a test set)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ problem + 1 }}", "TypeError: "),
        ("{{ problem[", "unexpected 'end of template'"),
        ("{{ answer }}", "'answer' is undefined"),
        ("{% for n in range(1000000) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ problem.append(1) }}", "has no attribute 'append'"),
    ],
)
def test_templates_that_fail_or_leave_the_sandbox(template, reason):
    with pytest.raises(RunError, match=f"cannot be filled: .*{reason}"):
        render_template(template, problem="p")


def test_text_of_a_model_is_no_template():
    assert render_template("{{ problem }}", problem="{{ 1 / 0 }}{% raw %}") == "{{ 1 / 0 }}{% raw %}"
