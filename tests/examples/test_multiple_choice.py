"""The example with multiple choice: its questions, and its commands with the quickstart's model."""

import json
import random
import shlex
from pathlib import Path

from stepdpo_trl.cli.main import main
from stepdpo_trl.data.answers import AnswerChecker
from stepdpo_trl.data.checkers import resolve_checker
from stepdpo_trl.data.prompts import StepPrompt
from stepdpo_trl.generation import Completion, ModelSpec, Sampling
from stepdpo_trl.pipeline.build import build
from stepdpo_trl.pipeline.judge_options import DEFAULT_CHECK, JudgeOptions
from stepdpo_trl.pipeline.records import read_problems
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.quickstart import MODEL_PATH

from ..simulated import Student
from ..test_docs import commands

FOLDER = Path(__file__).parents[2] / "examples" / "multiple_choice"
ROWS = [json.loads(line) for line in (FOLDER / "problems.jsonl").read_text().splitlines()]


def test_questions():
    assert len({row["id"] for row in ROWS}) == len({row["problem"] for row in ROWS}) == len(ROWS) == 40
    for row in ROWS:
        letters = [line[0] for line in row["problem"].splitlines() if line[1:3] == ". "]
        assert letters == list("ABCDE"[: len(letters)])
        assert len(letters) >= 4
        assert row["answer"] in letters
    assert len({row["answer"] for row in ROWS}) >= 4


def test_commands(tmp_path, monkeypatch, capsys):
    """The small model knows nothing of letters, so `data` ends with the message that there are no wrong answers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(FOLDER.parent)
    quick = ["--limit", "3", "--max-new-tokens", "8", "--num-samples", "2", "--temperature", "1"]
    found = [words[1:] for words in commands(FOLDER / "README.md")]
    assert [words[0] for words in found] == ["data", "eval"]
    for words in found:
        known = [str(MODEL_PATH) if word.startswith("Qwen/") else word for word in words]
        status = main([*known, *quick, *(["--top-p", "1"] if words[0] == "data" else [])])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err, shlex.join(words)
        if words[0] == "data":
            assert status == 2
            assert "splits none of the first 6 solutions" in printed.err or "No wrong answers" in printed.err
        else:
            assert status == 0
            assert "3 problems of problems" in printed.out


class Chooser(Student):
    """Compares the options in step 1 and concludes in step 2, of which the second is always right about the first."""

    answers = {row["problem"]: row["answer"] for row in ROWS}  # noqa: RUF012

    def answer(self, request):
        user, _, prefix = request.prompt.partition("\n---\n")
        rng, gold = random.Random(request.seed), self.answers[user]
        others = [letter for letter in "ABCD" if letter != gold]
        if "best" in prefix:
            chosen = prefix.partition("best: ")[2][0]
            return Completion(f" So the answer is \\boxed{{({chosen})}}.", "stop", 1, 1)
        chosen = gold if rng.random() < 0.5 else rng.choice(others)
        return Completion(f" The best: {chosen}\nStep 2: So the answer is \\boxed{{({chosen})}}.", "stop", 1, 1)


def test_pairs_of_a_simulated_model(tmp_path):
    checker, model = resolve_checker("choice"), ModelSpec("chooser")
    problems = read_problems(FOLDER / "problems.jsonl", 20, checker)
    prompt = StepPrompt("{{ problem }}", "Step 1:")
    with AnswerChecker(1) as pool:
        session = Session({model: Chooser()}, pool)
        session.collect(tmp_path, problems, "q", model, prompt, Sampling(), 2, checker=checker, steps="label")
        session.localize(tmp_path, "rollout", JudgeOptions(num_rollouts=16))
        session.rectify(tmp_path, check=DEFAULT_CHECK)
    pairs, _ = build([tmp_path])
    assert len(pairs) > 10
    for pair in pairs:
        assert pair["initial_reason_steps"] == "Step 1:"
        assert pair["chosen"] == f" The best: {pair['answer']}"
        assert pair["rejected"].startswith(" The best: ")
        assert pair["rejected"] != pair["chosen"]
