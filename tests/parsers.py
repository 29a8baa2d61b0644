"""Every parser of text from models, servers and people, and texts that are hard to parse."""

import json
import random
import signal
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from stepdpo_trl.data.answer_rules import agrees, final_answer, is_text, normalize, split_unit, text_key
from stepdpo_trl.data.answers import check_answer, check_choice
from stepdpo_trl.data.choices import correct_option
from stepdpo_trl.data.prompts import JUDGE_PROMPTS, STEP_PROMPTS
from stepdpo_trl.data.schema import StepPreference
from stepdpo_trl.data.steps import STYLES, split_steps
from stepdpo_trl.evaluation.majority import _key
from stepdpo_trl.inspection.text import split_marks, visible_text, wrap
from stepdpo_trl.pipeline.importers.formats import FORMATS
from stepdpo_trl.pipeline.judges.arithmetic import evaluate_expression, false_equations
from stepdpo_trl.pipeline.judges.human_markdown import to_markdown
from stepdpo_trl.pipeline.judges.llm import read_step
from stepdpo_trl.pipeline.pairs import normalize_problem
from stepdpo_trl.pipeline.policy import render_template
from stepdpo_trl.pipeline.records import problems_of, read_problems
from stepdpo_trl.pipeline.rectify import normalize_step
from stepdpo_trl.quickstart.arithmetic import read_result, split_labeled_steps
from stepdpo_trl.runs.run_directory import Log, RunError

SIZE = 100_000  # characters of a hard text
PROBLEM = "What is 1 + 2 * 3?"

# fmt: off
PIECES = [
    "0", "1", "9.", "1,", "1,234", "1.", "(", ")", "()", "(1", "1)", "\\", "\\(", "\\)", "\\[", "\\]", "$", "$1",
    "$$", "{", "}", "[", "]", "\\frac{", "\\frac{1}{2}", "\\text{", "\\text{cm}/", "\\boxed{", "\\boxed{1}", "\\$",
    "%", "1%", "=", "1=", "1+", "1*2=2", "-", "--", "*", "**", "#", "####", "_", "1_", ".", ",", "!", "/", "1/", "^2",
    "x", "1x", "a", "\u00e9", "\u0301", "\u2212", "\u00d7", "answer:", "Answer", "{,}", "~", "\u00b0", "'", "\ufeff",
    "<|im_end|>", "<extra_0>", "\u043a\u0438", "{{", "{%", "&amp;", "<b>", "\ud800", "NaN", "\u00a0", " ", "\n", "\t",
    "\r", "\r\n", "\u0000", "\n\n", " \n", "\n1. ", "Step 1:", "\nStep 1: ", ". Step 1:", "\\boxed 1 ", "1 + 2 = 3\n",
    "1 + 2 = ", "1, ", " and ", "answer is ", " x ", "1 million ", ", leaving ", "1 + 2 = 3, leaving 4",
]
# fmt: on


def hard_text(before, unit, after):
    """Repeat a unit to 100 KB."""
    return before + unit * (SIZE // len(unit)) + after


def mixture(pieces, seed):
    """Concatenate pieces at random to 100 KB."""
    return "".join(random.Random(seed).choices(pieces, k=SIZE))[:SIZE]


def parsers(folder: Path):
    """Return every parser by name, as a function of a text. Files are written to a folder."""
    never_equal = {
        f"agrees/{gold}": lambda text, gold=gold: agrees(gold, text, lambda *_: False) for gold in ("12 cm", "Monday")
    }
    by_style = {
        f"steps/{style}": lambda text, style=style: split_steps(text, style).texts() for style in (None, *STYLES)
    }
    return {
        **by_style,
        **never_equal,
        "final_answer": final_answer,
        "check_answer": lambda text: check_answer("7", f"\\boxed{{{text}}}"),
        "check_answer/gold": lambda text: check_answer(text, "\\boxed{7}"),
        "check_choice": lambda text: (check_choice("B", text), check_choice("B", f"\\boxed{{(B) {text}}}")),
        "correct_option": lambda text: correct_option(f"correct option is {text}"),
        "normalize": normalize,
        "is_text": is_text,
        "text_key": text_key,
        "split_unit": split_unit,
        "majority": _key,
        "judge/llm": lambda text: read_step(f"{text}\\boxed{{{text}}}", 9),
        "judge/arithmetic": lambda text: false_equations(PROBLEM, split_steps(text, "paragraph")),
        "judge/arithmetic/problem": lambda text: false_equations(f"What is {text}?", split_steps(text)),
        "judge/human": to_markdown,
        "expression": evaluate_expression,
        "normalize_step": normalize_step,
        "normalize_problem": normalize_problem,
        "template/judge": lambda text: render_template(
            JUDGE_PROMPTS["gold"], problem=text, answer=text, solution=text, steps=split_steps(text).texts()
        ),
        "template/step": lambda text: render_template(STEP_PROMPTS["qwen2-boxed"].user, problem=text),
        "quickstart": lambda text: (split_labeled_steps(text), read_result(text)),
        "inspect": lambda text: (visible_text(text), wrap(text, 80), split_marks(text)),
        "row": lambda text: [_refused(StepPreference.from_row, row, "row") for row in _step_rows(text)],
        "problems": lambda text: _refused(problems_of, [{"problem": text, "answer": text}], "file"),
        "problems/file": lambda text: _refused(read_problems, _written(folder, text)),
        "records": lambda text: _refused(Log, _written(folder, f"{text}\n")),
        "records/text": lambda text: _refused(Log, _written(folder, json.dumps({"key": "a", "text": text}) + "\n")),
        **{f"import/{name}": lambda text, name=name: _import(folder, name, text) for name in FORMATS},
    }


def _step_rows(text):
    row = {"prompt": "p", "initial_reason_steps": "", "chosen": "c", "rejected": "r"}
    return [{**row, column: text} for column in row]


def _written(folder, text):
    path = folder / "file.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def _refused(function, *args):
    """Call a function. Errors that name the cause are results."""
    try:
        return function(*args)
    except (RunError, ValueError) as error:
        if len(str(error)) > 2000:
            raise AssertionError("the message repeats the text") from error
        return None


def _import(folder, name, text):
    row = {
        "prm800k": {
            "question": {"problem": text, "ground_truth_answer": text},
            "label": {
                "finish_reason": "solution",
                "steps": [{"completions": [{"text": t, "rating": r} for t, r in ((text, 1), (text + "a", -1))]}],
            },
        },
        "math_shepherd": {"input": f"{text} Step 1: {text} ки", "label": f"{text} Step 1: {text} +", "task": "MATH"},
        "processbench": {"id": "1", "problem": text, "steps": [text], "label": 0},
    }[name]
    reader = FORMATS[name].cases
    for content in (text, json.dumps(row)):
        path = _written(folder, content)
        _refused(lambda path=path: list(reader(path, Counter())))


@contextmanager
def cpu_limit(seconds):
    """Raise `TimeoutError` in the code in the context when it has used this CPU time."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s of CPU time")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    started = time.process_time()
    try:
        yield
        assert time.process_time() - started < seconds
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
