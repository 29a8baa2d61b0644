"""The comparison on GSM8K: its data against a hand-made run, its statistics, its commands, and that it resumes."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stepdpo_trl.cli import main as cli
from stepdpo_trl.cli.loop import _check_data, _check_training, _make_data_parser
from stepdpo_trl.cli.train_arguments import parse_arguments
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.run_directory import RunDirectory, RunError

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "gsm8k"
SIX = ["sft", "dpo-whole", "dpo-pairs", "dpo-tokens", "step-dpo", "sdpo"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the script sets it for the whole process


# ------------------------------------------------------------------------------------------------ hand-made run

USER, PREFIX = "{{ problem }} Box it.", "Go.\nStep 1:"
# Solutions after the prefix: problem, outcome, finish reason, tokens, text
SOLUTIONS = {
    "A/s/0": ("A", "wrong", "stop", 10, " one\nStep 2: bad\nStep 3: so \\boxed{9}"),
    "A/s/1": ("A", "right", "stop", 20, " eins\nStep 2: zwei \\boxed{1}"),
    "A/s/2": ("A", "right", "length", 30, " eins \\boxed{1} and on"),
    "A/s/3": ("A", "wrong", "length", 40, " un \\boxed{8} and on"),
    "B/s/0": ("B", "right", "stop", 5, " two \\boxed{2}"),
    "B/s/1": ("B", "wrong", "stop", 6, " three \\boxed{3}"),
    "C/s/0": ("C", "wrong", "stop", 7, " four \\boxed{4}"),
    "C/s/1": ("C", "unreadable", "length", 8, " five"),
    "D/s/0": ("D", "wrong", "stop", 11, " test \\boxed{5}"),
    "D/s/1": ("D", "right", "stop", 12, " test \\boxed{6}"),
}
# First wrong step, and the corrected solution with its finish reason
CORRECTIONS = {
    "A/s/0": (2, " one\nStep 2: good\nStep 3: so \\boxed{1}", "stop"),
    "B/s/1": (1, " fine \\boxed{2} and on", "length"),
    "D/s/0": (1, " fine \\boxed{6}", "stop"),
}
LATER = {"A/r/0": ("localize arithmetic", 100), "A/p/0": ("rectify arithmetic", 200)}  # tokens of other stages
PAIR_A = {
    "prompt": "Problem A? Box it.",
    "initial_reason_steps": "Go.\nStep 1: one\nStep 2:",
    "chosen": " good",
    "rejected": " bad",
    "chosen_ends_solution": False,
    "rejected_ends_solution": False,
    "problem_id": "A",
}
PAIR_B = {
    "prompt": "Problem B? Box it.",
    "initial_reason_steps": PREFIX,
    "chosen": " fine \\boxed{2} and on",
    "rejected": " three \\boxed{3}",
    "chosen_ends_solution": False,  # it was cut
    "rejected_ends_solution": True,
    "problem_id": "B",
}
WHOLE_A = {
    **PAIR_A,
    "chosen": " good\nStep 3: so \\boxed{1}",
    "rejected": " bad\nStep 3: so \\boxed{9}",
    "chosen_ends_solution": True,
    "rejected_ends_solution": True,
}


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(folder, solutions=SOLUTIONS, corrections=CORRECTIONS, later=LATER):
    """Write the folder of a run as `stepdpo data` would."""
    folder.mkdir(parents=True)
    collect = {"problems": "train", "prompt": {"user": USER, "response_prefix": PREFIX}, "num_samples": 4, "seed": 0}
    collect["sampling"] = {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 400}
    collect["model"], collect["shard"] = {"model": "M", "backend": "transformers"}, [0, 1]
    write_lines(folder / "settings.jsonl", [{"key": "collect", **collect}])
    names = sorted({problem for problem, *_ in solutions.values()})
    problems = [{"key": name, "problem": f"Problem {name}?", "answer": "1", "solution": ""} for name in names]
    write_lines(folder / "problems.jsonl", problems)
    records, generations = [], []
    for key, (problem, outcome, reason, tokens, text) in solutions.items():
        record = {"key": key, "problem": problem, "outcome": outcome, "answer": "1", "finish_reason": reason}
        records.append({**record, "steps": 1, "text": PREFIX + text})
        generation = {"key": key, "stage": "collect 4", "text": text, "finish_reason": reason}
        generations.append({**generation, "prompt_tokens": 9, "tokens": tokens})
    write_lines(folder / "solutions.jsonl", records)
    for key, (stage, tokens) in later.items():
        generation = {"key": key, "stage": stage, "text": "", "finish_reason": "stop"}
        generations.append({**generation, "prompt_tokens": 9, "tokens": tokens})
    write_lines(folder / "generations.policy.jsonl", generations)
    verdicts, found = [], []
    for key, (step, text, reason) in corrections.items():
        verdicts.append({"key": key, "step": step, "judge": "arithmetic", "evidence": {}})
        one = {"key": f"{key}/0", "text": PREFIX + text, "finish": reason, "check": {}}
        found.append({"key": key, "step": step, "samples": 1, "dropped": 0, "found": [one]})
    if corrections:
        write_lines(folder / "verdicts.arithmetic.jsonl", verdicts)
        write_lines(folder / "corrections.arithmetic.jsonl", found)
    times = {"collect": 60.0, "localize arithmetic": 30.0, "rectify arithmetic": 30.0}
    (folder / "time.json").write_text(json.dumps(times))


def write_problem_files(folder):
    """Write files of problems, in which D is a test problem."""
    folder.mkdir(parents=True)
    for name, texts in (("train", "ABC"), ("tuning", "E"), ("test", "D")):
        write_lines(folder / f"{name}.jsonl", [{"problem": f"Problem {text}?", "answer": "1"} for text in texts])


class Commands:
    """Stand-in for commands: remembers them, and writes what the comparison reads."""

    def __init__(self, out):
        self.out, self.seen, self.stop_at, self.fail = out, [], None, lambda words: None

    def __call__(self, command, log):
        words = list(command)
        if len(self.seen) == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt
        self.seen.append(words)
        self.fail(words)
        folder = next((Path(words[words.index(n) + 1]) for n in ("--output-dir", "--output_dir") if n in words), None)
        getattr(self, words[1].replace("-", "_") if words[0] == "stepdpo" else "train")(folder, words)

    def collect(self, folder, words):
        count = int(words[words.index("--num-samples") + 1])
        more = {
            f"{name}/m/{number}": (name, "right" if number % 2 else "wrong", "stop", 10, f" {name} {number}")
            for name in "ABC"
            for number in range(count)
        }
        shutil.rmtree(folder, ignore_errors=True)
        write_run(folder, more, {}, {})

    def train(self, folder, words):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "checkpoint-1").mkdir()

    def merge(self, folder, words):
        folder.mkdir(parents=True)

    def loop(self, folder, words):
        write_run(folder / "stage-2" / "run")
        (folder / "stage-2" / "model").mkdir()
        write_lines(folder / "stage-2" / "pairs.jsonl", [PAIR_A])

    def eval(self, folder, words):
        tuning = "tuning" in folder.parts
        solved = "3e-05" in folder.parent.name if tuning else "step-dpo" in folder.parts
        outcomes = ["right" if solved else "wrong", "wrong" if solved else "right", "unreadable", "right"]
        folder.mkdir(parents=True)
        for number, outcome in enumerate(outcomes):
            text = f"Go.\nStep 1: same\nStep 2: {outcome} {number}"
            sample = {"outcome": outcome, "answer": str(number), "text": text}
            row = {
                "id": str(number),
                "problem": f"Problem {number}?",
                "gold": "7",
                "models": {"M": {"samples": [sample]}},
            }
            with (folder / "records.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            reply = {"key": str(number), "finish_reason": "length" if number == 2 else "stop", "tokens": 10 * number}
            with (folder / "answers.M.jsonl").open("a") as file:
                file.write(json.dumps(reply) + "\n")
        accuracy = outcomes.count("right") / 4 + solved / 100
        (folder / "results.json").write_text(json.dumps({"results": [{"accuracy": accuracy}]}))


class Isolated:
    """Stand-in for functions that load a model."""

    def __init__(self):
        self.seen = []

    def __call__(self, function, arguments, log):
        self.seen.append(function.__name__)
        if function.__name__ == "write_staged":
            from method_data import staged_rows

            source, target, *_ = arguments
            rows = [json.loads(line) for line in source.read_text().splitlines()]
            write_lines(target, staged_rows(rows, [float(number) for number in range(len(rows))]))


def open_stage(out, commands, isolated=None, **settings):
    """Open the stages of a comparison that uses the hand-made run."""
    from data_stage import DataStage
    from plan import Connection, Settings
    from training_stage import TrainingStage
    from units import Units

    run = RunDirectory(out, create=True)
    settings = Settings(**{"model": "M", "runs": (str(out.parent / "run"),), **settings})
    data = DataStage(Units(run, commands, isolated or Isolated()), settings, Connection())
    return run, TrainingStage(data, on_cpu=True)


@pytest.fixture
def made(tmp_path):
    """Data of all methods from the hand-made run."""
    write_run(tmp_path / "run")
    out = tmp_path / "out"
    write_problem_files(out / "problems")
    commands = Commands(out)
    run, stage = open_stage(out, commands)
    with run:
        stage.units.do("problems", lambda: None)
        stage.data.make(SIX)
    return stage.data, commands


def rows_of(data, name):
    return [json.loads(line) for line in data.data_file(name).read_text().splitlines()]


def by_problem(rows):
    return sorted(rows, key=lambda row: row["problem_id"])


def test_rows_of_step_pairs(made):
    data, _ = made
    assert by_problem(rows_of(data, "step-dpo")) == [PAIR_A, PAIR_B]  # not D, a test problem
    # Two of the two pairs; of all stages, with the solutions of D
    tokens = sum(solution[3] for solution in SOLUTIONS.values()) + 300
    assert data.facts_of("step-dpo") == {"rows": 2, "tokens": tokens, "minutes": 2.0, "problems": 3}


def test_rows_of_whole_solutions(made):
    data, _ = made
    assert by_problem(rows_of(data, "dpo-whole")) == [WHOLE_A, PAIR_B]  # in B, the step is the rest of the solution
    assert data.facts_of("dpo-whole")["tokens"] == data.facts_of("step-dpo")["tokens"]


def test_rows_of_right_solutions(made):
    """Corrected solutions first, then sampled ones, but none that was cut. C and D have no pair."""
    data, _ = made
    rows = {row["completion"][0]["content"]: row["prompt"][0]["content"] for row in rows_of(data, "sft")}
    assert rows == {
        f"{PREFIX} one\nStep 2: good\nStep 3: so \\boxed{{1}}": "Problem A? Box it.",
        f"{PREFIX} two \\boxed{{2}}": "Problem B? Box it.",
    }
    (first, second) = rows_of(data, "sft")
    assert [first["prompt"][0]["role"], first["completion"][0]["role"]] == ["user", "assistant"]
    assert second.keys() == {"prompt", "completion"}


def test_rows_of_right_solutions_take_turns():
    from method_data import right_rows

    pairs = [{"problem_id": name, "prompt": f"{name}?"} for name in "ABA"]
    corrected = [(name, f"{name}{number}", "stop") for name in "AB" for number in (0, 1, 0)] + [("B", "B2", "stop")]
    rows = right_rows(pairs, [], corrected, 9)
    assert [row["completion"][0]["content"] for row in rows] == ["A0", "B0", "A1", "B1", "B2"]
    assert [row["completion"][0]["content"] for row in right_rows(pairs, [], corrected, 3)] == ["A0", "B0", "A1"]


def test_rows_of_independent_pairs(made):
    data, _ = made
    first = {
        "prompt": "Problem A? Box it.",
        "initial_reason_steps": PREFIX,
        "chosen": " eins\nStep 2: zwei \\boxed{1}",
        "rejected": " one\nStep 2: bad\nStep 3: so \\boxed{9}",
        "chosen_ends_solution": True,
        "rejected_ends_solution": True,
        "problem_id": "A",
    }
    second = {**first, "chosen": " eins \\boxed{1} and on", "rejected": " un \\boxed{8} and on"}
    second |= {"chosen_ends_solution": False, "rejected_ends_solution": False}
    other = {**first, "prompt": "Problem B? Box it.", "chosen": " two \\boxed{2}", "rejected": " three \\boxed{3}"}
    other["problem_id"] = "B"
    from method_data import independent_rows

    rows = independent_rows(data.samples)
    assert by_problem(rows[:2]) == [first, other]  # one of each problem before the second one of A
    assert rows[2:] == [second]
    assert rows_of(data, "dpo-pairs") == rows[:2]
    tokens = 10 + 20 + 30 + 40 + 5 + 6 + 7 + 8  # without D, which is not used
    expected = {"rows": 2, "tokens": pytest.approx(2 / 3 * tokens), "minutes": pytest.approx(2 / 3)}
    assert data.facts_of("dpo-pairs") == expected


def test_independent_pairs_for_as_many_tokens(made):
    """The pairs cost 449 tokens, and the 8 usable solutions 126. A sample of each of the 3 problems costs 47.25."""
    data, commands = made
    budget, initial = data.facts_of("step-dpo")["tokens"], 126
    assert budget == 449
    # ceil(323 / 47.25) = 7 samples are estimated to be enough, but they have 10 tokens each: 11 reach 323
    counts = [int(words[words.index("--num-samples") + 1]) for words in commands.seen]
    assert counts == [7, 8, 9, 10, 11]
    spent = initial + 11 * 3 * 10
    pairs = 7 + 6 + 5  # A: 2 + 5 right, B: 1 + 5, C: 5
    count = round(budget / spent * pairs)
    assert data.facts_of("dpo-tokens")["rows"] == len(rows_of(data, "dpo-tokens")) == count == 18
    assert data.facts_of("dpo-tokens")["tokens"] == pytest.approx(spent * count / pairs)
    assert Counter(row["problem_id"] for row in rows_of(data, "dpo-tokens"))["C"] == 5  # from the new samples


def test_rows_of_stages_are_easy_first(made):
    from method_data import staged_rows

    data, _ = made
    rows = [{**PAIR_A, "chosen": f" {number}"} for number in range(5)]
    staged = staged_rows(rows, [-1.0, 2.0, 0.5, 3.0, -4.0])
    assert [(row["chosen"], row["stage"]) for row in staged] == [(" 3", 1), (" 1", 1), (" 2", 2), (" 0", 2), (" 4", 2)]
    first, second = rows_of(data, "sdpo")
    source = rows_of(data, "step-dpo")
    assert [first, second] == [{**source[1], "stage": 1}, {**source[0], "stage": 2}]


def test_random_localization_works_on_a_copy(tmp_path, monkeypatch):
    """The steps are those of the judge, and only the samples of `collect` are copied."""
    import sources
    from experiment_parts import random_judge

    source, target = tmp_path / "run", tmp_path / "random"
    write_run(source)
    write_lines(source / "checks.jsonl", [])
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    asked = []

    class Session:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def rectify(self, path, judge_name, **options):
            asked.append((path, judge_name, options["max_attempts"], options["model"]))
            return Counter(pairs=3)

    monkeypatch.setattr(sources, "Session", Session)
    assert sources.correct_at_random(source, target, {"base_url": "http://x/v1"}, 8) == 3
    assert asked == [(target, "random", 8, {"base_url": "http://x/v1"})]
    verdicts = {v["key"]: v["step"] for v in map(json.loads, (target / "verdicts.random.jsonl").open())}
    wrong = {
        s.key: s for s in (sample.solution for sample in sources.read_samples([source], ())) if s.outcome == "wrong"
    }
    assert verdicts.keys() == wrong.keys()
    for key, solution in wrong.items():
        with pytest.raises(StopIteration) as stop:
            next(random_judge(solution))
        assert verdicts[key] == stop.value.value.step
    kept = [json.loads(line)["key"] for line in (target / "generations.policy.jsonl").open()]
    assert kept == list(SOLUTIONS)
    assert not (target / "corrections.arithmetic.jsonl").exists()
    assert {name: (source / name).read_bytes() for name in before} == before


def test_shards_may_be_missing(tmp_path):
    from sources import costs, read_step_pairs, started_folders

    for number in (10, 2):
        only = {key: value for key, value in SOLUTIONS.items() if key.startswith("A" if number == 2 else "B")}
        fixed = {key: value for key, value in CORRECTIONS.items() if key in only}
        write_run(tmp_path / f"shard-{number}-of-40", only, fixed)
    (tmp_path / "shard-3-of-40").mkdir()  # started, without corrections
    folders = started_folders(tmp_path)
    assert [folder.name for folder in folders] == ["shard-2-of-40", "shard-10-of-40"]
    assert [row["problem_id"] for row in read_step_pairs(folders, [])] == ["A", "B"]
    assert costs(folders) == (100 + 11 + 600, 4.0)
    assert costs(folders, ("collect",)) == (111, 2.0)
    assert read_step_pairs([], []) == []


def test_held_out_problems_are_the_last(tmp_path):
    from plan import Settings
    from sources import problem_files, write_problems

    for name, count in (("train", 5), ("test", 2)):
        rows = [{"question": f"{name} {number}", "answer": f"so\n#### {number}"} for number in range(count)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    names = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    write_problems(Settings(**names, held_out=2), tmp_path / "problems")
    files = problem_files(tmp_path / "problems")
    texts = [[json.loads(line)["problem"] for line in file.open()] for file in (files.train, files.tuning, files.test)]
    assert texts == [["train 0", "train 1", "train 2"], ["train 3", "train 4"], ["test 0", "test 1"]]
    assert json.loads(files.test.read_text().splitlines()[1])["answer"] == "1"
    with pytest.raises(RunError, match="--held-out 5 must be between 1 and 4"):
        write_problems(Settings(**names, held_out=5), tmp_path / "other")


def test_sampling_stops_when_there_are_enough_pairs(tmp_path):
    """Each shard of the hand-made run has pairs of A and B."""

    class Sampling(Commands):
        def data(self, folder, words):
            number = words[words.index("--shard") + 1].partition("/")[0]
            shutil.rmtree(folder / f"shard-{number}-of-9", ignore_errors=True)
            rename = {f"{number}{key}": (number + value[0], *value[1:]) for key, value in SOLUTIONS.items()}
            write_run(folder / f"shard-{number}-of-9", rename, {f"{number}{k}": v for k, v in CORRECTIONS.items()})

    out = tmp_path / "out"
    write_problem_files(out / "problems")
    commands = Sampling(out)
    run, stage = open_stage(out, commands, runs=(), shards=9, pairs=5)
    with run:
        commands.stop_at = 1
        with pytest.raises(KeyboardInterrupt):
            stage.data.collect()
        commands.data(out / "pairs", ["--shard", "1/9"])  # as far as it came
        stage.data.collect()  # the second shard is not complete, so it is resumed
        stage.data.collect()
    assert [words[words.index("--shard") + 1] for words in commands.seen] == ["0/9", "1/9"]  # three pairs each
    cli.make_parser().parse_args(commands.seen[0][1:])


# ------------------------------------------------------------------------------------------------ plan and statistics


def test_methods_have_as_many_trials():
    from plan import METHODS, Settings

    settings = Settings(rates=(1e-4, 1e-6, 1e-5), betas=(0.5, 0.1))
    trials = {name: settings.trials(method) for name, method in METHODS.items()}
    assert {len(own) for own in trials.values()} == {6}
    assert trials["step-dpo"] == [(r, b) for r in (1e-6, 1e-5, 1e-4) for b in (0.1, 0.5)]
    rates = [rate for rate, beta in trials["sft"]]
    assert rates == pytest.approx([1e-6 * 100 ** (number / 5) for number in range(6)], rel=0.05)
    assert {beta for _, beta in trials["sft"]} == {0.0}
    assert Settings(rates=(2e-5,), betas=(0.3,)).trials(METHODS["sft"]) == [(2e-5, 0.0)]


@pytest.mark.parametrize(("batch", "parts"), [(1, [1, 1]), (2, [2, 1]), (3, [1, 3]), (8, [2, 4])])
def test_updates_have_the_size_of_the_batch(batch, parts):
    from plan import Settings, training_options

    words = training_options(Settings(batch=batch), 1e-5, 0, on_cpu=True)
    names = ("--per_device_train_batch_size", "--gradient_accumulation_steps")
    assert [int(words[words.index(name) + 1]) for name in names] == parts


def test_ties_between_trials_go_to_the_lowest():
    from training_stage import best_trial

    assert best_trial([(3e-5, 0.5, 0.4), (3e-5, 0.1, 0.4), (3e-6, 0.5, 0.3), (3e-4, 0.1, 0.4)]) == (3e-5, 0.1)


def outcomes(solved):
    from scores import Outcomes

    return Outcomes(solved, 0, 0, 1.0)


def test_differences_are_paired():
    from scores import accuracy, difference

    base = [outcomes([1, 0, 0, 0, 0, 0, 0, 0, 1, 0])]
    first, second = outcomes([1, 1, 1, 1, 1, 1, 1, 0, 0, 0]), outcomes([1, 1, 1, 1, 1, 0, 0, 0, 1, 0])
    found = difference([first, second], base)
    assert found.value == pytest.approx((0.7 + 0.6) / 2 - 0.2)
    # 6 gained and 1 lost: 2 (1 + 7) / 2^7; 4 gained: 2 / 2^4
    assert found.p == [16 / 128, 2 / 16]
    shares = np.array([0, 1, 1, 1, 1, 0.5, 0.5, 0, -0.5, 0])
    draws = np.random.default_rng(1).choice(shares, (20_000, 10)).mean(1)
    assert found.interval == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.03)
    other = difference([first, second], [second, first])
    assert (other.value, other.p) == (0.0, [2 * (1 + 3) / 8, 2 * (1 + 3) / 8])
    value, (low, high) = accuracy([first, second])
    assert value == pytest.approx(0.65)
    assert 0.3 < low < value < high < 0.95
    with pytest.raises(RunError, match="10 and 2 problems"):
        difference(base, [outcomes([0, 1])])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("Step 1: a\nStep 2: b\nStep 3: c", "Step 1: a\nStep 2: x", (2, "Step 1: a\nStep 2:", " b", " x")),
        ("Go.\nStep 1: a", "Go.\nStep 1: b\nStep 2: c", (1, "Go.\nStep 1:", " a", " b")),
        ("Step 1: a\n\nStep 2: b", "Step 1: a\nStep 2: b", (2, "Step 1: a", "\n\nStep 2: b", "\nStep 2: b")),
        ("Step 1: a\nStep 2: b", "Step 1: a", None),
        ("Step 1: a\nStep 2: b", "Step 1: a\nStep 2: b", None),
    ],
)
def test_first_different_step(before, after, expected):
    from changes import first_difference

    assert first_difference(before, after) == expected


def test_changes_are_ten_in_each_direction():
    from changes import find_changes

    def records(outcomes, word):
        return [
            {
                "problem": f"P{n}",
                "gold": "7",
                "outcome": o,
                "answer": word,
                "text": f"Step 1: same\nStep 2: {word} {n}",
            }
            for n, o in enumerate(outcomes)
        ]

    before = records(["wrong"] * 12 + ["right"] * 3 + ["unreadable"], "old")
    after = records(["right"] * 12 + ["wrong", "right", "unreadable"] + ["wrong"], "new")
    rows = find_changes(before, after, "{{ problem }}!")
    assert [(row["prompt"], row["gained"]) for row in rows] == [
        *((f"P{n}!", True) for n in range(10)),
        ("P12!", False),
        ("P14!", False),
    ]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (" new 0", " old 0")  # the right one is chosen
    assert (rows[10]["chosen"], rows[10]["rejected"]) == (" old 12", " new 12")
    assert {row["initial_reason_steps"] for row in rows} == {"Step 1: same\nStep 2:"}


# ------------------------------------------------------------------------------------------------ units and resuming


def test_failed_function_quotes_its_output(tmp_path):
    from units import CommandError, run_function

    log = tmp_path / "logs" / "one.log"
    run_function(print, ["written"], log)
    with pytest.raises(CommandError, match=r"(?s)`divmod` ended with status 1.*ZeroDivisionError") as error:
        run_function(divmod, [1, 0], log)
    assert "written" not in error.value.output
    assert log.read_text().startswith("written\n")


def test_units_are_done_once_and_add_up_their_time(tmp_path, monkeypatch):
    import units

    now = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr(units.time, "monotonic", lambda: next(now))
    done = []
    with RunDirectory(tmp_path, create=True) as run:
        own = units.Units(run)

        def stopped():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            own.do("one", stopped)
        assert (own.is_done("one"), own.seconds("one")) == (False, 5.0)
    with RunDirectory(tmp_path) as run:
        own = units.Units(run)
        own.do("one", lambda: done.append(1))
        own.do("one", lambda: done.append(2))
        assert (done, own.seconds("one"), own.seconds("two")) == ([1], 12.0, 0.0)


def test_failed_command_quotes_its_output(tmp_path, capsys):
    from units import CommandError, run_command

    log = tmp_path / "logs" / "one.log"
    log.parent.mkdir()
    log.write_text("earlier\n")
    with pytest.raises(CommandError, match=r"(?s)`stepdpo report` ended with status 2.*no-such-run is not") as error:
        run_command(["stepdpo", "report", str(tmp_path / "no-such-run")], log)
    assert "earlier" not in error.value.output
    assert log.read_text().startswith("earlier\n")
    assert "stepdpo report" in capsys.readouterr().out


def run_all(out, commands, isolated, methods=(*SIX, "loop"), seeds=2, **settings):
    from report_stage import write_report

    run, stage = open_stage(out, commands, isolated, **settings)
    with run:
        stage.units.do("problems", lambda: None)
        stage.data.make(methods)
        stage.evaluate_base()
        trained = [name for name in methods if name != "loop"]
        for name in trained:
            stage.tune(name)
        for seed in range(seeds):
            for name in trained:
                stage.train_best(name, seed)
        if "loop" in methods:
            stage.loop()
        return write_report(stage, methods, seeds)


def without_minutes(text):
    return [line for line in text.splitlines() if "minutes" not in line and "| 2 |" not in line]


def test_interrupted_comparison_resumes_at_every_command(tmp_path, monkeypatch):
    import report_stage

    monkeypatch.setattr(report_stage, "versions", dict)
    monkeypatch.setattr("tables.draw", lambda results, file: None)
    write_run(tmp_path / "run")
    tables = []
    for name in ("uninterrupted", "stopped"):
        write_problem_files(tmp_path / name / "problems")
        commands, isolated = Commands(tmp_path / name), Isolated()
        for stop_at in range(0, 500, 7) if name == "stopped" else (None,):
            commands.stop_at = stop_at
            try:
                tables.append(run_all(tmp_path / name, commands, isolated, rates=(3e-6, 3e-5), betas=(0.1,)))
                break
            except KeyboardInterrupt:
                assert len(commands.seen) == stop_at
        shown = [" ".join(words).replace(f"/{name}/", "/OUT/") for words in commands.seen]
        assert len(set(shown)) == len(shown)  # nothing was done twice
        tables.append((shown, isolated.seen))
    whole, listed, stopped, listed_again = tables
    assert listed_again[0] == listed[0]
    assert listed_again[1] == listed[1]
    assert without_minutes(whole) == without_minutes(stopped)
    finals = [words for words in listed[0] if "/final/" in words and "eval" in words]
    assert len(finals) == 2 * (1 + 2 * len(SIX) + 1)
    assert not list((tmp_path / "uninterrupted" / "tuning").glob("*/*/model"))  # weights of trials are not kept
    assert not list((tmp_path / "uninterrupted").glob("**/checkpoint-1"))
    changes = json.loads((tmp_path / "uninterrupted" / "report" / "results.json").read_text())
    assert changes["results"]["step-dpo"]["learning_rate"] == 3e-5  # the better one
    assert changes["results"]["step-dpo"]["outcomes"]["greedy"][0]["solved"] == "1001"
    assert changes["results"]["loop"]["rows"] == 3
    assert changes["results"]["base"]["outcomes"]["greedy"][0] == {
        "solved": "0101",
        "unreadable": 1,
        "cut": 1,
        "tokens": 15.0,
    }


def test_diverged_trial_solves_nothing(tmp_path):
    from units import CommandError

    write_run(tmp_path / "run")
    out = tmp_path / "out"
    write_problem_files(out / "problems")
    commands = Commands(out)

    def fail(words):
        if "train" in words and words[words.index("--learning_rate") + 1] == "3e-05":
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir(parents=True)
            raise CommandError("failed", message)

    commands.fail = fail
    run, stage = open_stage(out, commands, rates=(3e-6, 3e-5), betas=(0.1,))
    with run:
        stage.units.do("problems", lambda: None)
        stage.data.make(["step-dpo"])
        message = "MemoryError"
        with pytest.raises(CommandError):  # another error is not a result
            stage.tune("step-dpo")
        (out / "tuning/step-dpo/3e-05-0.1/model").rmdir()
        message = "FloatingPointError: Training diverged: loss is nan."
        stage.tune("step-dpo")
        assert stage.trials_of("step-dpo") == [(3e-6, 0.1, 0.5), (3e-5, 0.1, 0.0)]


def test_training_resumes_from_its_checkpoint(tmp_path):
    write_run(tmp_path / "run")
    run, stage = open_stage(tmp_path / "out", Commands(tmp_path / "out"))
    with run:
        folder = tmp_path / "model"
        assert "--resume_from_checkpoint" not in stage.training_command("sft", folder, 1e-4, 0.0, 0)
        (folder / "checkpoint-4").mkdir(parents=True)
        (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
        for name in ("sft", "step-dpo"):
            command = stage.training_command(name, folder, 1e-4, 0.1, 0)
            assert command[-2:] == ["--resume_from_checkpoint", str(folder / "checkpoint-4")]


@pytest.mark.parametrize("full", [False, True])
def test_commands_are_valid(tmp_path, made, full):
    """The parsers of the commands accept every option."""
    from plan import Connection
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    data, _ = made
    write_lines(tmp_path / "run.txt", [])
    run, stage = open_stage(data.out, commands := Commands(data.out), full=full, backend="vllm")
    stage.data.connection = Connection("http://localhost:8000/v1", "served", 64, "--max-model-len 2048")
    with run:
        for name in SIX:
            stage.train(f"final/{name}/seed-0", name, 3e-5, 0.5, 1)
        for name in ("step-dpo",):
            stage.tune(name)
        stage.loop()
        commands(["stepdpo", *stage.data._sampling_command(tmp_path / "more.jsonl", 3)[1:]], tmp_path / "log")
    parser = cli.make_parser()
    assert Counter(words[1] for words in commands.seen if words[0] == "stepdpo") == Counter(
        train=5 + 6, eval=6 + 2, loop=1, collect=1, **({} if full else {"merge": 1})
    )
    for program, command, *words in commands.seen:
        if program == "trl-sft":
            sft = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
            _, config, model, _, rest = sft.parse_args_and_config([command, *words], return_remaining_strings=True)
            assert (rest, config.learning_rate, model.use_peft) == ([], 3e-5, not full)
        elif command == "train":
            (_, config, model, _, sdpo), *rest = parse_arguments(words)
            assert rest == [[], []]
            assert (model.use_peft, model.dtype) == (not full, "float32" if full else "bfloat16")
            assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8
            assert sdpo.sdpo == ("staged" in " ".join(words))
        elif command == "loop":
            place = words.index("--")
            _, options = stage_options(words[:place])
            _check_data(_make_data_parser(), options)
            _check_training(words[place + 1 :])
        else:
            parser.parse_args([command, *words])


def stage_options(words):
    from stepdpo_trl.cli.loop import make_parser
    from stepdpo_trl.cli.parsing import join_vllm_args

    return make_parser().parse_known_args(join_vllm_args(words))


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "3"], "Did you mean --pairs?"),
        (["--pairs", "0"], "'0' is not a whole number of at least 1"),
        (["--rates", "1e-5", "x"], "'x' is not a number above 0"),
        (["--betas", "-1"], "'-1' is not a number above 0"),
        (["--methods", "step"], "invalid choice: 'step'"),
        (["--methods", "sft", "loop"], "loop continues from step-dpo"),
        (["--served-model", "q"], "--served-model has no effect without --base-url"),
        (["--max-concurrent-requests", "9"], "no effect without --base-url"),
        (["--vllm-args", "--enforce-eager"], "--vllm-args needs --backend vllm"),
        (["--run", "no/such/run"], "--run 'no/such/run' is not a folder"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    from compare import parse_args

    with pytest.raises(SystemExit) as stopped:
        parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_arguments_become_settings(tmp_path):
    from compare import parse_args
    from plan import FULL_RATES, Settings

    assert parse_args([])[1] == Settings()
    options = ["--full", "--run", str(tmp_path), "--betas", "0.2", "--pairs", "600", "--base-url", "http://x/v1"]
    _, settings, connection = parse_args(options)
    assert settings == Settings(full=True, rates=FULL_RATES, runs=(str(tmp_path),), betas=(0.2,), pairs=600)
    assert connection.base_url == "http://x/v1"
    _, quick, _ = parse_args(["--quick", "--rates", "1e-3"])
    assert (quick.model, quick.rates, quick.full) == (str(MODEL_PATH), (1e-3,), False)


def test_changed_settings_and_misspelled_models_are_refused(tmp_path, monkeypatch, capsys):
    import compare

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--output-dir", str(tmp_path / "out"), *options])
        return compare.main(), capsys.readouterr().err

    status, error = run("--model", str(tmp_path / "no-model"))
    assert (status, "no-model" in error) == (1, True)
    status, error = run("--quick", "--train", str(tmp_path / "none.jsonl"))
    assert (status, "none.jsonl" in error) == (1, True)  # the settings are stored now
    status, error = run("--quick", "--train", str(tmp_path / "none.jsonl"), "--pairs", "3")
    assert status == 1
    assert "pairs: 4 in this run, 3 now" in error


# ------------------------------------------------------------------------------------------------ real commands


def test_evaluation_of_a_real_model_is_read(tmp_path):
    from plan import Connection, Settings, backend_options, eval_options, quick_settings
    from scores import accuracy_of, read_outcomes, read_records

    settings = quick_settings(Settings())
    words = [*eval_options(settings, 0.0), *backend_options(settings, Connection()), "--max-new-tokens", "40"]
    command = ["eval", "--problems", "arithmetic", "--limit", "12", "--model", settings.model]
    assert cli.main([*command, "--output-dir", str(tmp_path), *words]) == 0
    counts = json.loads((tmp_path / "results.json").read_text())["results"][0]["solutions"]
    found, records = read_outcomes(tmp_path), read_records(tmp_path)
    assert sum(found.solved) == counts["right"] == round(12 * accuracy_of(tmp_path))
    assert found.unreadable == counts["unreadable"]
    assert 0 < found.cut <= 12  # at 40 tokens
    assert 10 < found.tokens <= 40
    assert [record["outcome"] == "right" for record in records] == [bool(solved) for solved in found.solved]


PROBLEM = "What is 7 + 12 - 5?"
STEPS = " 7 + 12 = 19, leaving 19 - 5", " 7 + 12 = 18, leaving 18 - 5"


def test_gamma_orders_the_stages(tmp_path):
    """The pair whose preferred step is the right one is easier for the model than the same pair reversed."""
    from method_data import write_staged

    start = "Let's think step by step.\nStep 1:"
    right = {"prompt": PROBLEM, "initial_reason_steps": start, "chosen": STEPS[0], "rejected": STEPS[1]}
    right |= {"chosen_ends_solution": False, "rejected_ends_solution": False, "problem_id": "A"}
    reversed_ = {**right, "chosen": STEPS[1], "rejected": STEPS[0], "problem_id": "B"}
    write_lines(tmp_path / "step.jsonl", [reversed_, right])
    write_staged(tmp_path / "step.jsonl", tmp_path / "staged.jsonl", str(MODEL_PATH), "float32")
    rows = [json.loads(line) for line in (tmp_path / "staged.jsonl").open()]
    assert rows == [{**right, "stage": 1}, {**reversed_, "stage": 2}]


def test_page_of_changes(tmp_path):
    from changes import find_changes, write_changes
    from plan import Settings, quick_settings

    texts = [f"Let's think step by step.\nStep 1:{step}" for step in STEPS]
    record = {"problem": PROBLEM, "gold": "14", "answer": "14"}
    right, wrong = ({**record, "outcome": o, "text": text} for o, text in zip(("right", "wrong"), texts, strict=True))
    rows = find_changes([wrong, right], [right, wrong], "{{ problem }}")
    write_changes(rows, str(MODEL_PATH), quick_settings(Settings()), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<section") == 2
    assert "1: wrong before, right after training" in page
    assert "2: right before, wrong after training" in page
    first, second = page.split("<section")[1:]
    # The right step comes first: after training in the first case, before training in the second
    assert first.index("step after training") < first.index("step before training")
    assert second.index("step before training") < second.index("step after training")
    assert "ratio +0.0" in page or "ratio 0.0" in page  # both models are the same


@pytest.mark.long
def test_quick_comparison(tmp_path):
    """All methods, with real commands."""
    import subprocess

    command = [sys.executable, str(FOLDER / "compare.py"), "--quick", "--seeds", "1", "--output-dir", str(tmp_path)]
    from plan import LOOP, METHODS, TITLES

    done = subprocess.run([*command, "--methods", *METHODS, LOOP], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tables = (tmp_path / "report" / "tables.md").read_text()
    for title in TITLES.values():
        assert f"| {title} |" in tables
    page = (tmp_path / "report" / "changes.html").read_text()
    assert "after training" in page
    again = subprocess.run([*command, "--methods", *METHODS, LOOP], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "output in" not in again.stdout  # no command ran again
    assert (tmp_path / "report" / "tables.md").read_text() == tables
