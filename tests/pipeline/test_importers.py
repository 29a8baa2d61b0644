"""Importers: step pairs and localization cases, counted rows, and errors of broken files."""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from stepdpo_trl.data.schema import StepPreference
from stepdpo_trl.pipeline.importers.formats import (
    FORMATS,
    LocalizationCase,
    read_math_shepherd,
    read_prm800k,
    read_processbench,
)


# The rows of PRM800K follow the annotated row in the README of github.com/openai/prm800k. In the files, ratings and
# the completions of a step may also be null, and human_completion is an object. See issue 15 there, and the rows
# quoted in the tests of github.com/openreasoner/openr.
def completion(text, rating, flagged=None):
    return {"text": text, "rating": rating, "flagged": flagged}


def step(*completions, chosen=None, human=None, **corrected):
    if human is not None:
        human = {"text": human, "rating": None, "source": "human", "flagged": False, **corrected}
    completions = [completion(*c) for c in completions] or None
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


def labeled(*steps, finish="solution", problem="What is 2 + 2 * 4?", generated=None, control=False, screening=False):
    question = {"problem": problem, "ground_truth_answer": "10"}
    if generated:  # in phase 2
        question |= {"ground_truth_solution": "...", "pre_generated_steps": generated, "pre_generated_answer": "16"}
    return {
        "labeler": "340d89bc-f5b7-45e9-b272-909ba68ee363",
        "timestamp": "2023-01-22T04:34:27.052924",
        "generation": 9 if generated else None,
        "is_quality_control_question": control,
        "is_initial_screening_question": screening,
        "question": question,
        "label": {"steps": list(steps), "total_time": 278270, "finish_reason": finish},
    }


PHASE_1 = labeled(
    step(("Multiply first.", 1), chosen=0),
    # The chosen completion comes first. Texts with both ratings, flagged texts and neutral texts are skipped.
    step(
        ("2 * 4 = 6", -1),
        ("2 * 4 is 8.", 1),
        ("2 * 4 = 8.", 1),
        ("2 * 4 = 7", -1),
        ("Times.", 1),
        ("Times.", -1),
        ("Hm.", 0),
        ("2 * 4 = 9", -1, True),
        ("2 * 4 = 5", -1),
        chosen=2,
    ),
    step(("2 + 8 = 11", -1), human="2 + 8 = 10."),
    step(("So 10.\n\n# Answer\n\n10", 1), ("So 11.\n\n# Answer\n\n11", -1), chosen=0),
)
GENERATED = ["Add first.", "2 + 2 = 4", "4 * 4 = 16", "# Answer\n\n16"]
FOUND_ERROR = labeled(
    step(("Add first.", 0), chosen=0),
    step(("2 + 2 = 4", -1), ("2 * 4 = 8", 1)),
    finish="found_error",
    generated=GENERATED,
)

# The rows of Math-Shepherd follow the card of huggingface.co/datasets/peiyi9979/Math-Shepherd and the rows quoted in
# the tests of github.com/openreasoner/openr. As in trl/examples/datasets/math_shepherd.py, `label` has one character,
# + or -, where `input` has ки.
PROBLEM = "What is 2 + 2 * 4?"


def solution(labels, *steps, problem=PROBLEM, task="GSM8K"):
    text = "\n".join(f"Step {k}: {text} ки" for k, text in enumerate(steps, 1))
    return shepherd(f"{problem} {text}", labels, task)


def shepherd(text, labels, task="GSM8K"):
    marks = iter(labels)
    return {"input": text, "label": re.sub("ки", lambda _: next(marks), text), "task": task}


# The rows of ProcessBench follow the card of huggingface.co/datasets/Qwen/ProcessBench. In its code/run_eval.py, label
# 0 is the first step and -1 means that no step is wrong.
BENCH = [
    {
        "id": "gsm8k-0",
        "generator": "Qwen2-7B-Instruct",
        "problem": "Sue lives in a fun neighborhood...",
        "steps": ["On Friday...", "On Saturday...", "On Sunday..."],
        "final_answer_correct": False,
        "label": 1,
    },
    {
        "id": "gsm8k-1",
        "generator": "Llama-3.1-8B-Instruct",
        "problem": "What is 2 + 3?",
        "steps": ["It is 5."],
        "final_answer_correct": True,
        "label": -1,
    },
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(dataset, prefix, chosen, rejected, index, source, **other):
    return {
        "dataset": dataset,
        "prompt": "What is 2 + 2 * 4?",
        "initial_reason_steps": prefix,
        "chosen": chosen,
        "rejected": rejected,
        "full_chosen": chosen,
        "full_rejected": rejected,
        "answer": "10",
        "step_index": index,
        "chosen_ends_solution": False,
        "rejected_ends_solution": False,
        "source": source,
        **other,
    }


def test_prm800k_pairs(tmp_path):
    path = write(tmp_path / "phase1_train.jsonl", [PHASE_1, FOUND_ERROR])
    one, two = ("prm800k:phase1_train.jsonl:1", "prm800k:phase1_train.jsonl:2")
    end = "So 10.\n\n# Answer\n\n10"
    all_right = f"2 * 4 = 8.\n2 + 8 = 10.\n{end}"
    counts = Counter()
    pairs = list(read_prm800k(path, counts))
    assert pairs == [
        row("prm800k", "Multiply first.\n", "2 * 4 = 8.", "2 * 4 = 6", 2, one, full_chosen=all_right),
        row("prm800k", "Multiply first.\n", "2 * 4 is 8.", "2 * 4 = 7", 2, one),
        row("prm800k", "Multiply first.\n", "2 * 4 = 8.", "2 * 4 = 5", 2, one, full_chosen=all_right),
        row(
            "prm800k",
            "Multiply first.\n2 * 4 = 8.\n",
            "2 + 8 = 10.",
            "2 + 8 = 11",
            3,
            one,
            full_chosen=f"2 + 8 = 10.\n{end}",
        ),
        row(
            "prm800k",
            "Multiply first.\n2 * 4 = 8.\n2 + 8 = 10.\n",
            end,
            "So 11.\n\n# Answer\n\n11",
            4,
            one,
            chosen_ends_solution=True,
            rejected_ends_solution=True,
        ),
        row(
            "prm800k",
            "Add first.\n",
            "2 * 4 = 8",
            "2 + 2 = 4",
            2,
            two,
            full_rejected="2 + 2 = 4\n4 * 4 = 16\n# Answer\n\n16",
        ),
    ]
    assert counts == {"rows": 2, "rows with pairs": 2}
    for pair in pairs:
        StepPreference.from_row(pair, "a pair")


BOTH = step(("8", 1), ("6", -1), chosen=0)


@pytest.mark.parametrize(
    ("reason", "labeled_row"),
    [
        ("quality control or screening", labeled(BOTH, control=True)),
        ("quality control or screening", labeled(BOTH, screening=True)),
        ("bad_problem", labeled(BOTH, finish="bad_problem")),
        ("give_up", labeled(BOTH, step(), finish="give_up")),
        ("no step with both a +1 and a -1", labeled()),
        ("no step with both a +1 and a -1", labeled(step(("6", -1), ("Hm.", 0)), finish="found_error")),
        ("no step with both a +1 and a -1", labeled(step((" ", 1), ("6", -1), chosen=0))),
        # Steps after a step that is not known to be right
        ("no step with both a +1 and a -1", labeled(step(("5", -1), chosen=0), BOTH)),
        ("no step with both a +1 and a -1", labeled(step(("5", None), chosen=0), BOTH)),
        ("no step with both a +1 and a -1", labeled(step(("5", 1, True), chosen=0), BOTH)),
        ("no step with both a +1 and a -1", labeled(step(("5", 0)), BOTH)),
        ("no step with both a +1 and a -1", labeled(step(("6", -1), human="7", corrected_rating=-1))),
    ],
)
def test_prm800k_rows_without_pairs_are_counted(tmp_path, reason, labeled_row):
    counts = Counter()
    assert list(read_prm800k(write(tmp_path / "x.jsonl", [labeled_row]), counts)) == []
    assert counts == {"rows": 1, reason: 1}


def test_prm800k_cases(tmp_path):
    right = labeled(step(("8", 1), chosen=0), step(("10", 0), chosen=0), generated=["8", "10"])
    path_wrong = labeled(step(("8", 1), chosen=0), step(("9", -1), chosen=0), step(("9", -1), chosen=0))
    rest_unrated = labeled(step(("8", 1), chosen=0), generated=["8", "10"])
    unrated = labeled(step(("8", None), chosen=0), step(("9", -1)), generated=["8", "9"], finish="found_error")
    unfinished = labeled(step(("8", 1), chosen=0), finish="found_error")
    rows = [PHASE_1, FOUND_ERROR, right, path_wrong, rest_unrated, unrated, unfinished, labeled(finish="give_up")]
    counts = Counter()
    path = write(tmp_path / "p.jsonl", rows)
    walked = ("Multiply first.", "2 * 4 = 8.", "2 + 8 = 10.", "So 10.\n\n# Answer\n\n10")
    assert list(FORMATS["prm800k"].cases(path, counts)) == [
        LocalizationCase(f"p.jsonl:{k}", PROBLEM, steps, first_wrong, f"prm800k:p.jsonl:{k}", "10")
        for k, steps, first_wrong in [
            (1, walked, None),
            (2, tuple(GENERATED), 2),
            (3, ("8", "10"), None),
            (4, ("8", "9", "9"), 2),
        ]
    ]
    assert counts == {"rows": 8, "cases": 4, "not rated up to a -1 or to the end": 3, "give_up": 1}


def test_math_shepherd_pairs(tmp_path):
    last = "2 + 8 = <<2+8=10>>10. The answer is: 10"
    path = write(
        tmp_path / "m.jsonl",
        [
            solution("++", "2 * 4 = 8.", last),
            solution("+-", "2 * 4 = 8.", "2 + 8 = 11 The answer is: 11"),
            solution("+--", "2 * 4 = 8.", "Take 2:\n2 + 8\n= 12", "The answer is: 12"),
            solution("+++", "2 * 4 = 8.", "Add.", "The answer is: 10.0"),
            solution("--", "2 + 2 = 4.", "4 * 4 = 16. The answer is: 16"),
            solution("--", "2 + 2 = 4.", "4 * 4 = 17. The answer is: 17"),
            solution("--", "2 + 2 = 4.", "2 * 4 = 8.", problem="What is 2 * 2 * 4?"),
            solution("++", "2 * 4 = 8.", "The answer is: 10"),  # its first step has both labels below
            solution("--", "2 * 4 = 8.", "The answer is: 8"),
            solution("+", "The answer is: 16", problem="What is 2 * 8?", task="MATH"),
        ],
    )
    before = "Step 1: 2 * 4 = 8.\nStep 2:"
    a, b, c, d = (f"math_shepherd:m.jsonl:{k}" for k in (1, 2, 3, 4))
    counts = Counter()
    pairs = list(read_math_shepherd(path, counts))
    # In step 1 the only right text, "2 * 4 = 8.", occurs with both labels, so that rows 5, 6 and 9 have no pair
    assert pairs == [
        row(
            "GSM8K",
            before,
            f" {last}",
            " 2 + 8 = 11 The answer is: 11",
            2,
            f"{b}, {a}",
            chosen_ends_solution=True,
            rejected_ends_solution=True,
        ),
        row(
            "GSM8K",
            before,
            " Add.",
            " Take 2:\n2 + 8\n= 12",
            2,
            f"{c}, {d}",
            full_chosen=" Add.\nStep 3: The answer is: 10.0",
            full_rejected=" Take 2:\n2 + 8\n= 12\nStep 3: The answer is: 12",
        ),
    ]
    for pair in pairs:
        StepPreference.from_row(pair, "a pair")
    assert counts == {
        "rows": 10,
        "rows with pairs": 4,
        "no right step to pair with the wrong step": 4,
        "no wrong step to pair with": 2,
    }


def test_math_shepherd_prefix_and_step_are_the_text_without_tags(tmp_path):
    rows = [solution("++", "a", "b The answer is: 1"), solution("+-", "a", "c"), solution("+--", "a", "c", "d")]
    counts = Counter()
    pairs = list(read_math_shepherd(write(tmp_path / "m.jsonl", rows), counts))
    assert len(pairs) == 1
    for side, source in (("full_chosen", rows[0]), ("full_rejected", rows[1])):
        text = source["input"].removeprefix(f"{PROBLEM} ").replace(" ки", "")
        assert pairs[0]["initial_reason_steps"] + pairs[0][side] == text
    assert pairs[0]["answer"] == "1"
    assert counts == {"rows": 3, "rows with pairs": 2, "wrong step already in a pair of another row": 1}


@pytest.mark.parametrize(
    ("reason", "text", "labels"),
    [
        ("steps and ки do not match", "Q? 4 ки\nStep 2: 5 ки", "++"),  # without "Step 1:"
        ("steps and ки do not match", "Q? ки Step 1: 4 ки\nStep 2: 5 ки", "+++"),  # a tag in the problem
        ("steps and ки do not match", "Q? Step 1: 4\nStep 2: 5 ки", "+"),  # a step without a tag
        ("steps and ки do not match", "Q? Step 1: 4 ки\nStep 2: 5", "+"),  # the last one
        ("steps and ки do not match", "Q? Step 1: 4 ки\n5 ки", "++"),  # a tag within a step
        ("steps and ки do not match", "In Step 1: of Q? Step 1: 4 ки", "+"),
        ("empty problem or step", "Q? Step 1: 4 ки\nStep 2: ки", "++"),
        ("empty problem or step", "Step 1: 4 ки", "+"),
        ("step labeled + after one labeled -", "Q? Step 1: 4 ки\nStep 2: 5 ки", "-+"),
        ("no wrong step to pair with", "Q? step 1: 4 ки\nstep 2: 5 ки", "++"),
    ],
)
def test_math_shepherd_rows_without_pairs_are_counted(tmp_path, reason, text, labels):
    counts = Counter()
    assert list(read_math_shepherd(write(tmp_path / "m.jsonl", [shepherd(text, labels)]), counts)) == []
    assert counts == {"rows": 1, reason: 1}


def test_math_shepherd_cases(tmp_path):
    rows = [
        solution("+-", "2 * 4 = 8.", "The answer is: 11"),
        solution("-+", "2 * 4 = 9.", "The answer is: 10"),
        solution("++", "2 * 4 = 8.", "The answer is: 10"),
    ]
    counts = Counter()
    assert list(FORMATS["math_shepherd"].cases(write(tmp_path / "m.jsonl", rows), counts)) == [
        LocalizationCase(f"m.jsonl:{k}", PROBLEM, steps, first_wrong, f"math_shepherd:m.jsonl:{k}", "10")
        for k, steps, first_wrong in [
            (1, ("2 * 4 = 8.", "The answer is: 11"), 2),
            (3, ("2 * 4 = 8.", "The answer is: 10"), None),
        ]
    ]
    assert counts == {"rows": 3, "cases": 2, "step labeled + after one labeled -": 1}


@pytest.mark.parametrize("lines", [True, False])
def test_processbench(tmp_path, lines):
    path = tmp_path / "gsm8k.json"
    write(path, BENCH) if lines else path.write_text(json.dumps(BENCH, indent=2))
    counts = Counter()
    steps = ("On Friday...", "On Saturday...", "On Sunday...")
    cases = [
        LocalizationCase("gsm8k-0", "Sue lives in a fun neighborhood...", steps, 2, "processbench:gsm8k.json:1"),
        LocalizationCase("gsm8k-1", "What is 2 + 3?", ("It is 5.",), None, "processbench:gsm8k.json:2"),
    ]
    assert list(FORMATS["processbench"].cases(path, counts)) == cases
    assert list(read_processbench(path)) == cases
    assert counts == {"rows": 2, "cases": 2}
    assert FORMATS["processbench"].pairs is None


def test_compressed_files_are_read(tmp_path):
    plain = write(tmp_path / "phase1_train.jsonl", [PHASE_1])
    path = tmp_path / "phase1_train.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes() + b"\n"))
    pairs = list(FORMATS["prm800k"].pairs(path, None))
    assert [pair["source"] for pair in pairs] == ["prm800k:phase1_train.jsonl.gz:1"] * 5


GOOD = {"prm800k": PHASE_1, "math_shepherd": solution("+", "4"), "processbench": BENCH[0]}


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("other", sorted(FORMATS))
def test_the_file_of_another_format(tmp_path, format, other):
    path = write(tmp_path / "x.jsonl", [GOOD[other]])
    if format == other:
        assert len(list(FORMATS[format].cases(path, Counter()))) == 1
    else:
        with pytest.raises(ValueError, match=r"`.*` of line 1 of .*x\.jsonl is None\. Expected .*\.jso.* of .*/"):
            list(FORMATS[format].cases(path, Counter()))


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.jsonl is empty\. Expected"),
        (b"\n\n", r"x\.jsonl is empty\. Expected"),
        (b"[]", r"x\.jsonl is empty\. Expected"),
        (
            b"%s\n\n%.40s",
            r"Line 3 of .*x\.jsonl is not valid JSON, or is truncated \(.* at column \d+\): '\{.*Expected",
        ),
        (b"[%s,\n%.40s", r"Line 2 of .*x\.jsonl is not valid JSON, or is truncated"),
        (b"%s\n[%.0s1]", r"The value of line 2 of .*x\.jsonl is \[1\]\. Expected"),
        (b"[%s, 5%.0s]", r"The value of row 2 of .*x\.jsonl is 5\. Expected"),
        (b"%s\n\xff%.0s", r"x\.jsonl cannot be read after line \d \(.*codec can't decode.*\)\. Expected"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:11\n",
            r"is a Git LFS pointer\. Run `git lfs pull` in its repository\. Expected",
        ),
    ],
)
def test_broken_files(tmp_path, format, content, message):
    good = json.dumps(GOOD[format]).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(content % (good, good) if b"%" in content else content)
    with pytest.raises(ValueError, match=message):
        list(FORMATS[format].cases(path, Counter()))
    if FORMATS[format].pairs is not None:
        with pytest.raises(ValueError, match=message):
            list(FORMATS[format].pairs(path, None))


@pytest.mark.parametrize("change", [lambda z: z[:-20], lambda z: z[:30] + b"\x00\x00" + z[32:], lambda z: z[:5]])
def test_broken_compressed_files(tmp_path, change):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(change(gzip.compress(json.dumps(PHASE_1).encode())))
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz cannot be read after line 0 \(.*\)\. Expected phase"):
        list(read_prm800k(path))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (labeled(problem=None), r"`question\.problem` of line 1 of .* is None"),
        (labeled(finish=None), r"`label\.finish_reason` of line 1 of .* is None"),
        (labeled(generated=[1]), r"`question\.pre_generated_steps` of line 1 of .* is \[1\]"),
        (labeled(5), r"step 1 of line 1 of .* is 5"),
        (labeled({"completions": ["8"]}), r"completion 1 of step 1 of line 1 of .* is '8'"),
        (labeled(step((None, 1))), r"`text` of completion 1 of step 1 of line 1 of .* is None"),
        (labeled(step(("8", True))), r"`rating` of completion 1 of step 1 of line 1 of .* is True"),
        (labeled(step(("8", 2))), r"`rating` of completion 1 of step 1 of line 1 of .* is 2"),
        (labeled(step(("8", 1), chosen=1)), r"`chosen_completion` \(completions: 1\) of step 1 of line 1 of .* is 1"),
        (
            labeled(step(("8", 1), chosen=-1)),
            r"`chosen_completion` \(completions: 1\) of step 1 of line 1 of .* is -1",
        ),
        (labeled(step(human=4)), r"`text` of the human completion of step 1 of line 1 of .* is 4"),
    ],
)
def test_broken_prm800k_rows(tmp_path, broken, message):
    with pytest.raises(ValueError, match=message + r".*Expected phase\*_train\.jsonl of openai/prm800k"):
        list(read_prm800k(write(tmp_path / "x.jsonl", [broken])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "Q? Step 1: 4"}, r"`input` \(without ки\) of line 2 of .* is 'Q\? Step 1: 4'"),
        ({"label": "Q? Step 1: 4"}, r"`label` \(without \+ or - where `input` has ки\) of line 2 of .* is 'Q\?"),
        ({"label": "Q? Step 1: 4 ?"}, r"`label` \(without \+ or -"),
        ({"task": None}, r"`task` of line 2 of .* is None"),
    ],
)
def test_broken_math_shepherd_rows(tmp_path, change, message):
    good = shepherd("Q? Step 1: 4 ки", "+")
    with pytest.raises(ValueError, match=message + r".*Expected math-shepherd\.jsonl of peiyi9979/Math-Shepherd"):
        list(read_math_shepherd(write(tmp_path / "x.jsonl", [good, good | change])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, r"`steps` of line 2 of .* is \[\]"),
        ({"steps": ["a", None]}, r"`steps` of line 2 of .* is \['a', None\]"),
        ({"label": 3}, r"`label` \(steps: 3\) of line 2 of .* is 3"),
        ({"label": -2}, r"`label` \(steps: 3\) of line 2 of .* is -2"),
        ({"label": False}, r"`label` of line 2 of .* is False"),
        ({"id": 4}, r"`id` of line 2 of .* is 4"),
        ({"problem": None}, r"`problem` of line 2 of .* is None"),
    ],
)
def test_broken_processbench_rows(tmp_path, change, message):
    path = write(tmp_path / "x.json", [BENCH[0], BENCH[0] | change])
    with pytest.raises(ValueError, match=message + r".*Expected gsm8k\.json, math\.json, .* of Qwen/ProcessBench"):
        list(read_processbench(path))


def test_importers_use_the_standard_library_only():
    code = "import stepdpo_trl.pipeline.importers.formats, sys; print({'torch', 'trl', 'datasets'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"
