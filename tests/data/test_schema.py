import subprocess
import sys

import pytest

from stepdpo_trl.data.schema import StepPreference, check_columns, check_plain_columns

ROW = {
    "dataset": "x",
    "prompt": "What is 2 + 3?",
    "initial_reason_steps": "Step 1:",
    "chosen": " 5",
    "rejected": " 6",
    "answer": "5",
}


def test_record_ignores_other_columns_and_converts_null_prefixes():
    assert StepPreference.from_row(ROW, "row 0") == StepPreference("What is 2 + 3?", " 5", " 6", "Step 1:")
    null = {**ROW, "initial_reason_steps": None, "chosen_ends_solution": True, "rejected_ends_solution": None}
    assert StepPreference.from_row(null, "row 0") == StepPreference("What is 2 + 3?", " 5", " 6", "", True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, r"`chosen` of row 7 is None\. It must be a non-empty string\."),
        ({"chosen": 5}, r"`chosen` of row 7 is 5\. It must be a non-empty string\."),
        ({"rejected": ""}, r"`rejected` of row 7 is empty \(''\), so there is no step to train on\. Remove the row\."),
        ({"rejected": " \n"}, r"`rejected` of row 7 is empty \(' \\n'\)"),
        (
            {"chosen": [{"role": "assistant", "content": "5"}]},
            r"`chosen` of row 7 is .* Pass plain text, not messages",
        ),
        ({"rejected": " 5"}, r"`chosen` and `rejected` of row 7 are the same \(' 5'\).* Remove the row"),
        ({"initial_reason_steps": ["Step 1"]}, r"`initial_reason_steps` of row 7 is .* Join the steps"),
        ({"prompt": None}, r"`prompt` of row 7 is None\. It must be a string, or a list of messages"),
        ({"prompt": ""}, r"`prompt` of row 7 is empty"),
        ({"prompt": []}, r"`prompt` of row 7 is \[\]"),
        ({"prompt": ["What is 2 + 3?"]}, r"`prompt` of row 7 is \['What is 2 \+ 3\?'\]"),
        (
            {"prompt": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Step 0."}]},
            r"`prompt` of row 7 ends with an assistant turn, but the row also has `initial_reason_steps`",
        ),
        ({"chosen_ends_solution": 1}, r"`chosen_ends_solution` of row 7 is 1\. It must be true, false or null"),
    ],
)
def test_bad_rows(change, message):
    with pytest.raises(ValueError, match=message):
        StepPreference.from_row({**ROW, **change}, "row 7")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "initial_reason_steps", "chosen"], r"`rejected` is missing from the data, which has \['chosen'"),
        (["prompt", "initial_reason_steps", "choosen", "rejected"], "nearest column, 'choosen'"),
        (["question", "initial_reason_steps", "chosen", "rejected"], "nearest column, 'question'"),
        ([*ROW, "chosen_end_solution"], "Did you mean `chosen_ends_solution`"),
    ],
)
def test_bad_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        check_columns(columns, "the data")


@pytest.mark.parametrize("column", ["initial_reason_step", "initial_reasoning_steps", "Initial_reason_steps"])
def test_misspelled_prefix_column(column):
    with pytest.raises(ValueError, match=f"Column `{column}` of the data looks like `initial_reason_steps`"):
        check_plain_columns(["prompt", column, "chosen", "rejected"], "the data")
    check_plain_columns(["prompt", "chosen", "rejected", "reason", "initial_steps"], "the data")


def test_data_format_needs_only_the_standard_library():
    code = "import sys, stepdpo_trl.data.schema, stepdpo_trl.data.prompts; "
    code += "print({'torch', 'trl', 'transformers'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt", "a\ud800"),
        ("prompt", [{"role": "user", "content": "\udfff"}]),
        ("prompt", [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]),
        ("initial_reason_steps", "\ud800"),
        ("chosen", "5 \ud800 6"),
        ("rejected", "\udc00"),
    ],
)
def test_half_characters(column, value):
    """They come from JSON such as "\\ud83d", cut out of an emoji. Tokenizers raise a TypeError on them."""
    with pytest.raises(
        ValueError, match=rf"`{column}` of row 7 contains '\\u[a-f0-9]+', half of a character.* remove"
    ):
        StepPreference.from_row({**ROW, column: value}, "row 7")
    assert StepPreference.from_row({**ROW, "chosen": "\U0001f600"}, "row 7").chosen == "\U0001f600"
