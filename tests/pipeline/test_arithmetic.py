"""The arithmetic judge: equations that it must find, and equations that it must ignore."""

from fractions import Fraction

import pytest

from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.pipeline.judges.arithmetic import evaluate_expression, false_equations

FALSE = [
    "5 + 3 = 9",
    "She has 5 + 3 = 9 apples",
    "10/3 = 4.33",
    "1,200 + 300 = 1,400",
    "$5 x 3 = $16",
    r"\frac{1}{2} \times 10 = 6",
    "16 - 3 - 4 = 8.",
    "so 7 * 2 = 15, and",
    "(5+3)*2 = 17",
    "28 - 2 = 24\nSo",
    "3 + 4 = 8 = 2 * 4",
    "14 * 2 = 38 shooting stars",
    "5 \u00d7 6 = 35",
    "**5 + 3 = 9**",
    "20% * 50 = 11",
    "She pays 3*12=<<3*12=36>>37 for 3 * 12 = 37 eggs",
]
TRUE_OR_AMBIGUOUS = [
    "5 + 3 = 8",
    "10/3 = 3.33",  # rounded
    "33.33*3 = 100",  # a rounded input
    "7/2 = 4 buses",  # rounded up
    "12*2 = 24 + 5 = 29",  # chained operations
    "20% * 50 = 10",
    "0.2*100 = 20%",
    "50/100 = 50%",
    "0.5 = 50%",
    "half of 10 + 2 = 7",
    "2x + 3 = 7",
    "5 * 3 = 15x",
    "150/60 = 2 hours 30 minutes",
    "17/5 = 3 R 2",
    "17/5 = 3 remainder 2",
    "1,200 + 300 = 1,500",
    r"\(5 + 3 = 8\)",
    "10:30 - 9 = 3",
    "3 apples + 5 apples = 9 apples",
    "2^3 = 8",
    "- 5 + 3 = 8",  # a bullet
    "2(3+4) = 14",
    "1 1/2 + 1 = 2.5",
    "48/2 = <<48/2=24>>24",
    "-3 + 5 = 2",
    "5*5 = 25 million",
    "2 * 3/4 = 1.5",
    "1/3 + 1/3 = 2/3",
    "6 / 0 = 1",
    "100 - 20% = 80",
    "8 + 5 = 1 PM",
    "30 + 30 = 1 hour",
    "1 - 0.25 = 75 cents",
    "9**9**9 = 1",
]


def read(text, problem=""):
    return false_equations(problem, split_steps(text, "paragraph"))


@pytest.mark.parametrize("text", FALSE)
def test_false_equations_are_found(text):
    assert read(text) != [None]


@pytest.mark.parametrize("text", TRUE_OR_AMBIGUOUS)
def test_true_or_ambiguous_equations_are_ignored(text):
    assert read(text) == [None]


def test_each_step_is_checked():
    assert read("1 + 1 = 2\n\n2 + 2 = 5\n\n5 + 1 = 6") == [None, "2 + 2 = 5", None]


def test_what_a_step_leaves_of_the_expression_is_checked():
    problem = "What is 2 + 2 * 4?"
    assert read("2 * 4 = 8, leaving 2 + 8\n\n2 + 8 = 10", problem) == [None, None]
    assert read("2 + 2 = 4, leaving 4 * 4", problem) == ["2 + 2 * 4 = 4 * 4"]
    assert read("2 * 4 = 8, leaving 2 + * 8", problem) == ["2 + 2 * 4 = 2 + * 8"]
    assert read("2 * 4 = 8, leaving 2 + 8\n\n5 + 5 = 10, leaving 10", problem) == [None, "5 + 5 is no part of 2 + 8"]
    assert read("2 + 2 = 4, leaving 4 * 4", "Tom has 2 + 2 * 4 apples. How many?") == [None]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * -3", -9),
        ("1,234.5 / 2", Fraction(2469, 4)),
        ("007 * 20%", Fraction(7, 5)),
        ("7 + 20%", None),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1 / 0", None),
        ("1 2", None),
        ("2 ** 3", None),
        ("a + 1", None),
        ("(" * 500, None),
        ("", None),
    ],
)
def test_evaluate_expression(expression, value):
    assert evaluate_expression(expression) == value
