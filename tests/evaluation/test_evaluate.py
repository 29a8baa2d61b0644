"""Evaluation: results against independent computations, kills, labeled solutions, errors."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.evaluation.evaluate import evaluate
from stepdpo_trl.evaluation.problems import load_problems
from stepdpo_trl.evaluation.results import table
from stepdpo_trl.evaluation.statistics import Accuracy, bootstrap, clustered, mcnemar
from stepdpo_trl.generation import Completion, GenerationError, ModelSpec, Sampling
from stepdpo_trl.pipeline.records import Problem
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.quickstart import MODEL_PATH, count_correct, generate_solutions, make_problems
from stepdpo_trl.runs.run_directory import RunError

from ..simulated import Student, draw_records

HERE = Path(__file__).parent
SAMPLING = Sampling(1.0, 1.0, 256)
ONE, OTHER = ModelSpec("here/model"), ModelSpec("there/model")


def stepdpo(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checker():
    with Session() as session:
        yield session.checker


def run(path, checker, *students, num_samples=3, problems=None, sampling=SAMPLING, seed=0, num_models=None):
    session = Session(dict(zip((ONE, OTHER), students, strict=False)), checker)
    problems = problems or draw_records(40)
    models = [ONE, OTHER][: num_models or len(students)]
    return evaluate(session, path, "drawn", problems, models, STEP_PROMPTS["plain"], sampling, num_samples, seed)


def read(path):
    rows = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    return rows, json.loads((path / "results.json").read_text())


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_results_match_the_records(tmp_path, checker):
    """Recompute every number from the records, and every outcome from its text."""
    results = run(tmp_path, checker, Student(0.1), Student(0.3, unreadable=0.2))
    rows, written = read(tmp_path)
    assert written == json.loads(json.dumps(results))
    gold = {problem.id: problem.answer for problem in draw_records(40)}
    assert [row["id"] for row in rows] == list(gold)
    shares, majorities = {}, {}
    for index, model in enumerate(("here/model", "there/model")):
        answered = [row["models"][model] for row in rows]
        outcomes = []
        for row, answers in zip(rows, answered, strict=True):
            for sample in answers["samples"]:
                boxed = sample["text"].partition("\\boxed{")[2].rstrip("}.")
                right = "right" if boxed == gold[row["id"]] else "wrong" if boxed else "unreadable"
                assert sample["outcome"] == right
                outcomes.append(right)
        measured = results["results"][index]
        assert measured["model"] == model
        assert measured["solutions"] == {**dict.fromkeys(("right", "wrong", "unreadable"), 0), **Counter(outcomes)}
        assert sum(measured["unreadable"].values()) == outcomes.count("unreadable")
        assert measured["accuracy"] == pytest.approx(outcomes.count("right") / 120)
        shares[index] = [sum(s["outcome"] == "right" for s in answers["samples"]) / 3 for answers in answered]
        assert measured["interval"] == clustered(shares[index], 3)
        majorities[index] = [answers["majority"]["outcome"] == "right" for answers in answered]
        assert measured["majority"]["accuracy"] == sum(majorities[index]) / 40
    difference = results["difference"]
    assert difference["accuracy"] == pytest.approx(np.mean(shares[0]) - np.mean(shares[1]))
    assert difference["interval"] == bootstrap([a - b for a, b in zip(shares[0], shares[1], strict=True)])
    only = [sum(majorities[i][n] and not majorities[1 - i][n] for n in range(40)) for i in (0, 1)]
    test = difference["mcnemar"]
    assert (test["only_first"], test["only_second"], test["p"]) == (*only, mcnemar(*only))
    assert test["both"] + test["neither"] + sum(only) == 40
    printed = table(results)
    assert f"{outcomes.count('unreadable')} no final answer" in printed
    assert f"here/model minus there/model: {100 * difference['accuracy']:+.1f}" in " ".join(printed.split())
    assert f"McNemar's exact test: p = {test['p']:.2g}\n" in printed
    solved = f"both {test['both']}, first only {only[0]}, second only {only[1]}, neither {test['neither']}"
    assert f"\nSolved by majority vote: {solved}" in printed


def test_a_rerun_samples_nothing_and_changes_no_file(tmp_path, checker):
    run(tmp_path, checker, Student(), Student(0.4))
    before = contents(tmp_path)
    students = Student(), Student(0.4)
    run(tmp_path, checker, *students)
    assert students[0].asked == students[1].asked == []
    assert contents(tmp_path) == before


def test_models_share_seeds_but_not_answers(tmp_path, checker):
    """Two equal models give the same answers, but both are sampled, although both names end in `model`."""
    students = Student(), Student()
    results = run(tmp_path, checker, *students)
    assert students[0].asked == students[1].asked
    assert len(students[0].asked) == 120
    assert results["difference"]["interval"] is None  # all differences are 0
    assert "+0.0 percentage points (no interval" in table(results)
    assert results["difference"]["mcnemar"]["p"] == 1.0


class UnreachableStudent(Student):
    """Model that is loaded, but fails on the first request, as an unreachable server does."""

    def generate(self, requests, sampling, done):
        raise GenerationError("The server does not answer.")
        yield


def test_a_failed_first_attempt_does_not_lock_the_folder(tmp_path, checker, monkeypatch):
    monkeypatch.setattr("stepdpo_trl.pipeline.session.make_generator", lambda *spec: 1 / 0)
    problems = [Problem(problem.id, problem.problem + " ", problem.answer) for problem in draw_records(40)]
    with pytest.raises(GenerationError):
        run(tmp_path, checker, UnreachableStudent(), seed=1, problems=problems)
    monkeypatch.setattr("stepdpo_trl.generation.chat.check_model", lambda spec: None)
    with pytest.raises(ZeroDivisionError):  # raised while loading the model
        run(tmp_path, checker, seed=2, num_models=1)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    run(tmp_path, checker, Student())
    assert json.loads((tmp_path / "results.json").read_text())["seed"] == 0


def test_settings_are_kept_with_the_first_answer(tmp_path, checker):
    class StoppedStudent(Student):
        def generate(self, *arguments):
            yield next(super().generate(*arguments))
            raise KeyboardInterrupt

    student = StoppedStudent()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, checker, student)
    assert len(student.asked) == 1
    with pytest.raises(RunError, match="another folder"):
        run(tmp_path, checker, Student(), seed=1)
    student = Student()
    run(tmp_path, checker, student)
    assert len(student.asked) == 119


def test_other_settings_are_rejected(tmp_path, checker):
    run(tmp_path, checker, Student())
    before = contents(tmp_path)
    for other in (
        {"num_samples": 2},
        {"seed": 1},
        {"problems": draw_records(39)},
        {"sampling": Sampling(0.5, 1.0, 256)},
    ):
        with pytest.raises(RunError, match="another folder"):
            run(tmp_path, checker, Student(), **other)
    problems = draw_records(40)
    for first in (Problem("p0", "What is 1 + 1?", "2"), Problem("other", "What is 1 + 1?", "2")):
        with pytest.raises(RunError, match=r"\n  problems\.digest: '\w{16}' in this run, '\w{16}' now\n"):
            run(tmp_path, checker, Student(), problems=[first, *problems[1:]])
    assert contents(tmp_path) == before
    Session({ONE: Student()}, checker).collect(
        tmp_path / "run", problems, "drawn", ONE, STEP_PROMPTS["plain"], SAMPLING, 1
    )
    with pytest.raises(RunError, match=r"folder of a run \(collect\)"):
        run(tmp_path / "run", checker, Student())


def test_kills(tmp_path):
    """An evaluation that is killed at any time and restarted writes the same files, byte for byte."""
    command = [sys.executable, "-m", "tests.evaluation.kill_evaluation", str(tmp_path)]
    process = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout)["kills"] >= 3
    assert len(contents(tmp_path / "uninterrupted")) == 9
    assert contents(tmp_path / "killed") == contents(tmp_path / "uninterrupted")


# Solutions whose grade differs from the label, with the reason. None so far
EXPLAINED: dict[str, str] = {}


def test_agreement_with_labels(tmp_path, checker):
    """Right and falsified solutions of GSM8K, labeled by how they were made (make_labeled_solutions.py)."""
    rows = [
        json.loads(line) for line in (HERE.parent / "data" / "labeled_solutions.jsonl").read_text("utf-8").splitlines()
    ]
    solutions = {row["id"]: row["solution"] for row in rows}

    class Reciter(Student):
        def answer(self, request):
            return Completion(solutions[request.key.partition("/")[0]], "stop", 1, 1)

    problems = [Problem(row["id"], row["id"], row["answer"]) for row in rows]
    run(tmp_path, checker, Reciter(), num_samples=1, problems=problems, sampling=Sampling(0.0))
    found = {row["id"]: row["models"]["here/model"]["samples"][0] for row in read(tmp_path)[0]}
    disagreements = {
        row["id"]: (row["answer"], found[row["id"]]["answer"], row["is_correct"])
        for row in rows
        if (found[row["id"]]["outcome"] == "right") != row["is_correct"]
    }
    assert len(rows) >= 300
    assert 140 <= sum(row["is_correct"] for row in rows) <= 160
    assert disagreements.keys() <= EXPLAINED.keys(), disagreements
    assert len(disagreements) <= 0.005 * len(rows)
    cut = [outcome["outcome"] for name, outcome in found.items() if name.endswith("-cut")]
    assert cut == ["unreadable"] * 15


# The command, with the model of the quickstart

COMMAND = ("eval", "--model", MODEL_PATH, "--prompt", "plain", "--max-new-tokens", 256)


@pytest.fixture(scope="module")
def quickstart():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)


def test_accuracy_of_the_quickstart_model(tmp_path, quickstart, capsys):
    """Greedy answers and accuracy match the measurement of the quickstart."""
    assert stepdpo(*COMMAND, "--problems", "arithmetic", "--limit", 60, "--output-dir", tmp_path) == 0
    problems = make_problems(60, "held_out")
    accuracy = Accuracy(count_correct(*quickstart, problems), len(problems))
    rows, results = read(tmp_path)
    assert results["results"][0]["solutions"]["right"] == accuracy.right
    assert results["results"][0]["interval"] == pytest.approx(accuracy.interval)
    assert str(accuracy) in capsys.readouterr().out
    texts = generate_solutions(*quickstart, [problem.text for problem in problems])
    assert [row["models"][str(MODEL_PATH)]["samples"][0]["text"] for row in rows] == texts
    assert 30 < accuracy.right < 55


def test_base_model_and_adapter(tmp_path, quickstart, capsys, caplog):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), quickstart[1]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():  # makes more mistakes, but some answers stay right
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.mul_(0.35)
    adapted.save_pretrained(tmp_path / "adapter")
    problems = make_problems(24, "held_out")
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps({"question": p.text, "answer": f"so #### {p.answer}"}) + "\n" for p in problems)
    )
    compared = (*COMMAND, "--problems", tmp_path / "problems.jsonl", "--baseline", MODEL_PATH)
    where = ("--output-dir", tmp_path / "out", "--baseline-adapter", tmp_path / "adapter")
    assert stepdpo(*compared, *where) == 0
    rows, results = read(tmp_path / "out")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL_PATH), tmp_path / "adapter")
    texts = [generate_solutions(each, tokenizer, [p.text for p in problems]) for each in (quickstart[0], loaded)]
    names = [str(MODEL_PATH), f"{MODEL_PATH} + {tmp_path / 'adapter'}"]
    assert [[row["models"][name]["samples"][0]["text"] for row in rows] for name in names] == texts
    first, second = (each["solutions"]["right"] for each in results["results"])
    assert first != second
    assert results["difference"]["accuracy"] == pytest.approx((first - second) / 24)
    assert f"{names[0]} minus {names[1]}" in capsys.readouterr().out
    # An adapter passed as --model is loaded on its base model
    command = (
        "--model",
        tmp_path / "adapter",
        "--problems",
        tmp_path / "problems.jsonl",
        "--output-dir",
        tmp_path / "same",
    )
    assert stepdpo("eval", *command, *COMMAND[3:]) == 0
    assert [row["models"][names[1]]["samples"][0]["text"] for row in read(tmp_path / "same")[0]] == texts[1]
    # After more training it is another adapter
    adapted.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight.data.zero_()
    adapted.save_pretrained(tmp_path / "adapter")
    assert stepdpo(*compared, *where) == 2
    assert "weights" in capsys.readouterr().err


def test_problem_sets(monkeypatch):
    loaded = []

    def load_dataset(*name, split):
        loaded.append((*name, split))
        if "gsm8k" in name[0]:
            return [{"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}] + [
                {"question": f"{n}?", "answer": "#### 1"} for n in range(5)
            ]
        return [{"problem": "x?", "solution": "It is $\\boxed{\\frac12}$.", "answer": "\\frac12", "unique_id": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (first, *rest) = load_problems("gsm8k", 3)
    assert (first.problem, first.answer, first.solution) == ("1 + 1?", "1,002", "1 + 1 = <<1+1=2>>2")
    assert len(rest) == 2
    (only,) = load_problems("math-500")
    assert (only.problem, only.answer) == ("x?", "\\frac12")
    assert loaded == [("openai/gsm8k", "main", "test"), ("HuggingFaceH4/MATH-500", "test")]
    problems = load_problems("arithmetic")
    assert len(problems) == 1000
    assert load_problems("arithmetic", 20) == problems[:20]
    monkeypatch.setattr("datasets.load_dataset", lambda *name, split: 1 / 0)
    with pytest.raises(RunError, match=r"cannot be loaded \(ZeroDivisionError.*--problems FILE"):
        load_problems("gsm8k")


EVAL = ("eval", "--model", "./m", "--output-dir", "out")
ASKED = (*EVAL, "--problems", "p.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*EVAL, "--problems", "gms8k"), "Did you mean 'gsm8k'?"),
        ((*EVAL, "--problems", "q.jsonl"), "Did you mean p.jsonl?"),
        ((*EVAL, "--problems", "b.jsonl"), "row 1: no `answer` ('What is 1 + 1?')"),
        ((*ASKED, "--baseline", "./m"), "is the model itself"),
        ((*ASKED, "--baseline", "./x/../m"), "is the model itself"),
        ((*ASKED, "--baseline-backend", "vllm"), "not its name: --baseline."),
        ((*ASKED, "--num-samples", 4), "would give the same answer 4 times"),
        ((*ASKED, "--num-fewshot", 4), "--num-fewshot 4 has no effect with --problems"),
        ((*EVAL, "--tasks", "gsm8k", "--num-fewshot", -1), "--num-fewshot -1 must be at least 0"),
        ((*ASKED, "--temperature", -1), "must be finite and not negative"),
        ((*ASKED, "--prompt", "plan"), "Did you mean 'plain'?"),
        ((*ASKED, "--prompt", "t.jinja"), "does not contain the problem"),
        ((*ASKED, "--prompt", "u.jinja"), "u.jinja cannot be read (No such file"),
        ((*ASKED, "--top-p", 0.5), "--top-p 0.5 has no effect at temperature 0"),
        ((*ASKED, "--baseline", "m", "--adapter", "a", "--baseline-adapter", "./a"), "is the model itself"),
        (
            ("eval", "--model", MODEL_PATH, "--output-dir", "p.jsonl", *ASKED[5:]),
            "The folder p.jsonl cannot be created (File ex",
        ),
        ((*EVAL, "--problems", "f.parquet"), "f.parquet cannot be read as Parquet: "),
        ((*ASKED, "--adapter", "a", "--base-url", "http://h/v1"), "does not load the adapter"),
        ((*ASKED, "--vllm-args", "--enforce-eager"), "--vllm-args has no effect without --backend vllm"),
        ((*ASKED, "--backend", "vllm", "--vllm-args", "--port 1"), "--vllm-args contains --port"),
        (ASKED, "'./m' cannot be loaded"),
        (("eval", "--model", MODEL_PATH, "--adapter", "./a", *ASKED[3:]), "adapter './a' cannot be loaded"),
        (("eval", "--model", MODEL_PATH, "--baseline", "./n", *ASKED[3:]), "'./n' cannot be loaded"),
        (("eval", "--model", MODEL_PATH, *EVAL[3:], "--problems", "g.jsonl"), "cannot be read as an answer"),
        ((*EVAL, "--tasks", "h4", "--num-samples", 4), "--num-samples cannot be used with --tasks"),
        ((*EVAL, "--tasks", "h4", "--baseline", "n"), "--baseline cannot be used with --tasks"),
        ((*EVAL, "--tasks", "h4"), "pip install 'stepdpo_trl[lm-eval]'"),
    ],
)
def test_errors_come_before_the_first_token(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("stepdpo_trl.generation.transformers.TransformersGenerator.generate", lambda *_: 1 / 0)
    (tmp_path / "p.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}')
    (tmp_path / "b.jsonl").write_text('{"problem": "What is 1 + 1?"}')
    (tmp_path / "g.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "\\\\frac{2"}')
    (tmp_path / "t.jinja").write_text("Solve this.")
    (tmp_path / "f.parquet").write_text("none")
    assert stepdpo(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*ASKED, "--sample", 4), "--sample"),
        (EVAL, "one of the arguments --problems --tasks is required"),
        ((*ASKED, "--tasks", "h4"), "not allowed with"),
        ((*ASKED, "--limit", 0), "at least 1"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        stepdpo(*arguments)
    assert message in capsys.readouterr().err
