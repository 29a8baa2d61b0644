"""Runs on other tasks than mathematics: checkers, steps, and outcomes that belong to their solutions."""

import json
import logging
import re
from collections import Counter
from dataclasses import replace

import pytest

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.answers import AnswerChecker
from stepdpo_trl.data.checkers import CheckerError, resolve_checker
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.evaluation.evaluate import evaluate
from stepdpo_trl.evaluation.results import table
from stepdpo_trl.generation import Completion, ModelSpec, Sampling
from stepdpo_trl.pipeline.build import build
from stepdpo_trl.pipeline.collect import no_wrong_answers, read_solutions
from stepdpo_trl.pipeline.judge_options import DEFAULT_CHECK, JudgeOptions
from stepdpo_trl.pipeline.records import problems_of
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.pipeline.task import checker_of
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.run_directory import RunDirectory, RunError

from ..simulated import Student, draw_records

MODEL = ModelSpec("student")
SAMPLING = Sampling(1.0, 1.0, 256)
OPENING = "Let's think step by step.\nStep 1:"
# Reads the gold value from another column, and the value of a solution after its last "="
CODE = """
def check(problem, solution):
    if problem["value"] % 4 == 1 and solution.count("Step") > 2:
        raise ValueError(f"not for {problem['name']}")
    return None if "boxed" not in solution else solution.split("boxed{")[1].split("}")[0] == str(problem["value"])
"""


@pytest.fixture(scope="module")
def pool():
    with AnswerChecker(2) as pool:
        yield pool


@pytest.fixture
def checker(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    return resolve_checker(f"{tmp_path / 'own.py'}:check")


def rows(count=8):
    return [{"name": p.id, "question": p.problem, "value": int(p.answer)} for p in draw_records(count, seed=5)]


def run_all(path, pool, checker, student=None, steps=None, problems=None):
    session = Session({MODEL: student or Student()}, pool)
    problems = problems_of(rows(), "rows", checker=checker) if problems is None else problems
    arguments = (path, problems, "rows", MODEL, STEP_PROMPTS["plain"], SAMPLING, 3)
    session.collect(*arguments, checker=checker, steps=steps)
    session.localize(path, "rollout", JudgeOptions(num_rollouts=4))
    return session.rectify(path, check=DEFAULT_CHECK, max_attempts=8)


def test_a_run_with_a_function(tmp_path, pool, checker, caplog):
    """Outcomes are those of the function, which sees columns that only it knows. Failures are counted, not wrong."""
    run_all(tmp_path / "run", pool, checker)
    gold = {row["name"]: row["value"] for row in rows()}
    failed = 0
    with RunDirectory(tmp_path / "run") as run:
        solutions = list(read_solutions(run))
        assert checker_of(run) == checker
        assert run.settings()["rectify rollout"]["check"] is None
    assert len(solutions) == 24
    for solution in solutions:
        value = solution.problem.row["value"]
        assert value == gold[solution.problem.row["name"]]
        fails = value % 4 == 1 and solution.text.count("Step") > 2
        failed += fails
        right = f"boxed{{{value}}}" in solution.text
        assert solution.outcome == ("unreadable" if fails else "right" if right else "wrong")
    warning = next(record.message for record in caplog.records if "failed on" in record.message)
    assert failed > 0
    assert f"failed on {failed} solutions, which count as unreadable: {failed} times the checker raised" in warning
    assert "Example: policy/" in warning
    assert "ValueError: not for p" in warning
    pairs, _ = build([tmp_path / "run"])
    assert len(pairs) >= 3
    for pair in pairs:
        assert pair["answer"] == ""
        row = next(row for row in rows() if row["question"] == pair["prompt"])
        assert f"boxed{{{row['value']}}}" in pair["full_chosen"]
        assert f"boxed{{{row['value']}}}" not in pair["full_rejected"]


def test_a_resumed_run_checks_nothing_again(tmp_path, pool, checker):
    run_all(tmp_path / "run", pool, checker)
    before = {file.name: file.read_text() for file in (tmp_path / "run").glob("*.jsonl")}
    student = Student()
    run_all(tmp_path / "run", pool, checker, student)
    assert student.asked == []
    assert {file.name: file.read_text() for file in (tmp_path / "run").glob("*.jsonl")} == before


def test_a_function_that_changes(tmp_path, pool, checker):
    """Later stages refuse the changed code. `collect` checks the stored solutions again without sampling."""
    run_all(tmp_path / "run", pool, checker)
    (tmp_path / "own.py").write_text(CODE.replace("== str", "!= str").replace("== 1", "== 5"))
    session = Session({MODEL: Student()}, pool)
    with pytest.raises(RunError, match=r"'own.py:check' has changed .* Run `stepdpo collect` again with --checker /"):
        session.localize(tmp_path / "run", "rollout", JudgeOptions())
    student = Student()
    problems = problems_of(rows(), "rows", checker=checker)
    changed = resolve_checker(checker.spelling)
    counts = Session({MODEL: student}, pool).collect(
        tmp_path / "run", problems, "rows", MODEL, STEP_PROMPTS["plain"], SAMPLING, 3, checker=changed
    )
    assert student.asked == []
    with RunDirectory(tmp_path / "run") as run:
        for solution in read_solutions(run):
            same = f"boxed{{{solution.problem.row['value']}}}" in solution.text
            assert solution.outcome == ("wrong" if same else "right")
    assert counts["unreadable"] == 0
    with pytest.raises(RunError, match="No pairs"):
        build([tmp_path / "run"])  # the corrected solutions are right now
    (tmp_path / "own.py").unlink()
    with pytest.raises(CheckerError, match="there is no file"):
        session.localize(tmp_path / "run", "rollout", JudgeOptions())


def test_a_function_that_returns_text_ends_the_run(tmp_path, pool):
    (tmp_path / "own.py").write_text("def check(problem, solution):\n    return 'right'\n")
    checker = resolve_checker(f"{tmp_path / 'own.py'}:check")
    with pytest.raises(CheckerError, match=r"'own.py:check' returned 'right' \(str\) for the problem 'What is"):
        run_all(tmp_path / "run", pool, checker)


@pytest.mark.parametrize(
    ("steps", "starts"),
    [
        ("label", r"Step \d+:"),
        ("line", r"^."),
        (r"Step \d+:", r"Step \d+:"),
        (r"^(?=Step)", "^Step"),
        ("[+*-]", "[+*-]"),
    ],
)
def test_steps_of_a_run(tmp_path, pool, steps, starts):
    problems = draw_records(6, operations=3)
    session = Session({MODEL: Student()}, pool)
    session.collect(tmp_path, problems, "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 1, steps=steps)
    with RunDirectory(tmp_path) as run:
        for record in run.log("solutions").values():
            assert record["steps"] == len(re.findall(starts, record["text"], re.M)) > 1
        assert all(solution.style == steps for solution in read_solutions(run))
        assert run.settings()["collect"]["steps"] == steps


class Phases(Student):
    """Numbers its steps in other words."""

    def answer(self, request):
        completion = super().answer(replace(request, prompt=request.prompt.replace("Phase", "Step")))
        return replace(completion, text=completion.text.replace("Step", "Phase"))


def test_all_stages_split_in_the_same_way(tmp_path, pool):
    """Steps of the pairs are those of a regular expression that automatic detection does not know."""
    steps = r"^Phase \d+:"
    run_all(tmp_path, pool, resolve_checker("math"), Phases(), steps, draw_records(6))
    pairs = build([tmp_path])[0]
    assert pairs
    for pair in pairs:
        assert pair["initial_reason_steps"].endswith(f"Phase {pair['step_index']}:")
        for which in ("chosen", "rejected"):
            split = split_steps(pair["initial_reason_steps"] + pair[f"full_{which}"], steps)
            assert split.step(pair["step_index"]) == pair[which]
            assert "Phase" not in pair[which]


def test_steps_that_split_nothing(tmp_path, pool):
    """The run ends after the first solutions, and again without sampling when it is resumed."""
    problems, student = draw_records(40), Student()
    for attempt in range(2):
        with pytest.raises(RunError, match=r"--steps '\^Thought:' splits none of the first \d+ solutions"):
            run_all(tmp_path, pool, resolve_checker("math"), student, steps="^Thought:", problems=problems)
        assert len(student.asked) == len(set(student.asked)), attempt


@pytest.mark.parametrize(("checker", "steps"), [("exact", None), ("math", "line")])
def test_settings_are_checked_when_a_run_is_resumed(tmp_path, pool, checker, steps):
    """Runs of earlier releases, which have neither setting, are runs with the defaults."""
    problems = draw_records(4)
    session = Session({MODEL: Student()}, pool)
    arguments = (tmp_path, problems, "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    session.collect(*arguments)
    with RunDirectory(tmp_path) as run:
        assert not {"checker", "steps"} & run.settings()["collect"].keys()
    with pytest.raises(
        RunError, match=r"`collect` in .* was started with other settings:\n  (checker|steps): not set"
    ):
        session.collect(*arguments, checker=resolve_checker(checker), steps=steps)
    session.collect(*arguments)


class Fixed(Student):
    """Always answers with the same number."""

    def __init__(self, answer):
        super().__init__()
        self.text = f" 1 + 1 = 2.\nStep 2: The answer is \\boxed{{{answer}}}."

    def answer(self, request):
        return Completion(self.text, "stop", 1, 1)


def remove_line(path, key):
    """Remove a record, as the error about a damaged line advises."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["key"] != key))


def test_a_solution_that_is_sampled_again_does_not_inherit_the_outcome(tmp_path, pool):
    """A line of the generations is removed, and the server answers differently the next time."""
    problems = draw_records(3)
    gold = int(problems[0].answer)
    arguments = (tmp_path, problems[:1], "drawn", MODEL, STEP_PROMPTS["qwen2-boxed"], SAMPLING, 1)
    Session({MODEL: Fixed(gold)}, pool).collect(*arguments)
    with RunDirectory(tmp_path) as run:
        (key,) = run.log("solutions")
        assert run.log("solutions")[key]["outcome"] == "right"
    remove_line(tmp_path / "generations.policy.jsonl", key)
    session = Session({MODEL: Fixed(gold + 1)}, pool)
    assert session.collect(*arguments)["wrong"] == 1
    with RunDirectory(tmp_path) as run:
        record = run.log("solutions")[key]
        assert (record["outcome"], record["answer"]) == ("wrong", str(gold + 1))
        assert record["text"].endswith(f"boxed{{{gold + 1}}}.")


def test_a_correction_that_is_sampled_again_is_no_preferred_step(tmp_path, pool):
    student = Student()
    run_all(tmp_path, pool, resolve_checker("math"), student, problems=draw_records(10))
    with RunDirectory(tmp_path) as run:
        records = run.log("corrections.rollout")
        solution, found = next((key, record["found"][0]) for key, record in records.items() if record["found"])
    remove_line(tmp_path / "generations.policy.jsonl", found["key"])
    wrong = Fixed("no number")
    run_all(tmp_path, pool, resolve_checker("math"), wrong, problems=draw_records(10))
    with RunDirectory(tmp_path) as run:
        found_now = run.log("corrections.rollout")[solution]["found"]
    assert not any("no number" in entry["text"] for entry in found_now)


def test_pairs_of_replaced_solutions_are_left_out(tmp_path, pool, caplog):
    """Only `collect` runs again after a solution was lost. Verdicts and corrections of the old text do not count."""
    problems, session = draw_records(10), Session({MODEL: Student()}, pool)
    run_all(tmp_path, pool, resolve_checker("math"), problems=problems)
    before = build([tmp_path])[0]
    with RunDirectory(tmp_path) as run:
        lost = next(key for key, record in run.log("corrections.rollout").items() if record["found"])
    remove_line(tmp_path / "generations.policy.jsonl", lost)
    other = Session({MODEL: Fixed("-12345")}, pool)
    other.collect(tmp_path, problems, "rows", MODEL, STEP_PROMPTS["plain"], SAMPLING, 3)
    pairs = build([tmp_path])[0]
    assert len(before) - len(pairs) == 1
    assert "1 corrections in" in caplog.text
    assert "belong to solutions that `collect` has replaced since" in caplog.text
    session.rectify(tmp_path, check=DEFAULT_CHECK)
    assert "1 verdicts in" in caplog.text


def test_the_same_in_eval(tmp_path, pool):
    problems = draw_records(1)
    gold = int(problems[0].answer)

    def run(answer):
        return evaluate(
            Session({MODEL: Fixed(answer)}, pool),
            tmp_path,
            "drawn",
            problems,
            [MODEL],
            STEP_PROMPTS["plain"],
            SAMPLING,
        )

    assert run(gold)["results"][0]["accuracy"] == 1
    (answers,) = tmp_path.glob("answers.*.jsonl")
    remove_line(answers, json.loads(answers.read_text())["key"])
    assert run(gold + 1)["results"][0]["accuracy"] == 0


def test_outcomes_of_earlier_releases_are_computed_again(tmp_path, pool):
    arguments = (tmp_path, draw_records(5), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    first = Session({MODEL: Student()}, pool).collect(*arguments)
    checks = tmp_path / "checks.jsonl"
    old = [json.loads(line) for line in checks.read_text().splitlines()]
    kept = [{name: value for name, value in record.items() if name != "digest"} for record in old]
    checks.write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert Session({MODEL: Student()}, pool).collect(*arguments) == first
    assert [json.loads(line) for line in checks.read_text().splitlines()] == kept + old


@pytest.mark.parametrize("num_samples", [1, 3])
def test_evaluation_with_a_function(tmp_path, pool, checker, num_samples):
    """Without answers there is no majority vote. Means, intervals and the paired bootstrap remain."""
    other = ModelSpec("other")
    problems = problems_of(rows(), "rows", checker=checker)
    session = Session({MODEL: Student(0.1), other: Student(0.4)}, pool)
    results = evaluate(
        session,
        tmp_path / "eval",
        "rows",
        problems,
        [MODEL, other],
        STEP_PROMPTS["plain"],
        SAMPLING,
        num_samples,
        checker=checker,
        steps="label",
    )
    assert results["checker"] == "own.py:check"
    found = [json.loads(line) for line in (tmp_path / "eval" / "records.jsonl").read_text().splitlines()]
    for index, name in enumerate(("student", "other")):
        samples = [(row, sample) for row in found for sample in row["models"][name]["samples"]]
        values = {problem.id: problem.row["value"] for problem in problems}
        right = sum(
            f"boxed{{{values[row['id']]}}}" in sample["text"] and sample["outcome"] != "unreadable"
            for row, sample in samples
        )
        assert results["results"][index]["accuracy"] == pytest.approx(right / len(samples))
        assert all(sample["steps"] == sample["text"].count("Step") for _, sample in samples)
        assert "majority" not in results["results"][index]
    printed = table(results)
    assert ("mcnemar" in results["difference"]) == ("McNemar" in printed) == (num_samples == 1)
    assert ("No majority vote: the checker 'own.py:check' returns no answers" in printed) == (num_samples > 1)


def test_majority_vote_on_choices(tmp_path, pool):
    """Letters are compared as letters: `B` and `(B)` are one answer, and no math checker is asked."""

    class Chooser(Student):
        def answer(self, request):
            number = request.key.rpartition("/")[2]
            return Completion(["The answer is (B).", r"So \boxed{B}.", r"So \boxed{A}."][int(number)], "stop", 1, 1)

    problems = problems_of([{"problem": "Which?", "answer": gold, "id": gold} for gold in "ABC"], "rows")
    results = evaluate(
        Session({MODEL: Chooser()}, pool),
        tmp_path,
        "rows",
        problems,
        [MODEL],
        STEP_PROMPTS["plain"],
        SAMPLING,
        3,
        checker=resolve_checker("choice"),
    )
    assert results["results"][0]["solutions"] == {"right": 3, "wrong": 6, "unreadable": 0}
    assert results["results"][0]["majority"]["problems"] == {"right": 1, "wrong": 2, "unreadable": 0}
    assert not any("same/" in file.read_text() for file in tmp_path.glob("checks.*.jsonl"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("command", ["collect", "data", "eval"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checker", "mth"], "--checker 'mth' is not known. Did you mean 'math'?"),
        (["--checker", "absent.py:check"], "--checker 'absent.py:check': there is no file absent.py."),
        (["--steps", "lines"], "--steps 'lines' is not known. Did you mean 'line'?"),
        (["--steps", "(a"], "--steps '(a' is not a valid regular expression: missing ), unterminated subpattern"),
        (["--steps", r"\n*"], r"--steps '\\n*' matches the empty string"),
        (["--checker", "choice"], "1 gold answer cannot be compared with the letters A to E ('q1': '0')"),
        (
            ["--checker", "exact", "--problems", "no_answer.jsonl"],
            "1 row of no_answer.jsonl cannot be used: row 1: no",
        ),
        (["--problems", "no_answer.jsonl"], "1 row of no_answer.jsonl cannot be used: row 1: no `answer`"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, command, options, message):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "choices.jsonl",
        [{"id": "q0", "problem": "?", "answer": "A"}, {"id": "q1", "problem": "??", "answer": 0}],
    )
    write(tmp_path / "no_answer.jsonl", [{"problem": "?"}])
    given = ["--model", str(MODEL_PATH), "--output-dir", "run", "--problems", "choices.jsonl", *options]
    given += ["--output-file", "pairs.jsonl"] if command == "data" else []
    assert main([command, *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "settings.jsonl").exists()


@pytest.mark.parametrize(
    ("checker", "advice"), [("choice", "in \\boxed{}, or"), ("own.py:f", "as own.py:f reads them")]
)
def test_advice_for_unreadable_solutions(checker, advice):
    message = no_wrong_answers(Counter(unreadable=2), checker)
    assert advice in message
    assert ("boxed" in message) == (checker == "choice")


@pytest.mark.long
@pytest.mark.parametrize("command", ["collect", "data"])
def test_a_function_that_reads_no_solution(tmp_path, monkeypatch, capsys, command):
    """The advice is given once, and does not concern a box."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def check(problem, solution):\n    return None\n")
    write(tmp_path / "p.jsonl", [{"problem": "?"}])
    given = ["--checker", "own.py:check", "--problems", "p.jsonl", "--model", str(MODEL_PATH), "--output-dir", "run"]
    given += ["--prompt", "plain", "--max-new-tokens", "4", *(["--output-file", "o.jsonl"] * (command == "data"))]
    assert main([command, *given]) == (2 if command == "data" else 0)
    printed = capsys.readouterr().err
    assert printed.count("No wrong answers, but 2 unreadable and 0 right ones.") == 1
    assert "Use a --prompt that asks for solutions as own.py:check reads them, fix that function, or" in printed
    assert "boxed" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "arithmetic,rollout"], "The judge 'arithmetic' looks for false equations in mathematics, but"),
        (
            ["--check", "arithmetic"],
            "The judge 'arithmetic' looks for false equations in mathematics, but --checker is",
        ),
        (["--judge", "llm", "--judge-model", "m"], "The built-in prompt of the judge 'llm' is about mathematics"),
    ],
)
def test_judges_that_make_no_sense(tmp_path, monkeypatch, capsys, options, message, pool):
    """`data` refuses them before anything is sampled, and the single stages in a run of another task."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "words.jsonl", [{"problem": "?", "answer": "word"}])
    given = ["--checker", "exact", "--problems", "words.jsonl", "--model", "m", "--output-dir", "run"]
    assert main(["data", *given, "--output-file", "pairs.jsonl", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    session = Session({MODEL: Fixed(1)}, pool)
    problems = problems_of([{"problem": "?", "answer": "word"}], "rows")
    exact = resolve_checker("exact")
    session.collect(tmp_path / "run", problems, "words", MODEL, STEP_PROMPTS["plain"], SAMPLING, 1, checker=exact)
    session.localize(tmp_path / "run", "rollout", JudgeOptions(num_rollouts=1))
    stage = "rectify" if "--check" in options else "localize"
    assert main([stage, "run", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_loop_passes_both_options_to_its_stages(tmp_path, monkeypatch, checker):
    ran = []
    monkeypatch.setattr("stepdpo_trl.cli.loop._run", lambda folder, argv: ran.append(argv))
    monkeypatch.setattr(
        "stepdpo_trl.cli.loop.run_loop", lambda out, model, stages, make_pairs, *_: make_pairs(1, model, out)
    )
    task = ["--checker", checker.spelling, "--steps", "line"]
    words = ["--model", "m", "--problems", "p.jsonl", "--output-dir", str(tmp_path / "loop"), "--stages", "1"]
    assert main(["loop", *words, *task, "--", "--use_cpu", "true", "--bf16", "false"]) == 0
    assert ran[0][0] == "data"
    assert " ".join(task) in " ".join(ran[0])


def test_missing_answers_are_accepted_by_functions_only(checker):
    with pytest.raises(RunError, match="no `answer`"):
        problems_of(rows(2), "rows", checker=resolve_checker("exact"))
    problems = problems_of(rows(2), "rows", checker=checker)
    assert [problem.as_row() for problem in problems] == rows(2)
    given = {"problem": "?", "answer": ["a", "b"], "tests": {"x": [1, None]}}
    (problem,) = problems_of([given], "rows", checker=checker)
    assert (problem.answer, problem.as_row()) == ("", given)
    with pytest.raises(
        RunError, match="1 row of rows cannot be used: row 1: the column `when` cannot be stored as JSON"
    ):
        problems_of([{"problem": "?", "when": {1, 2}}], "rows", checker=checker)


def test_warnings_name_failures_once(tmp_path, pool, caplog):
    """Stages that read stored outcomes of failed checks count them again."""
    (tmp_path / "own.py").write_text("def check(problem, solution):\n    raise ValueError(solution[-4:])\n")
    checker = resolve_checker(f"{tmp_path / 'own.py'}:check")
    problems = problems_of(rows(4), "rows", checker=checker)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Session({MODEL: Student()}, pool).collect(
                tmp_path / "run", problems, "rows", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2, checker=checker
            )
        warned = [record.message for record in caplog.records if "failed on" in record.message]
        assert len(warned) == 1
        assert "failed on 8 solutions, which count as unreadable: 8 times the checker raised ValueError." in warned[0]
