"""The throughput benchmark: its counts, its report and its argument checks."""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from stepdpo_trl.quickstart import MODEL_PATH, PAIRS_PATH

from ..distributed.launcher import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark_inputs
    import benchmark_measure
    import benchmark_throughput

    return argparse.Namespace(inputs=benchmark_inputs, measure=benchmark_measure, script=benchmark_throughput)


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    Qwen2Config(vocab_size=100, num_key_value_heads=1, **SIZES).to_json_file(path)
    return str(path)


def test_unique_tokens_by_hand(examples):
    first = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}
    second = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 7], "rejected_ids": [6]}
    other = {"prompt_ids": [9], "chosen_ids": [1, 2, 3], "rejected_ids": [1]}
    assert examples.measure.count_unique([first]) == 5
    assert examples.measure.count_unique([first, second]) == 5 + 2  # 7 and 6
    assert examples.measure.count_unique([first, second, other]) == 5 + 2 + 4


@pytest.mark.parametrize(
    ("lengths", "prefix", "step"),
    [("math-step-dpo", 250, 55), ("long", 2000, 55), ("equal", 300, 60), ("ultrafeedback", 170, 300)],
)
def test_lengths(examples, lengths, prefix, step):
    pairs = examples.inputs.write_pairs(lengths, 400, 2000, seed=0)

    def words(*columns):
        return statistics.median(sum(len((row[column]).split()) for column in columns) for row in pairs)

    assert ("initial_reason_steps" in pairs.column_names) == (lengths != "ultrafeedback")
    prefix_columns = [name for name in ("prompt", "initial_reason_steps") if name in pairs.column_names]
    assert words(*prefix_columns) == pytest.approx(prefix, rel=0.1)
    assert words("chosen") == pytest.approx(step, rel=0.1)
    assert words("rejected") == pytest.approx(step, rel=0.1)


def test_four_pairs_of_a_problem_extend_each_other(examples):
    pairs = list(examples.inputs.write_pairs("four-per-problem", 8, 2000, seed=0))
    assert len({pair["prompt"] for pair in pairs}) == 2
    for pair, following in itertools.pairwise(pairs[:4]):
        assert following["initial_reason_steps"].startswith(pair["initial_reason_steps"] + " w")


@pytest.mark.parametrize("lora", [False, True])
def test_positions_and_equality(examples, tiny_config, tmp_path, lora):
    """Compare the positions counted in the model with those counted in the batches."""
    args = argparse.Namespace(batch_size=2, dtype="float32", output_dir=str(tmp_path), peft=lora, seed=0, steps=2)
    base = examples.inputs.load_model(None, tiny_config, torch.float32, "cpu")
    pairs = examples.inputs.write_pairs("math-step-dpo", 8, 100, seed=0)
    tokenizer = examples.inputs.load_tokenizer(None, 100)
    sides = examples.script.make_sides(base, tokenizer, pairs, {"shared_prefix": "on"}, "same", args)
    tokens = sides[1].trainer.train_dataset
    row = pairs[0]
    assert len(tokens[0]["prompt_ids"]) == len((row["prompt"] + row["initial_reason_steps"]).split())
    assert len(tokens[0]["chosen_ids"]) == len(row["chosen"].split())

    differences = examples.script.check_first_step(sides, tokens.select(range(2)), "float32")
    assert differences.keys() == {"loss", "logps/chosen", "logps/rejected", "grad_norm"}
    assert max(differences.values()) < 1e-4

    stock, own = (side.measure(tokens) for side in sides)
    trained = [side.recorder.batches[1:3] for side in sides]
    assert trained[0] == trained[1]  # the same pairs in the same order
    batches = [[side.recorder.collator(batch) for batch in both] for side, both in zip(sides, trained, strict=True)]
    assert stock.positions == sum(batch["input_ids"].numel() for batch in batches[0])
    assert own.positions == sum(batch["prefix_tree"].tokens for batch in batches[1])
    assert own.positions == own.unique_tokens == stock.unique_tokens
    weights = [dict(side.trainer.model.named_parameters()) for side in sides]
    frozen = [name for name, weight in weights[0].items() if not weight.requires_grad]
    assert bool(frozen) == lora
    assert all(weights[0][name] is weights[1][name] for name in frozen)


def test_pairs_of_a_file_and_a_model_folder(examples, tmp_path):
    """Both trainers get the tokens of the model's own tokenizer for real pairs, and precompute the reference."""
    base = examples.inputs.load_model(str(MODEL_PATH), "small", torch.float32, "cpu")
    tokenizer = examples.inputs.load_tokenizer(str(MODEL_PATH), base.config.vocab_size)
    pairs = examples.inputs.load_pairs(str(PAIRS_PATH), 4, seed=0)
    stored = [json.loads(line) for line in PAIRS_PATH.read_text().splitlines()]
    assert all(pair in stored for pair in pairs)
    args = argparse.Namespace(batch_size=2, dtype="float32", output_dir=str(tmp_path), peft=True, seed=0, steps=2)
    sides = examples.script.make_sides(base, tokenizer, pairs, {"shared_prefix": "on"}, "tuned", args)
    tokens = sides[1].trainer.train_dataset
    for pair, row in zip(pairs, tokens, strict=True):
        chat = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row["prompt_ids"]) == prompt + pair["initial_reason_steps"]
        assert tokenizer.decode(row["rejected_ids"]) == pair["rejected"]
    differences = examples.script.check_first_step(sides, tokens.select(range(2)), "float32")
    assert max(differences.values()) < 1e-3
    with pytest.raises(SystemExit, match=f"has only {len(stored)} pairs"):
        examples.inputs.load_pairs(str(PAIRS_PATH), len(stored) + 1, seed=0)


def test_difference_between_sides_raises(examples):
    def side(grad_norm):
        logged = {**dict.fromkeys(examples.script.CHECKED, 0.7), "grad_norm": grad_norm}
        return argparse.Namespace(first_step=lambda pairs: logged)

    check = examples.script.check_first_step
    assert check([side(0.7), side(0.7014)], None, "bfloat16")["grad_norm"] == pytest.approx(0.002)
    for other in (0.7014, float("nan")):
        with pytest.raises(SystemExit, match="do not compute the same loss"):
            check([side(0.7), side(other)], None, "float32")


def test_side_out_of_memory_is_reported(examples, capsys):
    turn = examples.measure.Turn(2.0, 30, 20, 1.5, 0.01, None, None)
    summary = examples.script.summarize([[turn, None], [turn, turn]])
    assert summary["medians"]["StepDPOTrainer"]["pairs_per_second"] == 2.0
    assert summary["medians"]["DPOTrainer"]["pairs_per_second"] is None
    assert summary["ratios"]["pairs_per_second"] is None
    examples.script.print_row(summary)
    printed = capsys.readouterr().out
    assert "out of memory            2.00" in printed
    assert "utilization" not in printed


def test_out_of_memory_is_caught(examples):
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: torch.nn.Embedding(2, 2)
    trainer = argparse.Namespace(model=model, data_collator=None, train_dataset=None)
    trainer.add_callback = trainer.remove_callback = lambda callback: None

    def train():
        raise torch.cuda.OutOfMemoryError("out of memory")

    trainer.train = train
    side = examples.measure.Side(trainer, steps=1, linear=0)
    assert side.first_step(None) is None
    assert side.measure(None) is None


def test_command_line(tiny_config, tmp_path):
    options = ["--config", tiny_config, "--lengths", "four-per-problem", "--batch-size", 4, "--rounds", 3]
    options += ["--steps", 1, "--profile", "--json", tmp_path / "figures.json"]
    done = run_script(EXAMPLES / "benchmark_throughput.py", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "favor the trainer with fewer" in done.stdout
    assert "pairs per second" in done.stdout
    assert "making batches" in done.stdout
    assert "attention" in done.stdout

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert "--lengths four-per-problem" in figures["command"]
    (row,) = figures["rows"]
    assert (row["lengths"], row["settings"], row["pairs"]) == ("four-per-problem", "same", 3 * (1 + 2) * 4)
    assert max(row["first_step_differences"].values()) < 1e-4
    for name, turns in row["turns"].items():
        assert len(turns) == 3
        for turn in turns:
            assert turn["positions_per_unique"] == turn["positions"] / turn["unique_tokens"]
        speeds = [turn["pairs_per_second"] for turn in turns]
        assert row["medians"][name]["pairs_per_second"] == statistics.median(speeds)
    # The four pairs of a problem are in one batch and share its prefix
    assert row["medians"]["StepDPOTrainer"]["positions_per_unique"] == 1
    assert row["medians"]["StepDPOTrainer"]["unique_tokens"] < row["medians"]["DPOTrainer"]["unique_tokens"]
    ratio = row["ratios"]["pairs_per_second"]
    stock, own = (row["medians"][name]["pairs_per_second"] for name in ("DPOTrainer", "StepDPOTrainer"))
    assert ratio["of_medians"] == own / stock
    assert ratio["least"] <= ratio["greatest"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "equal"], "unrecognized arguments: --length"),
        (["--lengths", "equals"], "invalid choice: 'equals'"),
        (["--settings", "some"], "invalid choice: 'some'"),
        (["--rounds", "0"], "'0' is not a whole number of at least 1"),
        (["--dataset", "pairs.jsonl"], "needs a tokenizer"),
        (["--dataset", "pairs.jsonl", "--lengths", "long"], "Remove one of them"),
        (["--dataset", "no/pairs.jsonl", "--model", "gpt2"], "which does not exist"),
        (["--all", "--settings", "same"], "--all selects the rows itself"),
        (["--config", "qwen"], "neither a file nor one of small, qwen2.5-7b"),
        (["--model", "gpt2", "--config", "qwen2.5-7b"], "not allowed with argument --model"),
        (["--json", "no/such/file.json"], "does not exist"),
    ],
)
def test_wrong_arguments(examples, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["benchmark_throughput.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        examples.script.parse_args()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture
def vision_script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark_vision

    monkeypatch.setattr(benchmark_vision, "WIDTH", 4)
    monkeypatch.setattr(benchmark_vision, "HEIGHTS", (2, 5))
    config = benchmark_vision.Qwen2_5_VLConfig

    def smaller(text_config, vision_config, **options):
        vision = {**vision_config, "depth": 1, "fullatt_block_indexes": [0]}
        return config(text_config={**text_config, "num_hidden_layers": 1}, vision_config=vision, **options)

    monkeypatch.setattr(benchmark_vision, "Qwen2_5_VLConfig", smaller)
    return benchmark_vision


def test_pairs_with_images(vision_script):
    pairs = vision_script.draw_pairs("varied", 200, seed=0)
    for names, median in ((("prompt", "initial_reason_steps"), 150), (("chosen",), 60), (("rejected",), 60)):
        words = [sum(len(pair[name].split()) for name in names) - 3 * ("prompt" in names) for pair in pairs]
        assert statistics.median(words) == pytest.approx(median, rel=0.1)
    first, second, *_, other = vision_script.draw_pairs("four-per-problem", 5, seed=0)
    assert (first["images"], first["prompt"]) == (second["images"], second["prompt"])
    assert first["initial_reason_steps"] != second["initial_reason_steps"]
    assert first["prompt"] != other["prompt"]
    equal = vision_script.draw_pairs("equal", 3, seed=0)
    assert {pair["images"][0].size for pair in equal} == {(4 * 28, 3 * 28)}


def test_unique_tokens_of_images(vision_script, examples):
    first, second, *_ = vision_script.draw_pairs("four-per-problem", 4, seed=0)
    other = {**first, "images": vision_script.draw_pairs("equal", 1, seed=1)[0]["images"]}
    named = [vision_script.token_names(vision_script.as_prompt(pair)) for pair in (first, second, other)]

    def own(pair):
        return sum(len(pair[name].split()) for name in ("initial_reason_steps", "chosen", "rejected"))

    image = first["images"][0]
    problem = len(first["prompt"].split()) - 1 + image.width * image.height // 28**2
    assert examples.measure.count_unique(named[:2]) == problem + own(first) + own(second)
    # The rows with another image share only the token before it
    words = len(first["prompt"].split()) - 1 + other["images"][0].width * other["images"][0].height // 28**2
    assert examples.measure.count_unique([named[0], named[2]]) == problem + own(first) + words + own(first) - 1


def check_row(script, lengths, settings, lora, folder):
    options = {"batch_size": 4, "rounds": 1, "steps": 1, "seed": 0, "peft": lora, "output_dir": str(folder)}
    row = script.run_row(lengths, settings, argparse.Namespace(**options))
    assert max(row["first_step_differences"].values()) < 1e-4
    stock, own = (row[name] for name in script.NAMES)
    assert own["positions_per_unique"] == 1.0
    assert own["tower_runs_per_image"] == 1.0
    assert stock["positions_per_unique"] > 1.5
    assert stock["tower_runs_per_image"] >= 2.0
    assert row["speedup"] > 1
    return stock["peak_memory_gib"], own["peak_memory_gib"]


def test_row_with_images(vision_script, tmp_path, monkeypatch):
    monkeypatch.setattr(vision_script.Side, "peak_memory", lambda side, rows: 0.0)  # the profiler is slow
    check_row(vision_script, "varied", "recommended", True, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("lengths", "settings"), [("varied", "recommended"), ("four-per-problem", "same")])
def test_rows_with_images_and_memory(vision_script, lengths, settings, tmp_path):
    stock, own = check_row(vision_script, lengths, settings, False, tmp_path)
    assert own > 0
    if settings == "same":
        assert own < stock
