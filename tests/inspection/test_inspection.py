"""`stepdpo inspect`: tokens and sums as in the trainer, and no control characters or markup from the data."""

import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from stepdpo_trl import StepDPOConfig
from stepdpo_trl.cli import main as cli
from stepdpo_trl.inspection.example import CHOSEN, REJECTED, Example, Part, Scoring, Token
from stepdpo_trl.inspection.page import write_page
from stepdpo_trl.inspection.scores import RowEncoder, score
from stepdpo_trl.inspection.sources import read_pairs, read_run
from stepdpo_trl.inspection.terminal import Terminal, wants_color
from stepdpo_trl.inspection.text import columns, shorten, visible_text, visible_token, wrap
from stepdpo_trl.pipeline.build import make_pairs
from stepdpo_trl.runs.run_directory import RunDirectory

from ..reference_dpo import step_log_prob
from ..shared_prefix.vision_architectures import save_llava
from ..tiny import CHATML, TOKENIZERS, byte_level_tokenizer, plain_rows, save_tiny_model, step_rows
from ..training import BETA, logged, make_trainer

SUMS = re.compile(r"sum: log π (\S+?)(?:, log π_ref (\S+), ratio (\S+))?$", re.M)
MARGIN = re.compile(r"implicit reward margin: .* = (\S+)$", re.M)

STEP_ROW = {**step_rows()[5], "chosen_ends_solution": True}
PLAIN_ROW = plain_rows()[1]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 5 + 2?"}]
CONVERSATION = {**STEP_ROW, "prompt": MESSAGES}
PLAIN_CONVERSATION = {
    "prompt": MESSAGES,
    "chosen": [{"role": "assistant", "content": "It is 7."}],
    "rejected": [{"role": "assistant", "content": "It is 8."}],
}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("other"), byte_level_tokenizer(CHATML), seed=1)


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def inspect(capsys, monkeypatch, *argv, width="80"):
    monkeypatch.setenv("COLUMNS", width)
    status = cli.main(["inspect", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (STEP_ROW, {}),
        (STEP_ROW, {"prompt_suffix": "step-dpo", "system_prompt": "Add."}),
        (STEP_ROW, {"prompt_template": "alpaca"}),
        (STEP_ROW, {"max_length": 60}),
        (CONVERSATION, {}),
        (PLAIN_ROW, {}),
        (PLAIN_ROW, {"max_length": 30}),
        (PLAIN_CONVERSATION, {}),
    ],
)
def test_sums_match_the_logs_of_the_trainer(row, options, chat_model, other_model, tmp_path, capsys, monkeypatch):
    reference = AutoModelForCausalLM.from_pretrained(chat_model)
    trainer = make_trainer(other_model, tmp_path / "out", [row], ref_model=reference, max_steps=1, **options)
    trainer.train()
    argv = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    argv += ["--model", other_model, "--reference", chat_model, "--beta", BETA]
    # After another row, so that a wrong row is noticed
    path = write_rows(tmp_path / "pairs.jsonl", {**row, "prompt": "Another"} if "role" not in str(row) else row, row)
    status, out, _ = inspect(capsys, monkeypatch, path, "--row", 1, *argv)
    assert status == 0
    chosen, rejected = SUMS.findall(out)
    for name, shown in (("chosen", chosen), ("rejected", rejected)):
        assert float(shown[0]) == pytest.approx(logged(trainer, f"logps/{name}")[0], abs=1e-4)
        assert float(shown[2]) * BETA == pytest.approx(logged(trainer, f"rewards/{name}")[0], abs=1e-4)
    assert float(MARGIN.findall(out)[0]) == pytest.approx(logged(trainer, "rewards/margins")[0], abs=1e-4)
    assert ("left out: " in out) == ("max_length" in options)


def test_the_reference_of_an_adapter_is_its_base_model(chat_model, tmp_path, capsys, monkeypatch):
    rows = [step_rows()[5]]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = {"peft_config": lora, "eval_dataset": Dataset.from_list(rows), "max_steps": 3, "learning_rate": 1.0}
    trainer = make_trainer(chat_model, tmp_path / "out", rows, **options)
    trainer.train()
    expected = trainer.evaluate()
    trainer.save_model(tmp_path / "adapter")
    path = write_rows(tmp_path / "pairs.jsonl", *rows)
    _, out, _ = inspect(capsys, monkeypatch, path, "--model", tmp_path / "adapter", "--beta", BETA)
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    ids = trainer.train_dataset[0]
    for name, (policy, reference, _) in zip(("chosen", "rejected"), SUMS.findall(out), strict=True):
        assert float(policy) == pytest.approx(expected[f"eval_logps/{name}"], abs=1e-4)
        expected_reference = step_log_prob(base, ids["prompt_ids"], ids[f"{name}_ids"]).item()
        assert float(reference) == pytest.approx(expected_reference, abs=1e-4)
        assert abs(float(policy) - float(reference)) > 0.1  # training has changed it
    assert float(MARGIN.findall(out)[0]) == pytest.approx(expected["eval_rewards/margins"], abs=1e-4)
    assert f"with the reference model \n{chat_model}" in out.replace("model " + chat_model, "model \n" + chat_model)


def test_each_token_matches_the_reference_implementation(chat_model, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", STEP_ROW)
    encode = RowEncoder(AutoTokenizer.from_pretrained(chat_model), StepDPOConfig(str(tmp_path), bf16=False))
    scored = score([encode(*read_pairs(path, "train", []))], chat_model, "policy")[0]
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    for part in scored.parts:
        ids = [token.id for token in part.tokens]
        for index, token in enumerate(part.tokens):
            expected = step_log_prob(model, part.prefix_ids + ids[:index], [token.id]).item()
            assert token.policy == pytest.approx(expected, abs=1e-5)
            assert token.reference is None
        assert len(ids) > 3
    assert scored.parts[0].tokens[-1].text == "<|im_end|>"  # only the preferred step ends the solution
    assert "".join(token.text for token in scored.parts[1].tokens) == STEP_ROW["rejected"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_join_to_the_step(name, tmp_path):
    row = {**step_rows()[5], "chosen": " 12 é 日本 42\n = 3 ☃", "rejected": "12 = 日"}
    encode = RowEncoder(TOKENIZERS[name](), StepDPOConfig(str(tmp_path), bf16=False))
    example = encode(*read_pairs(write_rows(tmp_path / "pairs.jsonl", row), "train", []))
    for part in example.parts:
        assert "".join(token.text for token in part.tokens) == row[part.kind]
        # The token with the last byte of a character has its text, the tokens before it are empty
        assert [token.text for token in part.tokens if token.text == "日"] == ["日"]
        assert "" in [token.text for token in part.tokens]


SOLUTION = "Let's think.\nStep 1: 2 * 4 = 8\nStep 2: 7 + 8 = 16\nThe answer is \\boxed{16}."


@pytest.fixture
def run_folder(tmp_path):
    """A run with two solutions. The second is wrong from step 2 on, and has a correction of that step."""
    path = tmp_path / "run"
    with RunDirectory(path, create=True) as run:
        prompt = {"user": "{{ problem }} Think.", "response_prefix": ""}
        sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9}
        settings = {
            "prompt": prompt,
            "problems": "p",
            "shard": [0, 1],
            "sampling": sampling,
            "num_samples": 2,
            "seed": 0,
        }
        run.settings().append("collect", {**settings, "model": {"model": "M", "backend": "transformers"}})
        run.log("problems").append("a", {"problem": "What is 7 + 2 * 4?", "answer": "15", "solution": ""})
        record = {"problem": "a", "finish_reason": "stop", "steps": 2}
        right = SOLUTION.replace("16", "15")
        run.log("solutions").append("a/0", {**record, "outcome": "right", "answer": "15", "text": right})
        run.log("solutions").append("a/1", {**record, "outcome": "wrong", "answer": "16", "text": SOLUTION})
        verdict = {"step": 2, "judge": "arithmetic", "evidence": {"equation": "7 + 8 = 16"}}
        run.log("verdicts.arithmetic").append("a/1", verdict)
        run.log("verdicts.llm").append("a/1", {"step": None, "judge": "llm", "evidence": {"reason": "unsure"}})
        found = [{"text": right, "finish": "stop", "key": "a/0"}]
        run.log("corrections.arithmetic").append("a/1", {"step": 2, "found": found, "samples": 1, "dropped": 0})
    return path


def test_a_solution_of_a_run(run_folder, capsys, monkeypatch):
    monkeypatch.chdir(run_folder.parent)
    for which in ([], ["--row", "1"], ["--solution", "a/1"]):
        status, out, _ = inspect(capsys, monkeypatch, "run", *which, "--color", "never")
        assert status == 0
        assert out == (
            "solution 1 of run\n"
            "  solution: a/1\n"
            "  outcome: wrong, finish reason: stop\n"
            "  answer: 16, gold answer: 15\n"
            "  verdict of arithmetic: step 2\n"
            '  evidence: {"equation": "7 + 8 = 16"}\n'
            "  verdict of llm: abstained\n"
            '  evidence: {"reason": "unsure"}\n'
            "\nprompt\n  What is 7 + 2 * 4? Think.\n"
            "\nbefore step 1\n  Let's think.\n  Step 1:\n"
            "\nstep 1\n   2 * 4 = 8\n"
            "\nstep 2, first wrong step according to arithmetic, ends the solution\n"
            "  Step 2:\n   7 + 8 = 16\n  The answer is \\boxed{16}.\n"
        )
    _, out, _ = inspect(capsys, monkeypatch, "run", "--row", "0", "--color", "always")
    assert "outcome: right" in out
    assert "wrong" not in out
    assert "\x1b[31" not in out  # no red in a right solution


def test_the_wrong_step_has_the_same_sums_in_run_and_pair(run_folder, chat_model, tmp_path, capsys, monkeypatch):
    with RunDirectory(run_folder) as run:
        pairs = write_rows(tmp_path / "pairs.jsonl", *make_pairs(run))
    _, pair, _ = inspect(capsys, monkeypatch, pairs, "--model", chat_model)
    _, solution, _ = inspect(capsys, monkeypatch, run_folder, "--model", chat_model)
    assert SUMS.findall(pair)[1] == SUMS.findall(solution)[1]  # the rejected step is step 2
    assert "step: 2\n" in pair
    assert len(SUMS.findall(solution)) == 2


WEAK = (Token(1, "a", -1.0, -1.04), Token(2, "b", -1.0, -1.06))


def scored_pair(scale=1.0, chosen=" 7", where="row 0 of pairs.jsonl"):
    tokens = (Token(5, chosen, -1.0 * scale, -2.0 * scale), Token(6, "\n", -0.5, -0.5), Token(7, "日", -3.0, -2.75))
    parts = (Part(CHOSEN, "preferred step", chosen + "\n日", ends=True, tokens=tokens),)
    parts += (Part(REJECTED, "rejected step", " 8", tokens=(Token(8, " 8", -1.0, -0.5),)),)
    return Example("row 0", where, (("prefix", "What?\nStep 1: "),), parts)


def test_terminal_without_color():
    out = Terminal(Scoring("policy", "ref", 0.5), 80, color=False).write([scored_pair()])
    assert out.splitlines() == [
        "row 0 of pairs.jsonl",
        "",
        "prefix",
        "  What?",
        "  Step 1:·",
        "",
        "preferred step, 3 tokens, ends the solution",
        "        ·7    ↵",
        "  log π -1.00 -0.50",
        "  ratio +1.00 +0.00",
        "        日",
        "  log π -3.00",
        "  ratio -0.25",
        "  sum: log π -4.5000, log π_ref -5.2500, ratio +0.7500",
        "",
        "rejected step, 1 token",
        "        ·8",
        "  log π -1.00",
        "  ratio -0.50",
        "  sum: log π -1.0000, log π_ref -0.5000, ratio -0.5000",
        "",
        "implicit reward margin: 0.5 x (+0.7500 - -0.5000) = +0.6250",
        "",
        "· space, ↵ end of line, → tab, ◌ part of a character",
        "log π: log-probability of the token under policy, in nats",
        "ratio: log π - log π_ref, with the reference model ref",
    ]


def test_terminal_colors():
    out = Terminal(Scoring("policy", "ref"), 80, color=True).write([scored_pair()])
    assert "\x1b[2m  Step 1:·" not in out  # the indent has no color
    assert "  \x1b[2mStep 1:·\x1b[0m" in out
    assert "\x1b[32;1mpreferred step, 3 tokens, ends the solution\x1b[0m" in out
    assert "\x1b[38;5;231;48;5;34m·7\x1b[0m" in out  # the strongest ratio, above 0
    assert "\x1b[38;5;231;48;5;95m日\x1b[0m" in out  # a quarter of it, below 0: grayish
    assert "\x1b[2m↵\x1b[0m" in out  # a ratio of 0
    assert "\x1b[31;1mrejected step, 1 token\x1b[0m" in out
    assert "\x1b[38;5;231;48;5;124m·8\x1b[0m" in out  # half of it
    weak = replace(scored_pair(), parts=(Part(REJECTED, "step", "ab", tokens=WEAK), *scored_pair().parts))
    out = Terminal(Scoring("policy", "ref"), 80, color=True).write([weak])
    assert "\x1b[31ma\x1b[0m" in out  # 4% of the strongest
    assert "\x1b[38;5;231;48;5;65mb\x1b[0m" in out  # 6 %


def test_lines_fit_the_terminal(chat_model, tmp_path, capsys, monkeypatch):
    row = {**STEP_ROW, "prompt": "日本語の問題です " * 30 + "x" * 200}
    path = write_rows(tmp_path / "pairs.jsonl", row)
    for width in (40, 80):
        for argv in ([], ["--model", chat_model]):
            _, out, _ = inspect(capsys, monkeypatch, path, *argv, width=str(width))
            assert max(map(columns, out.splitlines())) <= width
            assert out.replace("\n  ", "").count("x" * 200) == 1  # no character is lost
            assert out.count("日") == 30
    _, out, _ = inspect(capsys, monkeypatch, path, "--short")
    assert f" ... {len(row['prompt']) - 360} characters ... " in out.replace("\n  ", "")


def test_text():
    assert wrap("ab cd efgh", 5) == ["ab ", "cd ", "efgh"]
    assert wrap("日本語", 4) == ["日本", "語"]
    assert wrap("a\n\nb", 4) == ["a", "", "b"]
    assert columns("日e\u0301x") == 4
    assert visible_token(" a\n\t\u200b") == "·a↵→\\u200b"
    assert visible_token("") == "◌"
    assert visible_text("a b\n\x1b[31mc \n") == "a b\n\\x1b[31mc·↵"
    assert shorten("a" * 360) == "a" * 360
    assert shorten("a" * 361).split(" ... ") == ["a" * 120, "1 characters", "a" * 240]


def test_control_characters_and_markup_are_escaped(chat_model, tmp_path, capsys, monkeypatch):
    hostile = "\x1b]0;title\x07\x1b[2J\u202e<script>alert(1)</script><img src=http://example.com/x>'\""
    row = {key: value + hostile if key != "chosen" else hostile for key, value in step_rows()[5].items()}
    path = write_rows(tmp_path / "pairs.jsonl", row)
    for argv in ([], ["--model", chat_model]):
        _, out, _ = inspect(capsys, monkeypatch, path, *argv, "--color", "never")
        assert all(character.isprintable() or character == "\n" for character in out)
        page = tmp_path / "page.html"
        inspect(capsys, monkeypatch, path, *argv, "--html", page)
        parsed = Page.read(page.read_text())
        assert not {"script", "img", "link"} & set(parsed.tags)
        assert "\x1b" not in page.read_text()
        assert parsed.text.count("<script>alert(1)</script>" if not argv else "script") >= 4


class Page(HTMLParser):
    """Parser for the tags, attributes and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.tokens = [], [], "", []

    @classmethod
    def read(cls, html):
        page = cls()
        page.feed(html)
        return page

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        if dict(attrs).get("class", "").split()[:1] == ["t"]:
            self.tokens.append([dict(attrs), ""])

    def handle_data(self, data):
        self.text += data
        if self.tags[-1] in ("span", "i") and self.tokens:
            self.tokens[-1][1] += data


def test_page():
    second = replace(scored_pair(chosen="<b>"), name="row 7")
    html = write_page([scored_pair(), second], Scoring("policy", "<ref>", 0.5))
    page = Page.read(html)
    assert "http" not in html  # no external resources
    assert [attributes["href"] for attributes in page.attributes if "href" in attributes] == ["#row-0", "#row-7"]
    assert [attributes["id"] for attributes in page.attributes if "id" in attributes] == ["row-0", "row-7"]
    first, newline, lowered, _ = page.tokens[:4]
    assert first == [
        {"class": "t up", "style": "--a:0.70", "title": "token 5, log π -1.0000, log π_ref -2.0000, ratio +1.0000"},
        "·7",
    ]
    assert newline[0]["style"] == "--a:0.00"
    assert newline[1] == "↵\n"
    assert lowered[0]["class"] == "t down"
    assert lowered[0]["style"] == "--a:0.17"  # 0.7 x 0.25
    assert page.tokens[4][1] == "<b>"
    cells = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", html[html.index("<table") : html.index("</table>")]))
    assert "row 0 preferred step 3 -4.5000 -5.2500 +0.7500 +0.6250 rejected step 1 -1.0000" in cells
    assert "-1.00" in page.text  # both ends of the color scale
    assert "+1.00" in page.text


def test_colors_are_for_terminals(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_color("auto", Screen())
    assert not wants_color("auto", io.StringIO())
    assert wants_color("always", io.StringIO())
    assert not wants_color("never", Screen())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color("auto", Screen())
    assert wants_color("always", Screen())


def test_texts_and_tokens_without_a_model(chat_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", STEP_ROW)
    rows = tmp_path / "folder"
    rows.mkdir()
    Dataset.from_list([STEP_ROW, CONVERSATION | {"prompt": "Again"}]).to_parquet(rows / "train.parquet")
    same = [inspect(capsys, monkeypatch, source)[1] for source in ("pairs.jsonl", "folder", "folder/train.parquet")]
    assert same[0].splitlines()[1:] == same[1].splitlines()[1:] == same[2].splitlines()[1:]
    assert same[0].splitlines()[1:] == [
        "  step: 3",
        "",
        "prompt",
        "  What is 5 + 2? Please.",
        "",
        "initial reasoning steps",
        "  Let's think step by step.",
        "  Step 1: 5 + 0 = 5",
        "  Step 2: 5 + 1 = 6",
        "  Step 3:",
        "",
        "preferred step, ends the solution",
        "   5 + 2 = 7 indeed",
        "",
        "rejected step",
        "   5 + 2 = 8",
    ]
    _, out, _ = inspect(capsys, monkeypatch, rows / "train.parquet", "--row", "1", "--tokenizer", chat_model)
    assert "|·=|" in out
    assert "log π" not in out
    for name, row in (("conversation", CONVERSATION), ("plain", PLAIN_CONVERSATION)):
        _, out, _ = inspect(capsys, monkeypatch, write_rows(tmp_path / f"{name}.jsonl", row))
        assert "  system: Be brief.\n  user: What is 5 + 2?\n" in out
    assert "  assistant: It is 7.\n" in out


@pytest.mark.parametrize(
    ("rows", "argv", "message"),
    [
        ([STEP_ROW] * 3, ["--row", "3"], "--row 3: {} has 3 rows, numbered from 0 to 2."),
        ([STEP_ROW], ["--reference", "m"], "--reference needs --model"),
        ([STEP_ROW], ["--dtype", "auto"], "--dtype needs --model"),
        ([STEP_ROW], ["--beta", "0.2"], "--beta needs --model"),
        ([STEP_ROW], ["--model", "m", "--beta", "nan"], "--beta nan must be a number above 0"),
        ([STEP_ROW], ["--split", "test"], "has no splits"),
        ([STEP_ROW], ["--html", "."], "--html . is a folder"),
        ([STEP_ROW], ["--prompt-suffix", "step-dpo"], "--prompt-suffix changes tokens"),
        ([STEP_ROW], ["--solution", "a"], "--solution needs the folder of a run"),
        ([STEP_ROW], ["--html", "nowhere/page.html"], "there is no folder nowhere"),
        ([STEP_ROW], ["--tokenizer", "./nowhere"], "The tokenizer of './nowhere' cannot be loaded"),
        ([PLAIN_ROW], ["--tokenizer", "MODEL", "--max-length", "5"], "The prompt of row 0 of {} fills max_length=5"),
        ([STEP_ROW], ["--tokenizer", "MODEL", "--max-length", "5"], "which leaves no room for a prefix"),
        ([{**STEP_ROW, "chosen": " "}], [], "`chosen` of row 0 of {} is empty"),
        ([{"prompt": "a", "initial_reason_step": "b", "chosen": "c", "rejected": "d"}], [], "looks like"),
        ([{"text": "a"}], [], "`chosen` of row 0 of {} is missing or empty. Its columns are ['text']"),
        ([], [], "{} is empty. Pass a file with at least one row."),
    ],
)
def test_errors(rows, argv, message, chat_model, tmp_path, capsys, monkeypatch):
    path = write_rows(tmp_path / "pairs.jsonl", *rows)
    argv = [chat_model if word == "MODEL" else word for word in argv]
    status, _, err = inspect(capsys, monkeypatch, path, *argv)
    assert status == 2
    assert err.startswith("stepdpo inspect: error: ")
    assert message.format(path) in err


def test_missing_files_splits_and_solutions(run_folder, tmp_path, capsys, monkeypatch):
    write_rows(tmp_path / "pairs.jsonl", STEP_ROW)
    (tmp_path / "bad.jsonl").write_text('{"prompt": ')
    (tmp_path / "eval").mkdir()
    for name in ("settings.jsonl", "results.json"):
        (tmp_path / "eval" / name).write_text('{"key": "eval"}\n')
    cases = [
        (
            tmp_path / "eval",
            [],
            f"which cannot be shown. Its solutions are in {tmp_path}/eval/records.jsonl. Pass a run of",
        ),
        (tmp_path / "pair.jsonl", [], f"There is no file {tmp_path}/pair.jsonl. Did you mean {tmp_path}/pairs.jsonl?"),
        (tmp_path / "bad.jsonl", [], "cannot be read"),
        (run_folder, ["--row", "2"], f"--row 2: {run_folder} has 2 solutions, numbered from 0 to 1."),
        (run_folder, ["--solution", "b"], "has no solution 'b'. It has 2 solutions, such as 'a/0'."),
    ]
    for source, argv, message in cases:
        status, _, err = inspect(capsys, monkeypatch, source, *argv)
        assert status == 2
        assert message in err
    with pytest.raises(SystemExit):
        cli.main(["inspect", "pairs.jsonl", "--row", "-1"])
    assert "'-1' is not the number of a row" in capsys.readouterr().err
    assert read_run(run_folder, [0, 1, 0])[1].name == "solution 1"


def test_help_does_not_import_torch():
    code = "import sys; from stepdpo_trl.cli import main\n"
    code += "try: main.main(['inspect', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--reference" in done.stdout


@pytest.fixture
def pairs_with_images(tmp_path):
    """Two step pairs with images, and one without."""
    paths = []
    for number, size in enumerate([(16, 16), (640, 480), (1600, 400)]):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.effect_noise(size, 90).save(paths[-1])
    row = {**STEP_ROW, "prompt": "What is it?"}
    return write_rows(tmp_path / "pairs.jsonl", *({**row, "images": images} for images in (paths[:1], paths[1:], [])))


def test_texts_and_images_without_a_model(pairs_with_images, tmp_path, capsys, monkeypatch):
    status, out, _ = inspect(capsys, monkeypatch, pairs_with_images, "--row", 1)
    assert status == 0
    assert "  step: 3\n  [image 640x480]\n  [image 1600x400]\n\nprompt\n  What is it?\n" in out
    inspect(capsys, monkeypatch, pairs_with_images, "--row", 1, "--row", 2, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    shown = re.findall(r"<img src='data:image/png;base64,([^']+)' alt='image (\w+)'>", page)
    assert [size for _, size in shown] == ["640x480", "1600x400"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data, _ in shown]
    assert sizes == [(512, 384), (512, 128)]


@pytest.mark.parametrize("number", [1, 2])
def test_sums_with_images_match_the_logs_of_the_trainer(number, pairs_with_images, tmp_path, capsys, monkeypatch):
    policy, reference = (save_llava(tmp_path / f"llava-{seed}", seed) for seed in (0, 1))
    rows = [json.loads(line) for line in Path(pairs_with_images).read_text().splitlines()]
    trainer = make_trainer(
        policy,
        tmp_path / "out",
        Dataset.from_list(rows).select([number]),
        ref_model=AutoModelForImageTextToText.from_pretrained(reference),
        max_steps=1,
    )
    trainer.train()
    argv = ["--row", number, "--model", policy, "--reference", reference, "--beta", BETA]
    status, out, err = inspect(capsys, monkeypatch, pairs_with_images, *argv)
    assert status == 0, err
    for name, shown in zip(("chosen", "rejected"), SUMS.findall(out), strict=True):
        assert float(shown[0]) == pytest.approx(logged(trainer, f"logps/{name}")[0], abs=1e-4)
        assert float(shown[2]) * BETA == pytest.approx(logged(trainer, f"rewards/{name}")[0], abs=1e-4)
    assert float(MARGIN.findall(out)[0]) == pytest.approx(logged(trainer, "rewards/margins")[0], abs=1e-4)
    assert out.count("[image ") == len(rows[number]["images"])
    if rows[number]["images"]:
        assert "each image shown as one placeholder" in " ".join(out.split())
        assert out.count("<image>") == 2


@pytest.mark.parametrize("column", ["image", "images"])
def test_pairs_without_a_list_of_images_are_refused_as_in_training(column, chat_model, tmp_path, capsys, monkeypatch):
    source = write_rows(tmp_path / "null.jsonl", {**STEP_ROW, column: None})
    status, _, err = inspect(capsys, monkeypatch, source)
    message = f"`{column}` of row 0 of {{}} is None. It must be "
    assert status == 2
    assert message.format(source) in " ".join(err.split())
    dataset = load_dataset("json", data_files=str(source), split="train")
    llava = save_llava(tmp_path / "llava")
    with pytest.raises(ValueError, match=re.escape(message.format("the train dataset"))):
        make_trainer(llava, tmp_path / "out", dataset)


def test_image_that_a_dataset_cannot_decode(tmp_path, capsys, monkeypatch):
    row = step_rows()[5]
    features = Features({**{name: Value("string") for name in row}, "images": List(ImageFeature())})
    rows = [{**row, "images": [{"bytes": data, "path": None}]} for data in (b"no image", b"")]
    source = tmp_path / "pairs.parquet"
    Dataset.from_list(rows, features=features).to_parquet(source)
    status, _, err = inspect(capsys, monkeypatch, source, "--row", 1)
    assert status == 2
    assert "An image of row 1 of " in err


def test_images_that_cannot_be_shown(pairs_with_images, chat_model, tmp_path, capsys, monkeypatch):
    picture = str(tmp_path / "0.png")
    status, _, err = inspect(capsys, monkeypatch, pairs_with_images, "--model", chat_model)
    assert status == 2
    assert "row 0 of" in err
    assert "is the tokenizer of a text model. Pass a vision-language model" in err
    plain = write_rows(tmp_path / "plain.jsonl", {**PLAIN_ROW, "image": picture})
    status, out, _ = inspect(capsys, monkeypatch, plain)
    assert (status, out.count("[image 16x16]")) == (0, 1)
    status, _, err = inspect(capsys, monkeypatch, plain, "--tokenizer", save_llava(tmp_path / "llava"))
    assert status == 2
    assert "is an ordinary preference pair with images, whose tokens cannot be shown" in err
    Path(picture).write_bytes(b"not an image")
    status, _, err = inspect(capsys, monkeypatch, pairs_with_images)
    assert status == 2
    assert "An image of row 0 of" in err


def test_brackets_in_the_name_of_a_file_are_no_pattern(tmp_path):
    for name, step in (("pairs[1].jsonl", "meant"), ("pairs1.jsonl", "other")):
        row = {"prompt": "p", "initial_reason_steps": "", "chosen": step, "rejected": "r"}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (example,) = read_pairs(str(tmp_path / "pairs[1].jsonl"), "train", [0])
    assert example.parts[0].text == "meant"
