import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdpo_trl.data import step_patterns
from stepdpo_trl.data.steps import STYLES, check_style, split_steps

OPENING = "Let's think step by step."


@pytest.mark.parametrize(
    ("text", "style", "prefixes_and_steps"),
    [
        (
            f"{OPENING}\nStep 1: 3 * 4 = 12\nStep 2: 12 + 1 = 13\nThe answer is 13.",
            "label",
            [
                (f"{OPENING}\nStep 1:", " 3 * 4 = 12"),
                (f"{OPENING}\nStep 1: 3 * 4 = 12\nStep 2:", " 12 + 1 = 13\nThe answer is 13."),
            ],
        ),
        # As in some rows of Math-Step-DPO-10K
        (
            f"{OPENING} Step 1: a.\nStep 2: b",
            "label",
            [(f"{OPENING} Step 1:", " a."), (f"{OPENING} Step 1: a.\nStep 2:", " b")],
        ),
        (
            "### Step 1: Add\n1 + 1\n\n### Step 2: Say",
            "label",
            [("### Step 1:", " Add\n1 + 1"), ("### Step 1: Add\n1 + 1\n\n### Step 2:", " Say")],
        ),
        ("**Step 1:** a\n**Step 2**: b", "label", [("**Step 1:**", " a"), ("**Step 1:** a\n**Step 2**:", " b")]),
        (
            "Step 1: as in Step 2: no\nstep 3. c",
            "label",
            [("Step 1:", " as in Step 2: no"), ("Step 1: as in Step 2: no\nstep 3.", " c")],
        ),
        ("Step 1: only one\n\nmore of it", "label", [("Step 1:", " only one\n\nmore of it")]),
        (
            "So:\n1. a\n2. b 3. no\n12. March\n3. c",
            "number",
            [
                ("So:\n1.", " a"),
                ("So:\n1. a\n2.", " b 3. no\n12. March"),
                ("So:\n1. a\n2. b 3. no\n12. March\n3.", " c"),
            ],
        ),
        (
            "first\nstill\n\n second\n\n\nthird\n",
            "paragraph",
            [("", "first\nstill"), ("first\nstill\n\n ", "second"), ("first\nstill\n\n second\n\n\n", "third")],
        ),
        ("one\ntwo", "line", [("", "one"), ("one\n", "two")]),
        ("one", "paragraph", [("", "one")]),
        ("  \n", "paragraph", []),
    ],
)
def test_splitting(text, style, prefixes_and_steps):
    steps = split_steps(text)
    assert steps.style == style
    assert [(steps.prefix(n), steps.step(n)) for n in range(1, len(steps) + 1)] == prefixes_and_steps


WORDS = st.sampled_from(
    ["Step 1:", "\n", "\n\n", "Step 2: ", "1. ", "2) ", "**", "a", " ", "### ", ".", "\t", "Step 10 -"]
)


@given(st.lists(WORDS, max_size=30).map("".join), st.sampled_from([None, *STYLES]))
def test_no_text_is_lost(text, style):
    """Prefixes and steps are substrings of the text, in order, with only labels and whitespace between the steps."""
    steps = split_steps(text, style)
    end = 0
    for number, span in enumerate(steps.spans, start=1):
        assert end <= span.begin < span.end <= len(text)
        assert text.startswith(steps.prefix(number) + steps.step(number))
        assert steps.step(number).strip()
        end = span.end
    rest = re.sub(r"Step \d+ ?[:-]|\d[.)]|[#*]", "", text[end:])  # the last label may have no step
    assert not steps.spans or not rest.strip()


@given(st.lists(st.text("ab =1\n", min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_continuations_keep_the_steps_of_their_prefix(texts):
    """A continuation of a prefix is split into the same steps, followed by the new one."""
    text = "".join(f"Step {n}: {t}\n" for n, t in enumerate(texts, start=1))
    steps = split_steps(text)
    for number in range(1, len(steps) + 1):
        continued = split_steps(steps.prefix(number) + " other", steps.style)
        assert len(continued) == number
        assert continued.spans[: number - 1] == steps.spans[: number - 1]
        assert continued.step(number) == " other"


def test_unknown_style():
    with pytest.raises(ValueError, match="Did you mean 'line'"):
        split_steps("a", "lines")


@pytest.mark.parametrize(
    ("pattern", "text", "steps"),
    [
        (r"^(?=def )", "def f(x):\n    x\ndef g(x):\n    x", ["def f(x):\n    x", "def g(x):\n    x"]),
        (r"^(?!```)(?=.*\w)", "```python\na = 1\n\nb = 2\n```", ["a = 1", "b = 2\n```"]),
        (r"(?<=[.] )(?=[A-Z])", "One. Two and 3.5. Four", ["Two and 3.5.", "Four"]),
        (r"(?=Thought [0-9])", "So: Thought 1 is. Thought 2 is not.", ["Thought 1 is.", "Thought 2 is not."]),
        (r"^Thought \d+:", "Thought 1: a\nThought 2: b", ["a", "b"]),
    ],
)
def test_regular_expressions_that_are_accepted(pattern, text, steps):
    assert list(split_steps(text, check_style(pattern)).texts()) == steps


@pytest.mark.parametrize(
    "pattern", [r"(?=.)", r"\b", r"\B", r"(?= )", r"(?<=\w)", r"(?=[A-Z])", r"\b(?=\w)|^A", r"(?<! )"]
)
def test_regular_expressions_that_match_everywhere(pattern):
    with pytest.raises(ValueError, match=r"matches (an|the) empty string.*, so a step would start anywhere"):
        check_style(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"^(\w+\s*)+:", *(pytest.param(p, marks=pytest.mark.long) for p in (r"(x+x+)+y", r"(.*,)*$(?!.)-", r"(-|--)+#"))],
)
def test_regular_expressions_that_take_exponential_time(monkeypatch, pattern):
    monkeypatch.setattr(step_patterns, "TIME_LIMIT", 1)
    with pytest.raises(ValueError, match=r"takes more than 1 s on texts of 4,000 characters\. Simplify"):
        check_style(pattern)


def test_regular_expressions_that_cannot_be_compiled():
    with pytest.raises(ValueError, match="is not a valid regular expression: the repetition number is too large"):
        check_style("a{99999999999999999999}")
    with pytest.raises(ValueError, match="Did you mean 'label'"):
        split_steps("text", "lable")
