"""The pipeline stages with a simulated student whose mistakes are known."""

import hashlib
import html
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
from datasets import Dataset

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.data.schema import StepPreference
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.generation import Completion, GenerationError, ModelSpec, Sampling
from stepdpo_trl.pipeline.build import build, run_directories, select_pairs
from stepdpo_trl.pipeline.build_record import make_record, read_build, write_build
from stepdpo_trl.pipeline.collect import read_solutions, wrong_solutions
from stepdpo_trl.pipeline.data_card import write_card, write_import_card
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.localize import agreement, localize, read_verdicts
from stepdpo_trl.pipeline.names import corrections_name
from stepdpo_trl.pipeline.records import Verdict, count_line, read_problems
from stepdpo_trl.pipeline.report import render_report
from stepdpo_trl.pipeline.row_files import describe_source
from stepdpo_trl.pipeline.run_model import model_of_run
from stepdpo_trl.pipeline.session import Session, check_settings
from stepdpo_trl.pipeline.stage_directory import read_times
from stepdpo_trl.pipeline.summary import Summary, costs_of, summarize, table_of
from stepdpo_trl.quickstart import ArithmeticProblem, first_lost_step
from stepdpo_trl.runs.run_directory import RunDirectory, RunError
from stepdpo_trl.runs.runner import TaskRunner

from ..simulated import Student, draw_records

MODEL = ModelSpec("student")
SAMPLING = Sampling(1.0, 1.0, 256)


@pytest.fixture(scope="module")
def checker():
    with Session() as session:
        yield session.checker


def run_all(
    path,
    checker,
    student=None,
    problems=None,
    judge_name="arithmetic,rollout",
    shard=(0, 1),
    num_samples=3,
    num_rollouts=8,
    **options,
):
    student = student or Student()
    session = Session({MODEL: student}, checker)
    problems = draw_records(30) if problems is None else problems
    session.collect(path, problems, "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, num_samples, shard=shard)
    session.localize(path, judge_name, JudgeOptions(num_rollouts=num_rollouts))
    session.rectify(path, **options)
    return student


def records(path):
    return {file.name: file.read_text() for file in sorted(path.glob("*.jsonl"))}


def test_pairs(tmp_path, checker):
    """All records of a run agree with the ground truth."""
    run_all(tmp_path, checker, judge_name="rollout", num_corrections=2)
    with RunDirectory(tmp_path) as run:
        solutions = list(read_solutions(run))
        wrong = wrong_solutions(run)
        verdicts = read_verdicts(run)[1]
    assert len(solutions) == 90
    for solution in solutions:
        assert (solution.outcome == "right") == solution.text.endswith(f"boxed{{{solution.problem.answer}}}.")
    located = {s.key: (s, verdicts[s.key].step) for s in wrong if verdicts[s.key].step}
    assert len(located) > 30
    right = sum(
        step == first_lost_step(ArithmeticProblem.parse(s.problem.problem), s.text) for s, step in located.values()
    )
    assert right / len(located) > 0.95  # some rollouts reach the right answer by luck
    rows, left_out = build([tmp_path])
    assert len(rows) > 30
    assert left_out["duplicate"] >= 0
    for row in rows:
        assert first_lost_step(
            ArithmeticProblem.parse(row["prompt"]), row["initial_reason_steps"] + row["full_chosen"]
        ) in (
            None,
            *range(99),
        )
        assert row["full_chosen"].startswith(row["chosen"])
        assert row["full_rejected"].startswith(row["rejected"])
        assert row["initial_reason_steps"].endswith(f"Step {row['step_index']}:")
        assert row["chosen_ends_solution"] == ("Step" not in row["full_chosen"])
        StepPreference.from_row(row, "row")


def test_samples_are_shared_by_all_stages(tmp_path, checker):
    """Samples of `collect` are rollouts from the beginning, and rollouts of the last right prefix are corrections."""
    student = run_all(tmp_path, checker, judge_name="rollout")
    assert len(student.asked) == len(set(student.asked))
    with RunDirectory(tmp_path) as run:
        asked = run.log("generations.policy")
        found = [f["key"] for c in run.logs("corrections").values() for r in c.values() for f in r["found"]]
        rollouts = sum(
            t for v in read_verdicts(run)[1].values() for t, _ in v.evidence["rollout"]["rollouts"].values()
        )
    assert set(asked) == set(student.asked)
    assert set(found) <= set(asked)
    assert len(asked) < 90 + rollouts  # some rollouts are samples of `collect`


def test_batches_of_a_resumed_run(tmp_path, checker):
    """Batches contain the requests that the same stage had sent before a kill, but not those of other stages."""

    class Batches(Student):
        def generate(self, requests, sampling, done):
            self.batches.append([request.key for request in requests])
            return super().generate(requests, sampling, done)

    def go(path):
        student = Batches()
        student.batches = []
        run_all(path, checker, student, judge_name="rollout", num_corrections=3)
        return student.batches

    whole = go(tmp_path / "whole")
    assert len([key for batch in whole for key in batch]) == len({key for batch in whole for key in batch})
    go(tmp_path / "cut")
    log = tmp_path / "cut" / "generations.policy.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    stages = [json.loads(line)["stage"] for line in lines]
    for stage in ("localize rollout", "rectify rollout"):
        log.write_text("".join(lines[: stages.index(stage) + 3]))  # keep three answers of the first round
        for name in ("verdicts.rollout", "corrections.rollout"):
            (tmp_path / "cut" / f"{name}.jsonl").unlink(missing_ok=True)
        rest = go(tmp_path / "cut")
        assert rest == whole[-len(rest) :]
        assert log.read_text() == "".join(lines)


def test_rerun_requests_nothing_and_changes_nothing(tmp_path, checker):
    run_all(tmp_path, checker)
    before = records(tmp_path)
    student = run_all(tmp_path, checker)
    assert student.asked == []
    assert records(tmp_path) == before


def latest(path):
    """Records of a run by file and key. The last record of a key counts."""
    lines = ((file.name, json.loads(line)) for file in path.glob("*.jsonl") for line in file.read_text().splitlines())
    return {(name, record.pop("key")): record for name, record in lines}


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"num_samples": 2}, {"num_samples": 3}),
        ({"max_attempts": 2}, {"max_attempts": 12}),
        ({"num_corrections": 1}, {"num_corrections": 3}),
        ({"num_rollouts": 1}, {"num_rollouts": 8}),
        (
            {"num_samples": 1, "max_attempts": 2, "num_rollouts": 2},
            {"num_samples": 2, "max_attempts": 9, "num_rollouts": 6, "num_corrections": 2},
        ),
    ],
)
def test_growing_equals_a_run_from_scratch(small, large, tmp_path, checker):
    """No sample is requested twice, and all results are those of a new run with the larger values."""
    options = {"judge_name": "rollout", "max_attempts": 8, "problems": draw_records(12)}
    student = Student(mistakes=0.4, wordings=3)
    run_all(tmp_path / "grown", checker, student, **{**options, **small})
    before = build([tmp_path / "grown"])[0]
    run_all(tmp_path / "grown", checker, student, **{**options, **large})
    assert len(student.asked) == len(set(student.asked))
    run_all(tmp_path / "whole", checker, Student(mistakes=0.4, wordings=3), **{**options, **large})
    grown, whole = latest(tmp_path / "grown"), latest(tmp_path / "whole")
    for kind in ("settings", "solutions", "verdicts", "problems"):
        assert {k: v for k, v in grown.items() if k[0].startswith(kind)} == {
            k: v for k, v in whole.items() if k[0].startswith(kind)
        }
    assert build([tmp_path / "grown"]) == build([tmp_path / "whole"])
    assert build([tmp_path / "grown"])[0] != before  # or the test would show nothing
    one, other = summarize([tmp_path / "grown"]), summarize([tmp_path / "whole"])
    assert (one.verdicts, one.corrections) == (other.verdicts, other.corrections)


@pytest.mark.parametrize(
    ("small", "stage", "differences"),
    [
        ({"num_samples": 2}, "`collect`", "num_samples: 3 in this run, 2 now"),
        ({"num_rollouts": 7}, "`localize arithmetic,rollout`", "num_rollouts: 8 in this run, 7 now"),
        ({"max_attempts": 19}, "`rectify arithmetic,rollout`", "max_attempts: 20 in this run, 19 now"),
        (
            {"num_corrections": 1, "max_attempts": 19},
            "`rectify arithmetic,rollout`",
            "num_corrections: 2 in this run, 1 now\n  max_attempts: 20 in this run, 19 now",
        ),
    ],
)
def test_shrinking_is_refused(small, stage, differences, tmp_path, checker):
    options = {"num_corrections": 2, "problems": draw_records(8)}
    run_all(tmp_path, checker, **options)
    before = records(tmp_path)
    with pytest.raises(RunError) as error:
        run_all(tmp_path, checker, **{**options, **small})
    assert str(error.value) == (
        f"{stage} in {tmp_path} has larger values:\n  {differences}\nThey can grow but not shrink. Pass at least the "
        "values of this run, or use another folder."
    )
    assert records(tmp_path) == before


def test_settings_of_later_stages_are_checked_first(tmp_path, checker):
    """Before `data` samples solutions, as a mistake would be reported only after them."""
    run_all(tmp_path, checker, problems=draw_records(8))
    before = records(tmp_path)
    judges, same = "arithmetic,rollout", (1, 20, None, JudgeOptions())
    check_settings(tmp_path, judges, *same)
    check_settings(tmp_path, "rollout", *same)  # not started yet
    check_settings(tmp_path / "none", judges, *same)
    check_settings(tmp_path, judges, 1, 20, None, JudgeOptions(), ModelSpec("another"))
    for other, message in (
        ((1, 20, None, JudgeOptions(num_rollouts=7)), "num_rollouts: 8 in this run, 7 now"),
        ((1, 19, None, JudgeOptions()), "max_attempts: 20 in this run, 19 now"),
        ((1, 20, "arithmetic", JudgeOptions()), "check: None in this run, 'arithmetic' now"),
    ):
        with pytest.raises(RunError, match=message):
            check_settings(tmp_path, judges, *other)
    assert records(tmp_path) == before
    assert not (tmp_path / "none").exists()


def test_corrections_of_replaced_verdicts_are_left_out(tmp_path, checker, caplog):
    """`build` between `localize` and `rectify` must not pair a step with the correction of another one."""
    student = Student(mistakes=0.35, wordings=3)
    run_all(tmp_path, checker, student, judge_name="rollout", num_rollouts=2)
    before = build([tmp_path])[0]
    Session({MODEL: student}, checker).localize(tmp_path, "rollout", JudgeOptions(num_rollouts=8))
    assert "Run `stepdpo rectify` again" not in caplog.text
    after = build([tmp_path])[0]
    assert "belong to verdicts that `localize` has replaced" in caplog.text
    assert 0 < len(after) < len(before)
    with RunDirectory(tmp_path) as run:
        located = {solution.text: read_verdicts(run)[1][solution.key].step for solution in wrong_solutions(run)}
    assert all(row["step_index"] == located[row["initial_reason_steps"] + row["full_rejected"]] for row in after)


class FailingGenerator(Student):
    """Generator of a server that cannot be reached."""

    def generate(self, requests, sampling, done):
        raise GenerationError("no connection")
        yield


def test_a_failed_first_attempt_does_not_lock_the_folder(tmp_path, checker):
    """Settings and problems are written with the first answer."""
    down = ModelSpec("unreachable")
    session = Session({MODEL: Student(), down: FailingGenerator()}, checker)
    problems, prompt = draw_records(8), STEP_PROMPTS["plain"]
    with pytest.raises(GenerationError):
        session.collect(
            tmp_path, problems, "other", down, STEP_PROMPTS["qwen2-boxed"], Sampling(0.5, 1.0, 64), 5, seed=1
        )
    assert records(tmp_path) == {}
    session.collect(tmp_path, problems, "drawn", MODEL, prompt, SAMPLING, 2)
    before = records(tmp_path)
    with pytest.raises(GenerationError):
        Session({MODEL: FailingGenerator()}, checker).collect(
            tmp_path, problems, "drawn", MODEL, prompt, SAMPLING, num_samples=9
        )
    with pytest.raises(GenerationError):
        session.localize(tmp_path, "llm", JudgeOptions(model=down, votes=3))
    assert records(tmp_path) == before
    session.localize(tmp_path, "arithmetic", JudgeOptions())
    with pytest.raises(GenerationError):
        session.rectify(tmp_path, max_attempts=9, rectifier=down)
    session.generators[down] = Student()
    assert session.rectify(tmp_path, max_attempts=3, rectifier=down)["pairs"]
    assert session.collect(tmp_path, problems, "drawn", MODEL, prompt, SAMPLING, num_samples=3)


def test_a_misspelled_model_does_not_lock_the_folder(chat_model, tmp_path, capsys):
    """A command with a misspelled path can be corrected and rerun in the same folder."""
    (tmp_path / "problems.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    command = ["collect", "--problems", str(tmp_path / "problems.jsonl"), "--output-dir", str(tmp_path / "run")]
    command += ["--max-new-tokens", "4"]
    assert main([*command, "--model", str(tmp_path / "nosuch")]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert main([*command, "--model", chat_model]) == 0


def test_time_is_added_up_over_resumes(tmp_path, checker):
    """A rerun that has nothing to do adds no time."""
    session = Session({MODEL: Student(delay=0.02)}, checker)
    arguments = (tmp_path, draw_records(6), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING)
    session.collect(*arguments, 2)
    first = read_times(tmp_path)["collect"]
    assert first >= 0.2
    session.collect(*arguments, 2)
    assert read_times(tmp_path) == {"collect": first}
    session.collect(*arguments, 4)
    assert read_times(tmp_path)["collect"] >= first + 0.2


def test_shards_merge(tmp_path, checker):
    """Four shards give the same pairs as a single run."""
    run_all(tmp_path / "whole", checker)
    for index in range(4):
        run_all(tmp_path / "parts" / f"shard-{index}-of-4", checker, shard=(index, 4))
    whole = build(run_directories(tmp_path / "whole"))[0]
    parts = build(run_directories(tmp_path / "parts"))[0]
    assert sorted(map(json.dumps, parts)) == sorted(map(json.dumps, whole))
    summary = summarize(run_directories(tmp_path / "parts"))
    assert summary.outcomes == summarize([tmp_path / "whole"]).outcomes
    (tmp_path / "parts" / "shard-2-of-4").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"lacks shards \[2\]"):
        run_directories(tmp_path / "parts")


def test_judge_expressions(tmp_path, checker):
    """`,` asks the next judge if the first abstains, `+` keeps the verdicts on which both agree."""
    session = Session({MODEL: Student()}, checker)
    session.collect(tmp_path, draw_records(30), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    for judge_name in ("arithmetic", "rollout", "arithmetic,rollout", "arithmetic+rollout"):
        session.localize(tmp_path, judge_name, JudgeOptions())
    with RunDirectory(tmp_path) as run:
        one, two, either, both = (
            {key: verdict.step for key, verdict in read_verdicts(run, judge_name)[1].items()}
            for judge_name in ("arithmetic", "rollout", "arithmetic,rollout", "arithmetic+rollout")
        )
        shared = agreement(run)["arithmetic", "rollout"]
    assert either == {key: one[key] or two[key] for key in one}
    assert both == {key: one[key] if one[key] == two[key] else None for key in one}
    located = [key for key in one if one[key] and two[key]]
    assert shared == {"both": len(located), "same": sum(one[key] == two[key] for key in located)}
    with pytest.raises(RunError, match="several judges"):
        session.rectify(tmp_path)


def test_human_and_llm_judges(tmp_path, checker, monkeypatch):
    """Labels and replies are kept in separate files."""
    from stepdpo_trl.pipeline.judges import human_page

    truth = {}

    def label(items, answers, port=None):
        for item in items:
            truth[item.key] = step = len(item.steps) if item.key.endswith("0") else None
            if item.key not in answers:
                answers.append(item.key, {"step": step, "skipped": step is None})

    class Judge(Student):
        def answer(self, request):
            content = request.prompt[0]["content"]
            assert "[Correct answer]" in content
            return Completion(f"\\boxed{{{content.count('</step_')}}}", "stop", 1, 1)

    monkeypatch.setattr(human_page, "label", label)
    judge = ModelSpec("judge")
    session = Session({MODEL: Student(), judge: Judge()}, checker)
    session.collect(tmp_path, draw_records(20), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    session.localize(tmp_path, "human+llm", JudgeOptions(model=judge))
    with RunDirectory(tmp_path) as run:
        verdicts = read_verdicts(run)[1]
        assert len(run.log("labels")) == len(verdicts) == len(truth) > 5
        (log,) = (log for name, log in run.logs("generations").items() if name.startswith("judge-"))
        assert len(log) == sum(step is not None for step in truth.values())
    assert {key: verdict.step for key, verdict in verdicts.items()} == truth
    # This judge finds the last step of every solution wrong, so no correction of a last step passes
    counts = session.rectify(tmp_path, max_attempts=4, check="llm", options=JudgeOptions(model=judge))
    assert counts["dropped"] > 0
    assert counts["pairs"] == 0


def test_num_corrections_and_max_attempts(tmp_path, checker):
    student = run_all(tmp_path, checker, Student(mistakes=0.5), num_corrections=3, max_attempts=5)
    with RunDirectory(tmp_path) as run:
        log = next(iter(run.logs("corrections").values()))
    assert max(record["samples"] for record in log.values()) == 5
    assert max(len(record["found"]) for record in log.values()) <= 3
    assert student.asked


def test_rectified_by_another_model(tmp_path, checker):
    """Samples of another model are kept in their own file."""
    run_all(tmp_path, checker)
    other = ModelSpec("org/teacher")
    teacher = Student(mistakes=0.0)
    session = Session({MODEL: Student(), other: teacher}, checker)
    session.rectify(tmp_path, rectifier=other)
    with RunDirectory(tmp_path) as run:
        sets = list(run.logs("corrections"))
        (log,) = (log for name, log in run.logs("generations").items() if name.startswith("rectifier-teacher-"))
        assert set(log) == set(teacher.asked)
    own, others = sorted(sets, key=len)
    assert own == "arithmetic,rollout"
    assert others.startswith(f"{own}.by-teacher-")
    with pytest.raises(RunError, match="several sets of corrections"):
        build([tmp_path])
    assert build([tmp_path], others)[0]


def test_selection():
    def row(problem, prefix, chosen, rejected):
        return {
            "prompt": f"{problem}?",
            "initial_reason_steps": prefix,
            "chosen": chosen,
            "rejected": rejected,
            "problem_id": problem,
        }

    from stepdpo_trl.pipeline.records import Problem

    problems = {name: Problem(name, f"What is {name}?", "1") for name in "abc"}
    rows = [
        row("a", "Step 1:", " x = 1", " x = 2"),
        row("a", "Step 1:", " x  = 1.", " X = 2"),  # differs in spaces, case and final period only
        row("a", "Step 1:", " y = 1", " x = 2"),  # another correction of the first error
        row("a", "Step 1: u\nStep 2:", " x = 1", " x = 2"),  # another error
        row("b", "Step 1:", " x = 1", " x = 2"),
        row("c", "Step 1:", " x = 1", " x = 2"),
    ]
    kept, left_out = select_pairs(rows, problems, ["what is  B ?"], max_pairs_per_problem=2)
    assert list(kept) == [0, 3, 5]
    assert left_out == {"duplicate": 1, "above the limit per problem": 1, "in a test set": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "What is 1 + 1?"}', "row 1: no `answer`"),
        ('{"problem": "What is 1 + 1?", "answer": ""}', "row 1: no `answer`"),
        ('{"question": "What is 1 + 1?", "answer": "It is ####  "}', "no final answer after `####`"),
        ('{"task": "What is 1 + 1?", "answer": "2"}', "no column `problem`"),
        ('{"problem": " ", "answer": "2"}', "`problem` is empty"),
        ('{"id": 1, "problem": "a", "answer": "2"}\n{"id": 1, "problem": "b", "answer": "2"}', "same id '1' as row 1"),
        ('{"problem": "a", "answer": "2"}\n{"problem": "a", "answer": "2"}', "same text as row 1"),
        ('{"problem": 5, "answer": "2"}', r"`problem` is not text \(5\)"),
        ('{"problem": "a\\ud800", "answer": "2"}', "row 1: contains text that cannot be encoded"),
        ('{"problem": "a", ', "Line 1 of .* is not JSON"),
        (
            '{"problem": "a", "answer": "2", "images": []}\n{"problem": "b", "answer": "2", "images": ["b.png"]}',
            "Row 2 of .* has a column `images`, but problems must be text: remove the problems with images",
        ),
        ("[1]", "is not an object"),
        ("", "has no problems"),
    ],
)
def test_invalid_problems(tmp_path, content, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        read_problems(path)


def test_parquet_problems_are_read_again_after_a_change_at_the_same_time(tmp_path):
    """Nor is another file read whose name fits `problems[1].parquet` as a pattern."""
    path = tmp_path / "problems[1].parquet"
    for number in (7, 8):
        Dataset.from_list([{"problem": f"{number}?", "answer": str(number)}]).to_parquet(str(path))
        os.utime(path, (0, 0))
        assert [problem.answer for problem in read_problems(path)] == [str(number)]
    Dataset.from_list([{"problem": "9?", "answer": "9"}]).to_parquet(str(tmp_path / "problems1.parquet"))
    assert [problem.answer for problem in read_problems(path)] == ["8"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match="cannot be read as Parquet"):
        read_problems(path)


def test_gsm8k_problems(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(
        "\ufeff"
        + json.dumps({"id": None, "question": "How many?", "answer": "Add.\u2028Then 1+1 = <<1+1=2>>2\n#### 2"})
    )
    (problem,) = read_problems(path)
    assert problem.id != "None"
    assert (problem.problem, problem.answer, problem.solution) == (
        "How many?",
        "2",
        "Add.\u2028Then 1+1 = <<1+1=2>>2",
    )
    with pytest.raises(RunError, match=r"Did you mean .*gsm8k.jsonl"):
        read_problems(tmp_path / "gms8k.jsonl")


def test_gold_answers_that_cannot_be_parsed(tmp_path, checker):
    student = Student()
    problems = [*draw_records(2), type(draw_records(1)[0])("odd", "What is 1 + 1?", "\\frac{1}{")]
    with pytest.raises(RunError, match=r"1 gold answer cannot be read .*'odd'"):
        run_all(tmp_path, checker, student, problems)
    assert student.asked == []


def test_warning_if_all_samples_are_the_same(tmp_path, checker, caplog):
    student = Student()
    student.answer = lambda request, answer=student.answer: answer(replace(request, seed=0))
    session = Session({MODEL: student}, checker)
    session.collect(tmp_path, draw_records(5), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    assert "the model is not sampled" in caplog.text


def test_no_wrong_answers(tmp_path, checker):
    session = Session({MODEL: Student(mistakes=0.0)}, checker)
    session.collect(tmp_path, draw_records(3), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    with pytest.raises(RunError, match="harder problems"):
        session.localize(tmp_path, "arithmetic", JudgeOptions())


def test_refused_and_truncated_solutions(tmp_path, checker):
    ends = {"p0": "refused", "p1": "length", "p2": "stop"}
    student = Student()
    student.answer = lambda request: Completion("It is 5, as", ends[request.key.partition("/")[0]], 1, 1)
    session = Session({MODEL: student}, checker)
    counts = session.collect(tmp_path, draw_records(3), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    assert counts == {"unreadable": 6}
    expected = {"refused by the server": 2, "cut at max_new_tokens": 2, "no final answer": 2}
    assert summarize([tmp_path]).unreadable == expected


def test_unreadable_answers(tmp_path, checker):
    session = Session({MODEL: Student(unreadable=1.0)}, checker)
    counts = session.collect(tmp_path, draw_records(3), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    assert counts == {"unreadable": 6}
    with pytest.raises(RunError, match=r"Unreadable solutions cannot be used.* for the final answer in \\boxed\{\}"):
        session.localize(tmp_path, "arithmetic", JudgeOptions())


@pytest.mark.parametrize(
    ("judge_name", "options", "message"),
    [
        ("roll-out", JudgeOptions(), "Did you mean 'rollout'"),
        ("rollout+rollout", JudgeOptions(), "contains a judge twice"),
        ("llm", JudgeOptions(), "--judge-model"),
        ("prm", JudgeOptions(), "--prm"),
        ("rollout", JudgeOptions(num_rollouts=0), "num_rollouts=0"),
        ("prm", JudgeOptions(prm="p", threshold=7.0), "threshold=7.0 is a probability"),
        ("llm", JudgeOptions(model=MODEL, prompt="{{ problem }}"), "does not contain the steps"),
        ("llm", JudgeOptions(model=MODEL, prompt="{{ steps }} {{ probelm }}"), "cannot be filled"),
    ],
)
def test_invalid_judge_options(tmp_path, checker, judge_name, options, message):
    with pytest.raises(RunError, match=message):
        Session({}, checker).localize(tmp_path, judge_name, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bfloat16", "--base-url", "http://localhost:1/v1"], "--dtype has no effect at a server"),
        (["--api-key-env", "KEY"], "--api-key-env has no effect without a server"),
        (["--judge-dtype", "bfloat16", "--judge-base-url", "http://localhost:1/v1"], "--judge-dtype has no effect"),
    ],
)
def test_options_without_effect(tmp_path, capsys, options, message):
    (tmp_path / "p.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    command = ["data", "--model", "m", "--problems", str(tmp_path / "p.jsonl"), "--output-dir", str(tmp_path / "run")]
    assert main([*command, "--output-file", "x.jsonl", "--judge-model", "j", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge-model", "j"], "--judge-model has no effect: 'llm' is not one of the judges"),
        (["--prm", "p"], "--prm has no effect: 'prm' is not one of the judges"),
        (["--num-rollouts", "4"], "--num-rollouts has no effect: 'rollout' is not one of the judges"),
        (["--no-gold"], "--no-gold has no effect"),
        (["--threshold", "0.6"], "--threshold has no effect"),
    ],
)
def test_options_of_other_judges(tmp_path, capsys, options, message):
    """The run would use another judge than the user expects."""
    (tmp_path / "p.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    data = ["data", "--model", "m", "--problems", str(tmp_path / "p.jsonl"), "--output-dir", str(tmp_path / "run")]
    data += ["--output-file", "x.jsonl", "--judge", "arithmetic"]
    assert main([*data, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["localize", str(tmp_path), "--judge", "arithmetic", *options]) == 2
    assert message in capsys.readouterr().err
    used = {"--judge-model": "llm", "--no-gold": "llm", "--threshold": "prm", "--prm": "prm"}.get(options[0])
    if used:  # a judge of the check counts as well
        more = {"llm": ["--judge-model", "j"], "prm": ["--prm", "p"]}[used]
        assert main([*data, *options, *more, "--check", f"arithmetic,{used}", "--dry-run"]) == 0


def test_count_lines():
    counts = {"wrong": 1700, "unreadable": 1, "right": 23}
    assert count_line("collect", "run", counts) == "collect in run: 23 right, 1,700 wrong, 1 unreadable"
    counts = {"given up": 1, "dropped": 0, "rectified": 2, "pairs": 2, "samples": 9}
    assert count_line("rectify", "run", counts) == (
        "rectify in run: 2 corrected, 1 given up, 9 samples, 2 pairs, 0 dropped by the check"
    )
    assert count_line("localize", "run", {}) == "localize in run: nothing to do"


def test_names_of_corrections(tmp_path, checker):
    """`data` builds from the corrections that its `rectify` wrote, even if the run has others."""
    other = ModelSpec("there/other")
    session = Session({MODEL: Student(), other: Student()}, checker)
    session.collect(tmp_path, draw_records(10), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    for judge_name in ("arithmetic", " arithmetic , rollout"):
        session.localize(tmp_path, judge_name, JudgeOptions())
        for rectifier in (None, other):
            session.rectify(tmp_path, judge_name.strip(), rectifier=rectifier)
            assert build([tmp_path], corrections_name(judge_name, rectifier))[0]


def test_stages_out_of_order(tmp_path, checker):
    session = Session({MODEL: Student()}, checker)
    with pytest.raises(RunError, match="is not the folder of a run"):
        session.localize(tmp_path / "none", "arithmetic", JudgeOptions())
    with pytest.raises(RunError, match="Run `stepdpo collect` first"):
        session.localize(tmp_path, "arithmetic", JudgeOptions())
    session.collect(tmp_path, draw_records(5), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    with pytest.raises(RunError, match="Run `stepdpo localize` first"):
        session.rectify(tmp_path)
    with pytest.raises(RunError, match="Run `stepdpo rectify` first"):
        build([tmp_path])


def test_changed_settings_are_refused(tmp_path, checker):
    session = Session({MODEL: Student()}, checker)
    arguments = (tmp_path, draw_records(5), "drawn", MODEL, STEP_PROMPTS["plain"])
    session.collect(*arguments, SAMPLING, 2)
    before = records(tmp_path)
    with pytest.raises(RunError, match=r"settings:\n  sampling.temperature: 1.0 in this run, 0.5 now\nUse .* folder"):
        session.collect(*arguments, Sampling(0.5, 1.0, 256), 2)
    with pytest.raises(RunError, match=r"settings:\n  seed: 0 in this run, 1 now\n"):
        session.collect(*arguments, SAMPLING, 2, seed=1)
    assert records(tmp_path) == before


def served(port, **options):
    return ModelSpec("student", "openai", f"http://localhost:{port}/v1", **options)


def test_a_run_remembers_its_server(tmp_path, checker, caplog, monkeypatch):
    """Its address is used by later stages, replaced by --base-url without the other settings, and not published."""
    monkeypatch.setenv("SERVER_KEY", "sk-secret")
    options = {"max_concurrent_requests": 7, "api_key_env": "SERVER_KEY"}
    first, moved, second = Student(), Student(), Student()
    students = {served(port, **options): student for port, student in enumerate((first, moved, second), 1)}
    session = Session(students, checker)
    collect = ("drawn", STEP_PROMPTS["plain"], SAMPLING)
    session.collect(tmp_path, draw_records(8), collect[0], served(1, **options), *collect[1:])
    session.localize(tmp_path, "rollout", JudgeOptions())
    assert f"{tmp_path}: using the server at http://localhost:1/v1, as in `collect`. Pass --base-url" in caplog.text
    caplog.clear()
    session.rectify(tmp_path, num_corrections=3, model={"backend": "openai", "base_url": "http://localhost:3/v1"})
    assert second.asked
    assert f"{tmp_path}: using the server at http://localhost:3/v1 instead of http://localhost:1/v1.\n" in caplog.text
    session.collect(tmp_path, draw_records(8), collect[0], served(2, **options), *collect[1:])
    session.rectify(tmp_path, num_corrections=4, max_attempts=30)
    assert moved.asked
    assert "using the server at http://localhost:2/v1" in caplog.text
    assert "sk-secret" not in "".join(records(tmp_path).values())
    assert "localhost" not in write_card(summarize([tmp_path]), make_record("pairs.jsonl", [], {}), None)
    assert "localhost" not in render_report(summarize([tmp_path]), None)


NOT_SENT = " The API key in SERVER_KEY is not sent to this host, unless you pass --api-key-env SERVER_KEY."


@pytest.mark.parametrize(
    ("changes", "environment", "expected", "said"),
    [
        ({"base_url": "http://a:9/v1"}, {}, ("SERVER_KEY", 7), ""),
        ({"base_url": "http://A:1/v1"}, {}, ("SERVER_KEY", 7), ""),
        ({"base_url": "http://b:1/v1"}, {}, ("OPENAI_API_KEY", 7), NOT_SENT),
        ({"base_url": "https://a:1/v1"}, {}, ("OPENAI_API_KEY", 7), NOT_SENT),
        (
            {"base_url": "http://b:1/v1"},
            {"OPENAI_API_KEY": "sk-other"},
            ("OPENAI_API_KEY", 7),
            f"{NOT_SENT} The API key in OPENAI_API_KEY is sent to it.",
        ),
        ({"base_url": "http://b:1/v1", "api_key_env": "SERVER_KEY"}, {}, ("SERVER_KEY", 7), ""),
        ({"base_url": "http://b:1/v1", "max_concurrent_requests": 3}, {}, ("OPENAI_API_KEY", 3), NOT_SENT),
        ({"base_url": "http://a:1/v1"}, {}, ("SERVER_KEY", 7), None),
        ({"max_concurrent_requests": 3}, {}, ("SERVER_KEY", 3), None),
    ],
)
def test_settings_of_a_server_at_another_address(
    tmp_path, checker, caplog, monkeypatch, changes, environment, expected, said
):
    """They are kept. Only the key is for the host that it was passed for."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, key in {"SERVER_KEY": "sk-secret", **environment}.items():
        monkeypatch.setenv(name, key)
    model = ModelSpec("m", "openai", "http://a:1/v1", max_concurrent_requests=7, api_key_env="SERVER_KEY")
    session = Session({model: Student()}, checker)
    session.collect(tmp_path, draw_records(1), "drawn", model, STEP_PROMPTS["plain"], SAMPLING)
    caplog.clear()
    with RunDirectory(tmp_path) as run:
        found = model_of_run(run, {"backend": "openai", **changes})
    assert (found.api_key_env, found.max_concurrent_requests) == expected
    assert found.base_url == changes.get("base_url", "http://a:1/v1")
    address = f"using the server at {found.base_url} instead of http://a:1/v1."
    assert [record.message for record in caplog.records if "instead of" in record.message] == (
        [] if said is None else [f"{tmp_path}: {address}{said}"]
    )


def test_a_key_passed_as_the_name_of_its_variable_is_not_kept(tmp_path, checker):
    model = served(1, api_key_env="sk-secret")
    session = Session({model: Student()}, checker)
    session.collect(tmp_path, draw_records(5), "drawn", model, STEP_PROMPTS["plain"], SAMPLING)
    assert "localhost:1" in records(tmp_path)["settings.jsonl"]
    assert "sk-secret" not in "".join(records(tmp_path).values())


def test_a_server_whose_address_is_unknown(tmp_path, checker):
    """Runs of earlier releases do not contain it."""
    session = Session({served(1): Student()}, checker)
    session.collect(tmp_path, draw_records(5), "drawn", served(1), STEP_PROMPTS["plain"], SAMPLING)
    settings = tmp_path / "settings.jsonl"
    settings.write_text("".join(line for line in settings.read_text().splitlines(True) if '"server"' not in line))
    with pytest.raises(RunError, match=r"address is not in the run\. Pass it as --base-url"):
        session.localize(tmp_path, "rollout", JudgeOptions())


def test_custom_judges(tmp_path, checker):
    """Verdicts of a custom judge, such as one that picks random steps for comparison, can be rectified."""
    session = Session({MODEL: Student()}, checker)
    session.collect(tmp_path, draw_records(20), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)

    def last_step(solution):
        return Verdict(len(split_steps(solution.text)), "last", {})
        yield

    with RunDirectory(tmp_path) as run:
        localize(TaskRunner(run, "localize last"), last_step, "last")
    session.rectify(tmp_path, "last")
    assert build([tmp_path], "last")[0]
    assert summarize([tmp_path]).verdicts["last"]["located"] > 10


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checker):
    """Run folder with all stages, and a source of the problems."""
    path = tmp_path_factory.mktemp("finished")
    (path / "problems.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    session = Session({MODEL: Student(unreadable=0.1)}, checker)
    source = describe_source(path / "problems.jsonl")
    collect = (path / "run", draw_records(30), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 3)
    session.collect(*collect, source=source)
    session.localize(path / "run", "arithmetic,rollout", JudgeOptions())
    session.rectify(path / "run")
    return path / "run"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_table(finished, width):
    """Columns are aligned and no line is too long, with long names too."""
    rows, _ = build([finished])
    record = make_record("pairs.jsonl", rows, {"duplicate": 7, "in a test set": 1234567})
    summary = summarize([finished])
    name = "arithmetic,rollout+llm.by-Qwen2_5-Math-72B-Instruct-abcdef"
    summary.corrections[name] = summary.corrections["arithmetic,rollout"]
    summary.stages["rectify " + name.replace(".by-", " by ")] = summary.stages["collect"]
    lines = table_of(summary, record, width).splitlines()
    assert max(map(len, lines)) <= width
    head = lines[0]
    ends = [head.index(column) + len(column) for column in ("count", "tokens", "requests", "minutes")]
    for line in lines[1:]:
        for number in re.finditer(r"(?<=  )[\d,.]*\d(?=  |$)", line[ends[0] - 9 :]):
            assert number.end() + ends[0] - 9 in ends, line
    text = " ".join(" ".join(lines).split())
    for words in ("problems 30", "solutions, wrong", "located", "corrected", "dropped: duplicate 7", "total"):
        assert words in text
    assert f"pairs {len(rows)}" in text


def test_costs(finished):
    """Requests and tokens of all stages are those of the log of answers."""
    with RunDirectory(finished) as run:
        answers = list(run.log("generations.policy").values())
    *stages, total = costs_of(summarize([finished]))
    assert [name for name, *_ in stages] == ["collect", "localize arithmetic,rollout", "rectify arithmetic,rollout"]
    assert sum(requests for _, requests, *_ in stages) == total[1] == len(answers)
    assert total[2] == sum(answer["prompt_tokens"] for answer in answers)
    assert total[3] == sum(answer["tokens"] for answer in answers)
    assert total[4] == pytest.approx(sum(minutes for *_, minutes in stages))
    assert stages[0][1] == 90


def test_reported_tokens_that_are_not_numbers(finished, tmp_path, capsys):
    """Runs of earlier releases may hold whatever a server reported. They can be read, and the report says so."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "lock").unlink()
    answers = run / "generations.policy.jsonl"
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    bad = ["3", float("nan"), float("inf"), [3], {}, -1, True, 3.5, 10**30, None, 0]
    for record, value in zip(records, bad, strict=False):
        record.update(prompt_tokens=value, tokens=value)
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    known = sum(record["tokens"] for record in records[len(bad) :])
    assert costs_of(summarize([run]))[-1][3] == known
    note = f"The tokens are incomplete: for {len(bad)} of {len(records)} requests, the server did not report them."
    for command in (["report", str(run)], ["build", str(run), "--output-file", str(tmp_path / "pairs.jsonl")]):
        assert main(command) == 0
        assert note in " ".join(capsys.readouterr().out.split())
        assert note in (run / "report.html").read_text()
    assert "incomplete" not in table_of(summarize([finished]))


def test_report_after_build(finished, tmp_path, capsys):
    """`stepdpo report` keeps the counts of the last build."""
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": draw_records(1)[0].problem}) + "\n")
    target = tmp_path / "pairs.jsonl"
    assert main(["build", str(finished), "--output-file", str(target), "--exclude", str(tmp_path / "test.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "dropped: in a test set" in printed
    assert f"Pairs: {target}" in printed
    lines = printed.splitlines()
    assert lines[0].startswith(f"build in {finished}: {len(target.read_text().splitlines())} pairs, ")
    assert "dropped (in a test set)" in lines[0]
    assert max(map(len, lines[1:-2])) <= 80
    built = (finished / "report.html").read_text()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_text() == built
    assert "dropped: in a test set" in built
    record = read_build(finished)
    pairs = [json.loads(line) for line in target.read_text().splitlines()]
    assert record.pairs == len(pairs)
    assert len(record.examples) == 3
    for example in record.examples:
        assert example in [{column: pair[column] for column in example} for pair in pairs]
        for text in example.values():
            assert html.escape(text) in built
    for words in ("Glossary", "Cost per pipeline stage", "minutes", "Position of the first wrong step"):
        assert words in built


def test_report_without_build(finished):
    page = render_report(summarize([finished]))
    assert page.count("<div class=pair>") == 3
    assert "Glossary" in page
    assert render_report(Summary())


def test_report_of_another_folder(tmp_path, capsys):
    """Such as that of `eval`, which has problems but no solutions."""
    (tmp_path / "problems.jsonl").write_text('{"key": "p", "problem": "1 + 1?", "answer": "2"}\n')
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no solutions yet. Run `stepdpo collect` first." in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("model", "pairs", "license", "size", "base_model"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 999, None, "n<1K", ["Qwen/Qwen2.5-7B-Instruct"]),
        ("outputs/../model", 1000, "cc-by-4.0", "1K<n<10K", None),
        ("served", 20000, "mit", "10K<n<100K", None),
    ],
)
def test_data_card(finished, model, pairs, license, size, base_model):
    """The metadata is valid YAML with the fields of the Hub; the origin of the pairs is in the text."""
    from huggingface_hub import DatasetCard

    summary = summarize([finished])
    summary.settings["collect"]["model"]["model"] = model
    record = replace(make_record("pairs.jsonl", [], {"duplicate": 2}), pairs=pairs)
    card = DatasetCard(write_card(summary, record, license))
    data = card.data.to_dict()
    assert data["language"] == ["en"]
    assert data["size_categories"] == [size]
    assert data["task_categories"] == ["text-generation"]
    assert "step-dpo" in data["tags"]
    assert data.get("license") == license
    assert data.get("base_model") == base_model
    source = finished.parent / "problems.jsonl"
    assert f"| problems | `{source}` |" in card.text
    assert hashlib.sha256(source.read_bytes()).hexdigest() in card.text
    for package in ("stepdpo_trl", "transformers", "torch"):
        assert re.search(rf"^\| {package} \| \d", card.text, re.M)
    assert f"| build | pairs | {pairs:,} |" in card.text
    assert "| build | dropped: duplicate | 2 |" in card.text


def test_data_card_of_imported_data():
    from huggingface_hub import DatasetCard

    card = DatasetCard(write_import_card("prm800k", {"pairs": 5}, 5))
    assert card.data.size_categories == ["n<1K"]
    assert "| pairs | 5 |" in card.text


def test_record_of_a_build(tmp_path):
    assert read_build(tmp_path) is None
    rows = [{"prompt": f"{n}?", "initial_reason_steps": "", "chosen": "a", "rejected": "b", "x": 1} for n in range(10)]
    record = make_record("pairs.jsonl", rows, {"duplicate": 1})
    write_build(tmp_path, record)
    assert read_build(tmp_path) == record
    assert [example["prompt"] for example in record.examples] == ["0?", "3?", "6?"]
