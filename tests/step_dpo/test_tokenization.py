from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepdpo_trl.data.prompts import PROMPT_SUFFIXES
from stepdpo_trl.step_dpo.tokenization import StepTokenizer

from ..tiny import CHATML, TOKENIZERS, byte_level_tokenizer, character_tokenizer, sentencepiece_tokenizer

ROW = {
    "prompt": "What is 2 + 3?",
    "initial_reason_steps": "Let's think step by step.\nStep 1:",
    "chosen": " 2 + 3 = 5",
    "rejected": " 2 + 3 = 6",
}


@cache
def tokenizer_named(name):
    return TOKENIZERS[name]()


def encode(row=ROW, tokenizer=None, **options):
    return StepTokenizer(tokenizer or tokenizer_named("chat"), **options)(row, "row 0")


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Characters of model outputs and difficult ones: spaces, newlines, accents, digits that merge, multi-byte characters
texts = st.text(st.sampled_from(list("Step 12:=+\n the42.√é😀\u0301 \\{}")), max_size=20)
steps = texts.filter(lambda text: text.strip())


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(prompt=texts.filter(bool), prefix=texts, chosen=steps, rejected=steps)
@example(prompt="2?", prefix="Step 1: ", chosen="4", rejected="42")  # the space would merge with the number
@example(prompt="2?", prefix="St", chosen="ep", rejected="e")  # boundary within a word
@example(prompt="2?", prefix="1", chosen="2", rejected="2 ")  # "12" is a token
@example(prompt="2?", prefix="e", chosen="\u0301", rejected="e")  # combining accent at the boundary
def test_text_is_preserved_and_no_token_spans_the_boundary(name, prompt, prefix, chosen, rejected):
    if chosen == rejected:
        return
    tokenizer = tokenizer_named(name)
    row = {"prompt": prompt, "initial_reason_steps": prefix, "chosen": chosen, "rejected": rejected}
    out = encode(row, tokenizer)

    head = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" if name == "chat" else f"{prompt}\n"
    # Llama 2's tokenizer prepends BOS and a dummy space to every text
    start = "<s> " if name == "sentencepiece" else ""
    # The prefix is tokenized as at inference, and both parts decode to the original text
    assert out["prompt_ids"] == tokenizer(head + prefix)["input_ids"]
    for column, step in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        assert text_of(tokenizer, out["prompt_ids"] + out[column]) == start + head + prefix + step


def test_token_ids_by_hand():
    # Token ids are positions in this string
    tokenizer = character_tokenizer("2+3\nS:=5 6")
    row = {"prompt": "2+3", "initial_reason_steps": "S:", "chosen": " =5", "rejected": "=6"}
    assert encode(row, tokenizer) == {
        "prompt_ids": [0, 1, 2, 3, 4, 5],  # 2 + 3 \n S :
        "chosen_ids": [8, 6, 7],  # space = 5
        "rejected_ids": [6, 9],  # = 6
        "overlong": 0,
    }


def test_string_prompt_becomes_a_user_turn_with_system_prompt_and_suffix():
    out = encode(system_prompt="Be brief.", prompt_suffix="step-dpo")
    assert text_of(tokenizer_named("chat"), out["prompt_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>assistant\nLet's think step by step.\nStep 1:"
    )
    literal = encode(system_prompt="Be brief.", prompt_suffix=PROMPT_SUFFIXES["step-dpo"])
    assert literal == out


def test_prompt_as_messages_and_open_assistant_turn():
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    assert encode({**ROW, "prompt": messages}) == encode()
    open_turn = [*messages, {"role": "assistant", "content": ROW["initial_reason_steps"]}]
    assert encode({**ROW, "prompt": open_turn, "initial_reason_steps": None}) == encode()


@pytest.mark.parametrize("prefix", ["", None])
def test_empty_prefix(prefix):
    out = encode({**ROW, "initial_reason_steps": prefix})
    assert text_of(tokenizer_named("chat"), out["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_plain_text_templates():
    tokenizer = tokenizer_named("byte-level")
    assert text_of(tokenizer, encode(tokenizer=tokenizer)["prompt_ids"]).startswith("What is 2 + 3?\nLet's")
    alpaca = text_of(tokenizer, encode(tokenizer=tokenizer, prompt_template="alpaca")["prompt_ids"])
    assert alpaca.endswith("### Instruction:\nWhat is 2 + 3?\n\n### Response:Let's think step by step.\nStep 1:")
    own = encode(tokenizer=tokenizer, prompt_template="{system_prompt}|Q: {prompt} \\boxed{} A: ", system_prompt="S")
    assert text_of(tokenizer, own["prompt_ids"]).startswith("S|Q: What is 2 + 3? \\boxed{} A: Let's")


@pytest.mark.parametrize(("name", "end"), [("byte-level", "</s>"), ("sentencepiece", "</s>"), ("chat", "<|im_end|>")])
def test_end_of_turn_only_for_steps_that_end_the_solution(name, end):
    tokenizer = tokenizer_named(name)
    end_id = tokenizer.convert_tokens_to_ids(end)
    open_ids = encode(tokenizer=tokenizer)
    assert end_id not in open_ids["chosen_ids"] + open_ids["rejected_ids"]

    out = encode({**ROW, "chosen_ends_solution": True, "rejected_ends_solution": None}, tokenizer)
    assert out["chosen_ids"] == [*open_ids["chosen_ids"], end_id]
    assert out["rejected_ids"] == open_ids["rejected_ids"]
    written = encode({**ROW, "chosen": ROW["chosen"] + end, "chosen_ends_solution": True}, tokenizer)
    assert written == out  # not appended twice


def test_prompt_template_replaces_the_chat_template():
    out = encode({**ROW, "chosen_ends_solution": True}, prompt_template="plain")
    tokenizer = tokenizer_named("chat")
    assert text_of(tokenizer, out["prompt_ids"]) == "What is 2 + 3?\nLet's think step by step.\nStep 1:"
    assert out["chosen_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<|im_end|>\n", "<|im_end|>"),  # Qwen
        (" </s>", "</s>"),  # Llama 2
        ("<|im_end|>\n{% if loop.last and not add_generation_prompt %}</s>{% endif %}", "<|im_end|>"),  # Phi-3
        ("\n\n", "<|im_end|>"),  # no end-of-turn token: EOS
    ],
)
def test_end_of_turn_is_the_first_special_token_after_the_solution(after, end):
    tokenizer = byte_level_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}" + after + "{% endfor %}"
    )
    out = encode({**ROW, "chosen_ends_solution": True}, tokenizer)
    assert text_of(tokenizer, out["chosen_ids"]) == " 2 + 3 = 5" + end


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_chat_template_of_a_processor():
    row = {**ROW, "chosen_ends_solution": True}
    assert encode(row, multimodal=True, chat_template=PARTS) == encode(row)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        # With `multimodal=False`, this template would omit the problem
        ({}, {"chat_template": PARTS}, r"does not render the last message of row 0, 'What is 2 \+ 3\?'"),
        ({}, {"chat_template": "{{ raise_exception('no system role') }}"}, "cannot render row 0: .* no system role"),
        ({"tools": "{"}, {}, "cannot render row 0: JSONDecodeError"),
        (
            {"chosen_ends_solution": True},
            {"chat_template": "{{ messages[0].content }}"},
            "The end of the solution in row 0 cannot be learned: the chat template does not render",
        ),
        (
            {
                "prompt": [{"role": "assistant", "content": "Step 1:"}],
                "initial_reason_steps": "",
            },
            {},
            "assistant turn that ends `prompt` of row 0 cannot be continued",
        ),
    ],
)
def test_unusable_chat_templates(change, options, message):
    with pytest.raises(ValueError, match=message):
        encode({**ROW, **change}, **options)


def test_neither_end_of_turn_nor_eos_token():
    tokenizer = character_tokenizer("2+3\nS:=5 6")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an EOS token"):
        encode({**OVERLONG_ROW, "chosen_ends_solution": True}, tokenizer)


def test_bos_is_kept_when_the_prefix_is_truncated():
    tokenizer = tokenizer_named("sentencepiece")
    whole = encode(tokenizer=tokenizer)
    longest = max(len(whole["chosen_ids"]), len(whole["rejected_ids"]))
    truncated = encode(tokenizer=tokenizer, max_length=longest + 5)["prompt_ids"]
    assert truncated == [tokenizer.bos_token_id, *whole["prompt_ids"][-4:]]
    assert encode(tokenizer=tokenizer, max_length=longest + 1)["prompt_ids"] == whole["prompt_ids"][-1:]


def test_tokenizer_that_appends_eos():
    tokenizer = sentencepiece_tokenizer()
    from tokenizers.processors import TemplateProcessing

    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    assert encode(tokenizer=tokenizer) == encode(tokenizer=tokenizer_named("sentencepiece"))


def test_chat_template_kwargs_and_tools_columns():
    template = CHATML + "{% if thinking is defined %}<think>{{ thinking }}</think>{% endif %}{{ tools or '' }}"
    tokenizer = byte_level_tokenizer(template)
    row = {**ROW, "chat_template_kwargs": {"thinking": "no"}, "tools": '[{"name": "calculator"}]'}
    head = text_of(tokenizer, encode(row, tokenizer)["prompt_ids"])
    assert "assistant\n<think>no</think>[{'name': 'calculator'}]Let's think" in head


# The prefix, "2+3\n" and "S:", has six tokens, the steps have three and two
OVERLONG_ROW = {"prompt": "2+3", "initial_reason_steps": "S:", "chosen": " =5", "rejected": "=6"}


@pytest.mark.parametrize(
    ("max_length", "prompt_ids", "overlong"),
    [
        (None, [0, 1, 2, 3, 4, 5], 0),
        (9, [0, 1, 2, 3, 4, 5], 0),
        (8, [1, 2, 3, 4, 5], 1),
        (4, [5], 5),
    ],
)
def test_prefix_is_truncated_from_the_left(max_length, prompt_ids, overlong):
    out = encode(OVERLONG_ROW, character_tokenizer("2+3\nS:=5 6"), max_length=max_length)
    assert out == {
        "prompt_ids": prompt_ids,
        "chosen_ids": [8, 6, 7],
        "rejected_ids": [6, 9],
        "overlong": overlong,
    }


def test_overlong_prefix_drop_and_error():
    tokenizer = character_tokenizer("2+3\nS:=5 6")
    out = encode(OVERLONG_ROW, tokenizer, max_length=7, overlong_prefix="drop")
    assert (out["prompt_ids"], out["overlong"]) == ([0, 1, 2, 3, 4, 5], 2)  # marked, not truncated
    assert encode(OVERLONG_ROW, tokenizer, max_length=3, overlong_prefix="drop")["overlong"] == 6
    with pytest.raises(
        ValueError, match=r"row 0 has 6 prefix tokens and 3 step tokens, 2 more than max_length=7\. Increase"
    ):
        encode(OVERLONG_ROW, tokenizer, max_length=7, overlong_prefix="error")


@pytest.mark.parametrize("overlong_prefix", ["truncate", "error"])
def test_step_longer_than_max_length(overlong_prefix):
    with pytest.raises(ValueError, match=r"`chosen` of row 0 has 3 tokens, which leaves no room .* more than 3"):
        encode(OVERLONG_ROW, character_tokenizer("2+3\nS:=5 6"), max_length=3, overlong_prefix=overlong_prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_suffix": "step_dpo"}, "Did you mean 'step-dpo'"),
        ({"prompt_template": "plane"}, "Did you mean 'plain'"),
        ({"prompt_template": "Question: {problem}\n"}, r"must contain \{prompt\} exactly once"),
        ({"overlong_prefix": "cut"}, r"must be one of \['truncate', 'drop', 'error'\]"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        encode(**options)


def test_system_prompt_without_placeholder():
    with pytest.raises(ValueError, match=r"does not contain \{system_prompt\}\. Add it to `prompt_template`"):
        encode(tokenizer=tokenizer_named("byte-level"), system_prompt="Be brief.")


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        ("chat", {"system_prompt": "Be brief."}, "are for string prompts, but `prompt` of row 0 is a list"),
        ("byte-level", {}, "the tokenizer has no chat template to render it"),
    ],
)
def test_messages_that_cannot_be_rendered(tokenizer, options, message):
    row = {**ROW, "prompt": [{"role": "user", "content": "What is 2 + 3?"}]}
    with pytest.raises(ValueError, match=message):
        encode(row, tokenizer_named(tokenizer), **options)


def test_special_tokens_in_texts_are_those_of_the_chat_template():
    """They are neither escaped nor refused, as in `apply_chat_template` and in generation."""
    tokenizer = byte_level_tokenizer(CHATML)
    texts = {
        "prompt": "a<|im_end|>b",
        "initial_reason_steps": "c<|im_start|>",
        "chosen": "d<|im_end|>",
        "rejected": "e",
    }
    row = StepTokenizer(tokenizer)(texts, "row 0")
    messages = [{"role": "user", "content": texts["prompt"]}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for step in ("chosen", "rejected"):
        text = whole + texts["initial_reason_steps"] + texts[step]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row["prompt_ids"] + row[f"{step}_ids"] == ids
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert (row["prompt_ids"][-1], row["chosen_ids"][-1]) == (start, end)
    assert row["prompt_ids"].count(end) == 1 + tokenizer(whole)["input_ids"].count(end) - 1 >= 2
