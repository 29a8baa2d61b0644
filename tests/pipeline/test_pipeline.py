"""From problems to step pairs with a made-up student, whose mistakes are known."""

import json
from dataclasses import replace

import pytest

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.data.schema import StepPreference
from stepdpo_trl.generation import Completion, ModelSpec, Sampling
from stepdpo_trl.pipeline.build import build, run_directories, select_pairs
from stepdpo_trl.pipeline.collect import read_solutions, wrong_solutions
from stepdpo_trl.pipeline.localize import agreement, read_verdicts
from stepdpo_trl.pipeline.records import read_problems
from stepdpo_trl.pipeline.session import JudgeOptions, Session, corrections_name
from stepdpo_trl.pipeline.summary import summarize
from stepdpo_trl.quickstart import ArithmeticProblem, first_lost_step
from stepdpo_trl.runs.run_directory import RunDirectory, RunError

from ..simulated import Student, draw_records

MODEL = ModelSpec("student")
SAMPLING = Sampling(1.0, 1.0, 256)


@pytest.fixture(scope="module")
def checker():
    with Session() as session:
        yield session.checker


def run_all(
    path, checker, student=None, problems=None, judge_name="arithmetic,rollout", shard=(0, 1), num_samples=3, **options
):
    student = student or Student()
    session = Session({MODEL: student}, checker)
    problems = draw_records(30) if problems is None else problems
    session.collect(path, problems, "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, num_samples, shard=shard)
    session.localize(path, judge_name, JudgeOptions())
    session.rectify(path, **options)
    return student


def records(path):
    return {file.name: file.read_text() for file in sorted(path.glob("*.jsonl"))}


def test_pairs(tmp_path, checker):
    """Every number of the run, against the truth."""
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
    assert right / len(located) > 0.95  # luck makes some wrong steps good
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


def test_a_prefix_is_sampled_once_in_all_stages(tmp_path, checker):
    """Samples of `collect` are rollouts from the beginning; rollouts of the last right prefix are corrections."""
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
    assert len(asked) < 90 + rollouts  # some rollouts cost nothing


def test_batches_are_those_of_an_unbroken_run(tmp_path, checker):
    """What a stage had asked before a kill is in its batches again, as done; what other stages asked is not."""

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
        log.write_text("".join(lines[: stages.index(stage) + 3]))  # three answers of its first round
        for name in ("verdicts.rollout", "corrections.rollout"):
            (tmp_path / "cut" / f"{name}.jsonl").unlink(missing_ok=True)
        rest = go(tmp_path / "cut")
        assert rest == whole[-len(rest) :]
        assert log.read_text() == "".join(lines)


def test_again_asks_nothing_and_changes_nothing(tmp_path, checker):
    run_all(tmp_path, checker)
    before = records(tmp_path)
    student = run_all(tmp_path, checker)
    assert student.asked == []
    assert records(tmp_path) == before


def test_more_samples_go_on(tmp_path, checker):
    run_all(tmp_path, checker, num_samples=2)
    student = run_all(tmp_path, checker, num_samples=3)
    run_all(tmp_path / "whole", checker, num_samples=3)
    assert student.asked
    assert build([tmp_path])[0] == build([tmp_path / "whole"])[0]


def test_shards_merge(tmp_path, checker):
    """The pairs of four shards are those of one run."""
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


def test_judges_combined(tmp_path, checker):
    """`>` asks where the first is silent, `+` keeps what both say."""
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
    speaking = [key for key in one if one[key] and two[key]]
    assert shared == {"both": len(speaking), "same": sum(one[key] == two[key] for key in speaking)}
    with pytest.raises(RunError, match="several judges"):
        session.rectify(tmp_path)


def test_a_person_and_a_language_model_judge(tmp_path, checker, monkeypatch):
    """Both through the session: the person's answers are kept apart, the judge's replies too."""
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
    # The same judge says that the last step of every solution is wrong: no correction of a last step passes
    counts = session.rectify(tmp_path, max_attempts=4, check="llm", options=JudgeOptions(model=judge))
    assert counts["dropped"] > 0
    assert counts["pairs"] == 0


def test_wanted_and_most(tmp_path, checker):
    student = run_all(tmp_path, checker, Student(mistakes=0.5), num_corrections=3, max_attempts=5)
    with RunDirectory(tmp_path) as run:
        log = next(iter(run.logs("corrections").values()))
    assert max(record["samples"] for record in log.values()) == 5
    assert max(len(record["found"]) for record in log.values()) <= 3
    assert student.asked


def test_rectified_by_another_model(tmp_path, checker):
    """Preferred steps out of distribution: the samples are another model's, and kept apart."""
    run_all(tmp_path, checker)
    other = ModelSpec("org/teacher")
    teacher = Student(mistakes=0.0)
    session = Session({MODEL: Student(), other: teacher}, checker)
    session.rectify(tmp_path, rectifier=other)
    with RunDirectory(tmp_path) as run:
        ways = list(run.logs("corrections"))
        (log,) = (log for name, log in run.logs("generations").items() if name.startswith("rectifier-teacher-"))
        assert set(log) == set(teacher.asked)
    own, others = sorted(ways, key=len)
    assert own == "arithmetic,rollout"
    assert others.startswith(f"{own}.by-teacher-")
    with pytest.raises(RunError, match="several kinds of corrections"):
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
        row("a", "Step 1:", " x  = 1.", " X = 2"),  # the same but for spaces, case and full stop
        row("a", "Step 1:", " y = 1", " x = 2"),  # another way to correct the first error
        row("a", "Step 1: u\nStep 2:", " x = 1", " x = 2"),  # another error
        row("b", "Step 1:", " x = 1", " x = 2"),
        row("c", "Step 1:", " x = 1", " x = 2"),
    ]
    kept, left_out = select_pairs(rows, problems, ["what is  B ?"], max_pairs_per_problem=2)
    assert kept == [rows[0], rows[3], rows[5]]
    assert left_out == {"duplicate": 1, "more than enough of a problem": 1, "in a test set": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "What is 1 + 1?"}', "row 1: has no `answer`"),
        ('{"problem": "What is 1 + 1?", "answer": ""}', "row 1: has no `answer`"),
        ('{"question": "What is 1 + 1?", "answer": "It is ####  "}', "nothing behind `####`"),
        ('{"task": "What is 1 + 1?", "answer": "2"}', "has no `problem`"),
        ('{"problem": " ", "answer": "2"}', "`problem` is empty"),
        ('{"id": 1, "problem": "a", "answer": "2"}\n{"id": 1, "problem": "b", "answer": "2"}', "the id '1' again"),
        ('{"problem": "a", "answer": "2"}\n{"problem": "a", "answer": "2"}', "the text of row 1 again"),
        ('{"problem": 5, "answer": "2"}', r"`problem` is no text \(5\)"),
        ('{"problem": "a\\ud800", "answer": "2"}', "row 1: is no text that can be written"),
        ('{"problem": "a", ', "Line 1 of .* is not JSON"),
        ("[1]", "is not an object"),
        ("", "has no problems"),
    ],
)
def test_problems_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        read_problems(path)


def test_problems_as_published(tmp_path):
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


def test_answers_that_do_not_parse(tmp_path, checker):
    student = Student()
    problems = [*draw_records(2), type(draw_records(1)[0])("odd", "What is 1 + 1?", "\\frac{1}{")]
    with pytest.raises(RunError, match=r"1 gold answers cannot be read .*'odd'"):
        run_all(tmp_path, checker, student, problems)
    assert student.asked == []


def test_a_server_that_does_not_sample(tmp_path, checker, caplog):
    student = Student()
    student.answer = lambda request, answer=student.answer: answer(replace(request, seed=0))
    session = Session({MODEL: student}, checker)
    session.collect(tmp_path, draw_records(5), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    assert "the model is not sampled" in caplog.text


def test_nothing_wrong(tmp_path, checker, caplog):
    session = Session({MODEL: Student(mistakes=0.0)}, checker)
    session.collect(tmp_path, draw_records(3), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    assert "Give harder problems, or more --num-samples" in caplog.text
    with pytest.raises(RunError, match="harder problems"):
        session.localize(tmp_path, "arithmetic", JudgeOptions())


def test_refused_and_cut_solutions_are_counted_as_such(tmp_path, checker):
    ends = {"p0": "refused", "p1": "length", "p2": "stop"}
    student = Student()
    student.answer = lambda request: Completion("It is 5, as", ends[request.key.partition("/")[0]], 1, 1)
    session = Session({MODEL: student}, checker)
    counts = session.collect(tmp_path, draw_records(3), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    assert counts == {"unreadable": 6}
    expected = {"refused by the server": 2, "cut at max_new_tokens": 2, "no final answer": 2}
    assert summarize([tmp_path]).unreadable == expected


def test_nothing_readable(tmp_path, checker, caplog):
    session = Session({MODEL: Student(unreadable=1.0)}, checker)
    counts = session.collect(tmp_path, draw_records(3), "drawn", MODEL, STEP_PROMPTS["plain"], SAMPLING, 2)
    assert counts == {"unreadable": 6}
    assert "Unreadable solutions teach nothing" in caplog.text


@pytest.mark.parametrize(
    ("judge_name", "options", "message"),
    [
        ("roll-out", JudgeOptions(), "Did you mean 'rollout'"),
        ("rollout+rollout", JudgeOptions(), "contains a judge twice"),
        ("llm", JudgeOptions(), "--judge-model"),
        ("prm", JudgeOptions(), "--prm"),
        ("rollout", JudgeOptions(num_rollouts=0), "num_rollouts=0"),
        ("llm", JudgeOptions(model=MODEL, prompt="{{ problem }}"), "does not contain the steps"),
        ("llm", JudgeOptions(model=MODEL, prompt="{{ steps }} {{ probelm }}"), "cannot be filled"),
    ],
)
def test_judges_that_cannot_be_asked(tmp_path, checker, judge_name, options, message):
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


def test_names_of_corrections(tmp_path, checker):
    """What `data` builds from is what `rectify` wrote, whatever else is there."""
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


def test_other_settings(tmp_path, checker):
    session = Session({MODEL: Student()}, checker)
    arguments = (tmp_path, draw_records(5), "drawn", MODEL, STEP_PROMPTS["plain"])
    session.collect(*arguments, SAMPLING, 2)
    with pytest.raises(RunError, match=r"settings:\n  sampling.temperature: 1.0 in this run, 0.5 now\nUse .* folder"):
        session.collect(*arguments, Sampling(0.5, 1.0, 256), 2)
    with pytest.raises(RunError, match=r"settings:\n  seed: 0 in this run, 1 now\n"):
        session.collect(*arguments, SAMPLING, 2, seed=1)
