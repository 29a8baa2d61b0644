import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl.evaluation.statistics import Accuracy
from stepdpo_trl.quickstart import (
    MODEL_PATH,
    PAIRS_PATH,
    ArithmeticProblem,
    count_correct,
    first_lost_step,
    first_wrong_step,
    generate_solutions,
    is_right_step,
    make_problems,
    read_result,
    split_labeled_steps,
    write_solution,
)

from ..distributed.launcher import run_script

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"
TEXT = "What is 7 + 3 * 4 - 5?"
PROBLEM = ArithmeticProblem((7, 3, 4, 5), ("+", "*", "-"))
SOLUTION = (
    "Let's think step by step.\n"
    "Step 1: 3 * 4 = 12, leaving 7 + 12 - 5\n"
    "Step 2: 7 + 12 = 19, leaving 19 - 5\n"
    "Step 3: 19 - 5 = 14\n"
    "The answer is \\boxed{14}."
)
LEFT_TO_RIGHT = (
    "Let's think step by step.\n"
    "Step 1: 7 + 3 = 10, leaving 10 * 4 - 5\n"
    "Step 2: 10 * 4 = 40, leaving 40 - 5\n"
    "Step 3: 40 - 5 = 35\n"
    "The answer is \\boxed{35}."
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def pairs():
    return [json.loads(line) for line in PAIRS_PATH.read_text(encoding="utf-8").splitlines()]


def test_problem_and_solution_texts():
    assert PROBLEM.text == TEXT
    assert ArithmeticProblem.parse(TEXT) == PROBLEM
    assert PROBLEM.answer == "14"
    assert write_solution(PROBLEM) == SOLUTION
    assert write_solution(PROBLEM, choices=[0, 0, 0]) == LEFT_TO_RIGHT
    assert split_labeled_steps(SOLUTION) == [
        " 3 * 4 = 12, leaving 7 + 12 - 5",
        " 7 + 12 = 19, leaving 19 - 5",
        " 19 - 5 = 14",
    ]
    assert read_result(SOLUTION) == "14"
    assert read_result("The answer is 14.") is None


@pytest.mark.parametrize("text", ["5 - 3", "What is 5?", "What is 5 / 3?", "What is 5 - 3", "What is 5.7 + 3?"])
def test_unsupported_problems_raise_an_error(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        ArithmeticProblem.parse(text)


@pytest.mark.parametrize(
    ("index", "step", "right"),
    [
        (1, " 3 * 4 = 12, leaving 7 + 12 - 5", True),
        (2, " 7 + 12 = 19, leaving 19 - 5", True),
        (3, " 19 - 5 = 14", True),
        (1, " 7 + 3 = 10, leaving 10 * 4 - 5", False),  # correct sum, but the multiplication comes first
        (1, " 3 * 4 = 13, leaving 7 + 13 - 5", False),
        (1, " 3 * 4 = 12, leaving 7 + 12 + 5", False),  # copied incorrectly
        (1, " 3 * 4 = 12", False),
        (2, " 3 * 4 = 12, leaving 7 + 12 - 5", False),
        (4, " 14 - 5 = 9", False),
        (1, "", False),
    ],
)
def test_is_right_step(index, step, right):
    assert is_right_step(PROBLEM, index, step) is right


def test_first_wrong_step():
    assert first_wrong_step(PROBLEM, SOLUTION) is None
    assert first_wrong_step(PROBLEM, LEFT_TO_RIGHT) == 1
    # An error that later steps propagate counts only in the step that introduced it
    wrong = SOLUTION.replace("= 19, leaving 19 - 5", "= 20, leaving 20 - 5").replace("19 - 5 = 14", "20 - 5 = 15")
    assert first_wrong_step(PROBLEM, wrong) == 2
    # Two errors can cancel out, so that the final answer is right
    canceled = wrong.replace("20 - 5 = 15", "20 - 5 = 14")
    assert first_wrong_step(PROBLEM, canceled) == 2
    assert read_result(canceled) == "14"
    assert first_wrong_step(PROBLEM, SOLUTION.replace("Step 3: 19 - 5 = 14\n", "")) == 3
    assert first_wrong_step(PROBLEM, SOLUTION.replace("The answer", "Step 4: 14 + 1 = 15\nThe answer")) == 4
    assert first_wrong_step(PROBLEM, "no steps") == 1


def test_first_lost_step():
    """Unlike first_wrong_step, this accepts any order that preserves the value, and solutions that end early."""
    assert first_lost_step(PROBLEM, SOLUTION) is None
    assert first_lost_step(PROBLEM, LEFT_TO_RIGHT) == 1
    problem = ArithmeticProblem((2, 3, 4, 5), ("*", "+", "*"))  # 2 * 3 + 4 * 5
    for choices, lost in (([0, 1, 0], None), ([1, 0, 0], 1), ([2, 0, 0], None), ([0, 0, 0], 2)):
        assert first_lost_step(problem, write_solution(problem, choices)) == lost
    assert first_lost_step(problem, "Step 1: 2 * 3 = 7, leaving 7 + 4 * 5") == 1
    assert first_lost_step(problem, "Step 1: 2 * 3 = 6, leaving 6 + 4 * 5") is None


def test_problems_are_reproducible_distinct_and_within_bounds():
    problems = make_problems(200, "held_out", n_operations=(2, 9), seed=3)
    assert problems == make_problems(200, "held_out", n_operations=(2, 9), seed=3)
    assert problems != make_problems(200, "held_out", n_operations=(2, 9), seed=4)
    assert len(set(problems)) == 200
    assert {len(problem.operators) for problem in problems} == set(range(2, 10))
    for problem in problems:
        assert ArithmeticProblem.parse(problem.text) == problem
        assert problem.split == "held_out"
        assert all(2 <= number <= 9 for number in problem.numbers)
        assert all(0 <= number <= 60 for stage in problem.stages for number in stage.numbers)
        # The order of operations matters in every problem, and the answer agrees with Python's
        assert problem.operators.index("*") > 0
        assert eval(problem.expression) == int(problem.answer)
        assert first_wrong_step(problem, write_solution(problem)) is None
    assert {len(problem.operators) for problem in make_problems(5, "held_out", n_operations=10)} == {10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "'held_out'"),
        ({"n_operations": 1}, "at least 2"),
        ({"n_operations": (5, 4)}, r"a range \(minimum, maximum\)"),
        ({"count": 0}, "at least 1"),
        ({"count": 100, "n_operations": 2}, "fewer than 100"),
    ],
)
def test_invalid_arguments_raise_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_problems(**{"count": 1, "split": "held_out", **arguments})


def test_accuracy_interval():
    # Wilson intervals from Newcombe (1998), table I
    low, high = Accuracy(81, 263).interval
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = Accuracy(0, 20).interval
    assert (low, round(high, 4)) == (0.0, 0.1611)
    assert str(Accuracy(81, 263)) == "30.8% (25.5% to 36.6%)"


def test_tokenizer_round_trip(tokenizer):
    for problem in make_problems(50, "held_out", n_operations=(2, 9)):
        solution = write_solution(problem)
        ids = tokenizer(solution, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == solution
        for index, step in enumerate(split_labeled_steps(solution), start=1):
            prefix = solution[: solution.index(f"Step {index}:")] + f"Step {index}:"
            parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prefix, step)]
            # Tokenizing prefix and step separately yields the tokens of the whole text
            assert parts[0] + parts[1] == ids[: len(parts[0]) + len(parts[1])]


@pytest.mark.parametrize(
    "text", ["", "x", "a  b\n\n\tc ", "naïve 数学 🙂", "3.14e-10", "Step 10:\nStep 1 2", "\\frac{1}{2}"]
)
def test_tokenizer_round_trip_of_other_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
    opened = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == opened
    messages.append({"role": "assistant", "content": SOLUTION})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == opened + SOLUTION + "<|im_end|>\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_step_pairs_are_valid(pairs):
    assert 300 <= len(pairs) <= 900
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert list(pair) == [
            "dataset",
            "prompt",
            "initial_reason_steps",
            "chosen",
            "rejected",
            "full_chosen",
            "full_rejected",
            "answer",
        ]
        problem = ArithmeticProblem.parse(pair["prompt"])
        prefix = pair["initial_reason_steps"]
        assert prefix.startswith("Let's think step by step.\nStep 1:")
        *before, empty = split_labeled_steps(prefix)
        index = len(before) + 1
        assert empty == ""
        assert prefix.endswith(f"Step {index}:")
        assert all(is_right_step(problem, number, step) for number, step in enumerate(before, start=1))
        assert is_right_step(problem, index, pair["chosen"])
        assert not is_right_step(problem, index, pair["rejected"])
        assert pair["chosen"].startswith(" ")
        assert pair["rejected"].startswith(" ")
        assert pair["answer"] == problem.answer
        chosen, rejected = (prefix + pair[column] for column in ("full_chosen", "full_rejected"))
        assert first_wrong_step(problem, chosen) is None
        assert read_result(chosen) == problem.answer
        assert first_wrong_step(problem, rejected) == index
        assert split_labeled_steps(chosen)[index - 1] == pair["chosen"]
        assert split_labeled_steps(rejected)[index - 1] == pair["rejected"]


def test_pairs_and_held_out_problems_are_disjoint(pairs):
    prompts = {pair["prompt"] for pair in pairs}
    assert {ArithmeticProblem.parse(prompt).split for prompt in prompts} == {"pairs"}
    texts = {split: {problem.text for problem in make_problems(1000, split)} for split in ("held_out", "corpus")}
    assert not texts["held_out"] & (prompts | texts["corpus"])


def test_model_is_small_and_makes_mistakes(model, tokenizer):
    assert model.num_parameters() < 1_100_000
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) < 5_000_000
    problems = make_problems(200, "held_out")
    assert 100 < count_correct(model, tokenizer, problems) < 160


def test_generation_continues_prefixes_and_preserves_the_order(model, tokenizer):
    problems = [TEXT, "What is 2 + 3 * 5?"]
    prefixes = [SOLUTION[: SOLUTION.index(" 19 - 5 =")], ""]
    solutions = generate_solutions(model, tokenizer, problems, prefixes, batch_size=1)
    assert solutions == generate_solutions(model, tokenizer, problems, prefixes)
    assert solutions[0].startswith(prefixes[0])
    assert solutions[1].startswith("Let's think step by step.\nStep 1: ")


def test_accuracy_needs_problems(model, tokenizer):
    with pytest.raises(ValueError, match="at least one problem"):
        count_correct(model, tokenizer, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "0"], "--problems is 0"),
        (["--learning_rate=-1e-4"], "--learning_rate is -0.0001"),
        (["--beta", "0"], "--beta is 0.0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_quickstart_rejects_invalid_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # restores the variable, which the script sets
    monkeypatch.setattr(sys, "argv", [str(QUICKSTART), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(QUICKSTART), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_raises_accuracy(tmp_path):
    run = run_script(QUICKSTART, "--problems", "150", "--output_dir", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stdout + run.stderr
    for name in ("greedy", "sampled"):
        line = re.search(rf"^ +{name} .*$", run.stdout, re.MULTILINE)[0]
        intervals = [(float(low), float(high)) for low, high in re.findall(r"\(([\d.]+)% to ([\d.]+)%\)", line)]
        before, after = intervals
        assert before[1] < after[0], line
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
