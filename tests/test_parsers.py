"""Every parser of text that models, servers or people write takes less than a second for 100 KB, whatever it says."""

import os
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stepdpo_trl.data.answers import UNREADABLE, WRONG, Check, check_answer, check_golds
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.evaluation.majority import Vote, vote
from stepdpo_trl.pipeline.importers.processbench import read_processbench
from stepdpo_trl.pipeline.judges.arithmetic import evaluate_expression, false_equations
from stepdpo_trl.pipeline.judges.llm import read_step
from stepdpo_trl.pipeline.policy import Continuation
from stepdpo_trl.pipeline.records import read_problems
from stepdpo_trl.runs.run_directory import Log, RunError

from .parsers import PIECES, cpu_limit, hard_text, mixture, parsers

LIMIT = 1.0  # seconds of CPU time
# Took longest, or raised an error, before the parsers were linear
WORST = ["1", "1 + 2 = ", "\n"]
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))


def check(text, folder):
    for name, parser in parsers(folder).items():
        try:
            with cpu_limit(LIMIT):
                parser(text)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("unit", WORST)
def test_repetitions(unit, tmp_path):
    check(hard_text("1 = ", unit, "a"), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("unit", [piece for piece in PIECES if piece not in WORST])
def test_all_repetitions(unit, tmp_path):
    check(hard_text("1 = ", unit, "a"), tmp_path)
    check(hard_text("", unit, ""), tmp_path)


DIGITS = "7" * 5000  # int() and Fraction() refuse more than 4,300


def test_numbers_of_thousands_of_digits_are_no_labels_answers_or_votes(tmp_path):
    assert [step.strip() for step in split_steps(f"1. a\n{DIGITS}. b\n2. c").texts()] == [f"a\n{DIGITS}. b", "c"]
    assert len(split_steps(f"Step 1: a\nStep {DIGITS}: b")) == 2  # as any other number: steps are numbered by place
    assert read_step(f"\\boxed{{{DIGITS}}}", 9) is None
    assert evaluate_expression(DIGITS) is evaluate_expression(f"1 + {DIGITS}") is None
    assert check_answer("7", f"\\boxed{{{DIGITS}}}").outcome == UNREADABLE
    assert check_answer(DIGITS, f"\\boxed{{{DIGITS}}}").outcome == UNREADABLE
    long, short = Check(WRONG, DIGITS), Check(WRONG, "6")  # the long one was stored by an earlier release
    samples = [Continuation(str(n), "", "stop", check) for n, check in enumerate([long, long, short])]
    with pytest.raises(StopIteration) as result:
        next(vote(samples))
    assert result.value.value == Vote(WRONG, "6", 1)
    checker = SimpleNamespace(check=lambda answers: [check_answer(*pair) for pair in answers])
    assert check_golds(checker, ["7", DIGITS]) == [1]
    path = tmp_path / "rows.jsonl"
    path.write_text(f'\n{{"problem": "p", "answer": {DIGITS}}}')
    with pytest.raises(RunError, match=r"Line 2 of .*rows\.jsonl is not JSON"):
        read_problems(path)
    with pytest.raises(ValueError, match=r"Line 2 of .*rows\.jsonl is not valid JSON"):
        list(read_processbench(path))


@pytest.mark.parametrize("read", [read_problems, Log, lambda path: list(read_processbench(path))])
def test_deeply_nested_json_is_an_error_that_names_the_line(tmp_path, read):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises((RunError, ValueError), match=r"Line 1 of .*rows.jsonl is not"):
        read(path)


def test_the_arithmetic_judge_abstains_beyond_a_length():
    long = " + ".join(["1"] * 200)
    assert false_equations("", split_steps("1 + 1 + 1 = 4", "line")) == ["1 + 1 + 1 = 4"]
    assert false_equations("", split_steps(f"{long} = 4\n1 + 1 = 3", "line")) == [None, "1 + 1 = 3"]
    assert false_equations(f"What is {long}?", split_steps("1 + 1 = 2, leaving 5", "line")) == [None]
    problem = "What is 1 + 2 * 3?"
    assert (
        false_equations(problem, split_steps(f"2 * 3 = 6, leaving {long}\n5 - 1 = 4, leaving 4", "line")) == [None] * 2
    )


UNITS = st.lists(st.one_of(st.sampled_from(PIECES), st.characters()), min_size=1, max_size=6).map("".join)
TEXTS = st.one_of(
    st.builds(hard_text, st.sampled_from(["", *PIECES]), UNITS, st.sampled_from(["", *PIECES])),
    st.builds(mixture, st.lists(st.sampled_from(PIECES), min_size=1), st.integers(0, 2**32)),
)
OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.reuse, Phase.generate]}


@pytest.mark.long
@settings(max_examples=20, **OPTIONS)
@given(TEXTS)
def test_mixtures(tmp_path_factory, text):
    check(text, tmp_path_factory.getbasetemp())


@pytest.mark.skipif(not FUZZ_SECONDS, reason="`make fuzz` runs this")
def test_fuzz(tmp_path):
    """Try texts until the time is over."""
    end = time.monotonic() + FUZZ_SECONDS

    @settings(max_examples=10, derandomize=False, **OPTIONS)
    @given(TEXTS)
    def try_some(text):
        check(text, tmp_path)

    while time.monotonic() < end:
        try_some()
