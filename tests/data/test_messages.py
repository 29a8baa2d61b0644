"""Suggestions, and text that is safe to print."""

import pytest

from stepdpo_trl.data.messages import counted, did_you_mean, printable, similar_file
from stepdpo_trl.data.prompts import resolve_text
from stepdpo_trl.generation import ModelSpec
from stepdpo_trl.pipeline.judges.expressions import JUDGES, parse_judges
from stepdpo_trl.runs.run_directory import RunError


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rolout", "rollout"), ("arith", "arithmetic"), ("humans", "human"), ("", None), ("x", None), ("judge", None)],
)
def test_suggestions_need_a_close_name(name, expected):
    assert did_you_mean(name, JUDGES) == (f" Did you mean {expected!r}?" if expected else "")
    with pytest.raises(RunError) as error:
        parse_judges(name)
    assert ("Did you mean" in str(error.value)) == (expected is not None)
    assert "Use arithmetic, human, llm, prm, rollout, joined" in str(error.value)


def test_other_names_without_a_suggestion():
    with pytest.raises(ValueError, match=r"is unknown\. Pass one of \['plain'\]"):
        resolve_text("", {"plain": "x"}, "prompt")
    with pytest.raises(ValueError, match=r"does not exist\. Available: transformers"):
        ModelSpec("m", "sglang")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("problem.jsonl", "problems.jsonl"),
        ("poblems.jsonl", "problems.jsonl"),
        ("chekcs.py", "checks.py"),
        ("gold.jsonl", None),  # only the suffix is similar
        ("words.jsonl", None),
        ("test.py", None),
        ("checks.py", None),  # exists
    ],
)
def test_suggested_files_have_similar_names(tmp_path, name, expected):
    for known in ("problems.jsonl", "checks.py", "run"):
        (tmp_path / known).touch()
    assert similar_file(tmp_path / name) == (f" Did you mean {tmp_path / expected}?" if expected else "")


def test_suggested_files_of_one_kind(tmp_path):
    (tmp_path / "check.json").touch()
    assert similar_file(tmp_path / "check.py", "*.py") == ""
    assert similar_file(tmp_path / "absent" / "check.py") == ""


@pytest.mark.parametrize(("count", "expected"), [(0, "0 rows"), (1, "1 row"), (1200, "1,200 rows")])
def test_counted(count, expected):
    assert counted(count, "row") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Überraschung: 数学, 7 € * 3\n\tπ ≈ 3", None),
        ("\x1b[31m\x1b]52;c;x\x07", "\\x1b[31m\\x1b]52;c;x\\x07"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("\u202eabc\u200b", "\\u202eabc\\u200b"),
        ("\ud83d", "\\ud83d"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == (text if expected is None else expected)
