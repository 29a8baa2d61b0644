"""The pipeline from the command line with the quickstart's model, whose correct steps can be computed."""

import json
import subprocess
import sys

import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl import StepDPOConfig, StepDPOTrainer
from stepdpo_trl.cli.main import main
from stepdpo_trl.pipeline.collect import wrong_solutions
from stepdpo_trl.pipeline.localize import read_verdicts
from stepdpo_trl.quickstart import MODEL_PATH, ArithmeticProblem, first_lost_step, make_problems
from stepdpo_trl.runs.run_directory import RunDirectory


def stepdpo(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of all pipeline stages, with two more judges."""
    path = tmp_path_factory.mktemp("pipeline")
    with (path / "problems.jsonl").open("w") as file:
        for problem in make_problems(120, "pairs"):
            file.write(json.dumps({"problem": problem.text, "answer": problem.answer}) + "\n")
    (path / "test.jsonl").write_text((path / "problems.jsonl").read_text().split("\n")[0])
    sampling = ("--prompt", "plain", "--temperature", 1, "--top-p", 1, "--max-new-tokens", 160, "--num-samples", 4)
    model = ("--model", MODEL_PATH, "--batch-size", 64)
    where = ("--problems", path / "problems.jsonl", "--output-dir", path / "run")
    build = (
        "--judge",
        "arithmetic,rollout",
        "--check",
        "arithmetic",
        "--output-file",
        path / "pairs.jsonl",
        "--exclude",
        path / "test.jsonl",
    )
    assert stepdpo("data", *model, *where, *sampling, *build) == 0
    for judge in ("arithmetic", "rollout"):
        assert stepdpo("localize", path / "run", "--judge", judge, "--batch-size", 64) == 0
    return path


@pytest.mark.slow
def test_localizers_against_the_truth(run):
    """Of the verdicts, 99% (arithmetic) and 95% (rollout) name the first step that loses the right answer."""
    with RunDirectory(run / "run") as directory:
        wrong = wrong_solutions(directory)
        for judge, least in (("arithmetic", 0.99), ("rollout", 0.95)):
            verdicts = read_verdicts(directory, judge)[1]
            pairs = [
                (first_lost_step(ArithmeticProblem.parse(s.problem.problem), s.text), verdicts[s.key].step)
                for s in wrong
            ]
            verdict_pairs = [(truth, step) for truth, step in pairs if step]
            assert len(verdict_pairs) > 0.8 * len(wrong) > 100
            assert sum(truth == step for truth, step in verdict_pairs) >= least * len(verdict_pairs), judge


@pytest.mark.slow
def test_pairs_against_the_truth(run):
    """99% of preferred steps are right, 99% of rejected steps are wrong, and test problems are excluded."""
    pairs = load_dataset("json", data_files=str(run / "pairs.jsonl"), split="train")
    assert len(pairs) > 50
    right = wrong = 0
    for pair in pairs:
        step, problem = pair["step_index"], ArithmeticProblem.parse(pair["prompt"])
        chosen = first_lost_step(problem, pair["initial_reason_steps"] + pair["chosen"])
        rejected = first_lost_step(problem, pair["initial_reason_steps"] + pair["rejected"])
        right += chosen is None
        wrong += rejected == step
    assert right >= 0.99 * len(pairs)
    assert wrong >= 0.99 * len(pairs)
    assert json.loads((run / "test.jsonl").read_text())["problem"] not in pairs["prompt"]
    identities = zip(*(pairs[c] for c in ("prompt", "initial_reason_steps", "chosen", "rejected")), strict=True)
    assert len(set(identities)) == len(pairs)


@pytest.mark.slow
def test_pairs_train_without_further_options(run, tmp_path):
    """The trainer sees the generated tokens, before the step and of the step itself."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    pairs = load_dataset("json", data_files=str(run / "pairs.jsonl"), split="train").select(range(16))
    trainer = StepDPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL_PATH),
        args=StepDPOConfig(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, bf16=False),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        messages = [{"role": "user", "content": pair["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text += pair["initial_reason_steps"]
        assert row["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(row["chosen_ids"]).removesuffix(tokenizer.eos_token) == pair["chosen"]
        ends = (row["chosen_ids"][-1] == tokenizer.eos_token_id, row["rejected_ids"][-1] == tokenizer.eos_token_id)
        assert ends == (pair["chosen_ends_solution"], pair["rejected_ends_solution"])
    trainer.train()


@pytest.mark.slow
def test_log_probabilities(run, tmp_path):
    """Compared with plain torch, one sequence at a time."""
    import torch

    to = tmp_path / "pairs.parquet"
    assert stepdpo("build", run / "run", "--output-file", to, "--max-pairs-per-problem", 1, "--logps", MODEL_PATH) == 0
    pairs = load_dataset("parquet", data_files=str(to), split="train")
    assert len(set(pairs["prompt"])) == len(pairs)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)
    for pair in pairs.select(range(5)):
        messages = [{"role": "user", "content": pair["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prefix = tokenizer(text + pair["initial_reason_steps"], add_special_tokens=False)["input_ids"]
        for name in ("chosen", "rejected"):
            text = pair[name] + tokenizer.eos_token * pair[f"{name}_ends_solution"]
            step = tokenizer(text, add_special_tokens=False)["input_ids"]
            logps = model(torch.tensor([prefix + step])).logits[0].log_softmax(-1)
            expected = sum(logps[len(prefix) + i - 1, token].item() for i, token in enumerate(step))
            assert pair[f"{name}_logps"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_report_and_card(run, capsys):
    assert stepdpo("report", run / "run") == 0
    printed = capsys.readouterr().out
    for words in ("solutions, wrong", "localize arithmetic,rollout", "corrected", "total"):
        assert words in printed
    report = (run / "run" / "report.html").read_text()
    for words in ("Position of the first wrong step", "Agreement of judges", "Cost", "arithmetic and rollout"):
        assert words in report
    card = (run / "pairs.card.md").read_text()
    pairs = len((run / "pairs.jsonl").read_text().splitlines())
    assert f"| build | pairs | {pairs} |" in card
    assert '"temperature": 1.0' in card
    # The card counts each solution once, although two judges saw it
    assert card.count("solutions, right") == 1


COLLECT = ("collect", "--model", "m", "--problems", "p.jsonl", "--output-dir", "run")
DATA = ("data", *COLLECT[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--model", "m", "--problems", "none.jsonl", "--output-dir", "run"], "no file none.jsonl.\n"),
        (["collect", "--model", "m", "--problems", "pp.jsonl", "--output-dir", "run"], "Did you mean p.jsonl?"),
        ([*COLLECT, "--prompt", "qwen-boxed"], "Did you mean"),
        ([*COLLECT, "--prompt", "t.jinja"], "does not contain"),
        ([*COLLECT, "--prompt", "b.jinja"], "cannot be filled"),
        ([*COLLECT, "--temperature", "-1"], "negative"),
        ([*COLLECT, "--backend", "openai"], "with an address such as http://localhost:8000/v1"),
        (["collect", "--model", "./m", "--problems", "p.jsonl", "--output-dir", "run"], "cannot be loaded"),
        ([*DATA, "--output-file", "x.csv"], "--output-file 'x.csv'"),
        ([*DATA, "--output-file", "x.jsonl", "--judge", "gold"], "The judge 'gold' in 'gold' is not known"),
        ([*DATA, "--output-file", "x.jsonl", "--judge", "llm"], "--judge-model"),
        ([*DATA, "--output-file", "x.jsonl", "--judge", "arithmetic,human", "--engine", "ray"], "needs a person"),
        (["localize", "nowhere", "--judge", "human", "--engine", "ray"], "needs a person"),
        (["rectify", "nowhere", "--check", "human", "--engine", "ray"], "contains a judge of wrong solutions only"),
        (["localize", "nowhere"], "is not the folder of a run"),
        (["build", "nowhere", "--output-file", "x.jsonl"], "is not the folder of a run"),
        (["rectify", "nowhere", "--check", "rollout"], "contains a judge of wrong solutions only"),
        (["rectify", "nowhere", "--judge-base-url", "http://h/v1"], "--judge-model"),
        (["import", "prm800k", "none.jsonl", "--output-file", "x.jsonl"], "none.jsonl"),
    ],
)  # fmt: skip
def test_errors_are_raised_before_generation(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}')
    (tmp_path / "t.jinja").write_text("Solve this.")
    (tmp_path / "b.jinja").write_text("{{ problem }} {{ question }}")
    assert stepdpo(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["colect"], "colect is not a command. Did you mean collect?"),
        (["build", "run", "--output-file", "x.jsonl", "--license", "Apache 2.0"], "'Apache 2.0' is not a license"),
        (["collect", "--problem", "p.jsonl"], "--problem"),
        (["collect", "--model", "m", "--problems", "p", "--output-dir", "r", "--num-samples", "0"], "at least 1"),
        (["collect", "--model", "m", "--problems", "p", "--output-dir", "r", "--shard", "4/4"], "I/N"),
        (["import", "prm900k", "f", "--output-file", "x.jsonl"], "prm800k"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        stepdpo(*arguments)
    assert message in capsys.readouterr().err


def test_import(tmp_path, capsys):
    case = {"id": "gsm8k-0", "generator": "g", "problem": "p", "steps": ["a", "b"], "final_answer_correct": False}
    (tmp_path / "gsm8k.json").write_text(json.dumps([{**case, "label": 1}, {**case, "id": "gsm8k-1", "label": -1}]))
    assert stepdpo("import", "processbench", tmp_path / "gsm8k.json", "--output-file", tmp_path / "cases.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [row["first_wrong"] for row in rows] == [2, None]
    assert "2 rows in" in capsys.readouterr().out


def test_the_command_starts_without_torch():
    code = (
        "import sys; import stepdpo_trl.cli.main; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
