"""Answer checking: three outcomes, labeled pairs and a hard time limit."""

import json
import time
from pathlib import Path

import pytest

from stepdpo_trl.data.answers import AnswerChecker, Check, check_answer, check_golds

HERE = Path(__file__).parent
PAIRS = [json.loads(line) for line in (HERE / "answer_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
PAIRS = [pair for pair in PAIRS if "gold" in pair]


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(2, time_limit=5.0) as checker:
        yield checker


@pytest.mark.parametrize(
    ("gold", "text", "outcome", "answer"),
    [
        ("72", r"So it is \boxed{72}.", "right", "72"),
        ("72", r"So it is \boxed{71}.", "wrong", "71"),
        ("72", "So it is 72, I think", "unreadable", None),
        ("72", r"So it is \boxed{}", "unreadable", None),
        ("72", r"So it is \boxed{\frac{}", "unreadable", None),
        (r"\frac{3}{4}", r"The answer is 0.75.", "right", "0.75"),
        ("Tuesday", r"\boxed{\text{tuesday}}", "right", r"\text{tuesday}"),
        ("Tuesday", r"\boxed{\text{Monday}}", "wrong", r"\text{Monday}"),
    ],
)
def test_outcomes(checker, gold, text, outcome, answer):
    check = check_answer(gold, text)
    assert (check.outcome, check.answer) == (outcome, answer)
    assert checker.check([({"answer": gold}, text)]) == [check]
    assert (check.reason is not None) == (outcome == "unreadable")


def test_labeled_pairs(checker):
    """Grades match the manual labels, and answers that cannot be compared are unreadable rather than wrong."""
    checks = checker.check(({"answer": pair["gold"]}, pair["solution"]) for pair in PAIRS)
    graded = [(pair, check) for pair, check in zip(PAIRS, checks, strict=True) if check.outcome != "unreadable"]
    unreadable = [pair for pair, check in zip(PAIRS, checks, strict=True) if check.outcome == "unreadable"]
    assert not any(pair["right"] for pair in unreadable)
    assert len(unreadable) < 0.05 * len(PAIRS)
    assert sum((check.outcome == "right") == pair["right"] for pair, check in graded) >= 0.995 * len(graded)


@pytest.mark.slow
def test_hanging_answers():
    """Checks that hang are killed after the time limit and count as unreadable. All other answers are checked."""
    hanging = json.loads((HERE / "hanging_answers.json").read_text(encoding="utf-8"))[:4]
    with AnswerChecker(2, time_limit=1.5) as checker:
        checker.check([({"answer": "1"}, r"\boxed{1}")] * 4)  # start the workers
        answers = [({"answer": case["gold"]}, case["solution"]) for case in hanging]
        mixed = [pair for answer in answers for pair in (answer, ({"answer": "2"}, r"\boxed{2}"))]
        start = time.perf_counter()
        checks = checker.check(mixed)
    assert checks[1::2] == [Check("right", "2")] * len(hanging)
    assert {check.reason for check in checks[::2]} == {"checking took more than 1.5 s"}
    assert time.perf_counter() - start < 30


def test_unreadable_gold_answers(checker):
    golds = ["72", "1,200", "-3.5", r"\frac{1}{2}", "Tuesday", "(2, 5)", r"\frac{1}{", "", r"x^2 + 1", r"\text{two}"]
    assert [golds[index] for index in check_golds(checker, golds)] == [r"\frac{1}{", ""]
