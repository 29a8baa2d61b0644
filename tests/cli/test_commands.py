"""Commands without a large model: mistakes found before sampling, dry runs, logging, merge and env."""

import json
import logging
import re
import warnings

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl.cli import data as data_module
from stepdpo_trl.cli import eval as eval_module
from stepdpo_trl.cli.console import silence_upstream
from stepdpo_trl.cli.main import main
from stepdpo_trl.cli.options import model_spec, share_options
from stepdpo_trl.cli.problems import load_training_problems
from stepdpo_trl.evaluation.problems import load_problems
from stepdpo_trl.generation import GenerationError
from stepdpo_trl.quickstart import MODEL_PATH, make_problems
from stepdpo_trl.runs.run_directory import RunError

PROBLEMS = 8


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    with path.open("w") as file:
        for problem in make_problems(PROBLEMS, "pairs"):
            file.write(json.dumps({"problem": problem.text, "answer": problem.answer}) + "\n")
    return path


def test_messages_with_control_characters(tmp_path, capfd, monkeypatch):
    """Neither the terminal nor the log file receives what a server or a file puts into a message."""

    def fail(args):
        logging.getLogger("stepdpo_trl").warning("from a server: \x1b[31m\x9b")
        raise GenerationError("from a server: \x1b]0;title\x07")

    monkeypatch.setattr("stepdpo_trl.cli.env._env", fail)
    assert main(["env", "--log-file", str(tmp_path / "log")]) == 2
    printed = capfd.readouterr().err + (tmp_path / "log").read_text()
    assert printed.count("from a server: \\x1b[31m\\x9b") == printed.count("\\x1b]0;title\\x07") == 2
    assert not set("\x1b\x9b\x07") & set(printed)


@pytest.fixture
def no_models(monkeypatch):
    """Fail if a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("stepdpo_trl.pipeline.session.make_generator", load)


def data(problems, *options):
    where = ["--output-dir", str(problems.parent / "run"), "--output-file", str(problems.parent / "pairs.jsonl")]
    return ["data", "--model", str(MODEL_PATH), "--problems", str(problems), *where, *options]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corrections", "foo"], "--corrections 'foo' will not exist: with these options the command writes "),
        (["--corrections", "arithmetic", "--judge", "arithmetic,rollout"], "--corrections 'arithmetic' will not"),
        (["--temperature", "0", "--num-samples", "2"], "At --temperature 0 all 2 solutions of a problem are the same"),
        (["--temperature", "0"], "At --temperature 0 all 2 solutions of a problem are the same"),
        (["--problems", "gsm9k"], "--problems 'gsm9k' is neither a file nor a known dataset. Use one of gsm8k, "),
        (["--problems", "math-500"], "--problems math-500 is a test set"),
    ],
)
def test_mistakes_are_found_before_sampling(problems, no_models, capsys, options, message):
    assert main(data(problems, *options)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (problems.parent / "run").exists()


def test_corrections_that_exist_or_will_exist(problems, no_models, capsys):
    assert main(data(problems, "--corrections", "rollout", "--dry-run")) == 0
    (problems.parent / "run").mkdir()
    (problems.parent / "run" / "corrections.foo.jsonl").touch()
    assert main(data(problems, "--corrections", "foo", "--dry-run")) == 0


@pytest.mark.parametrize("command", ["collect", "data"])
def test_training_sets_by_name(problems, no_models, monkeypatch, capsys, command):
    """`data` and `collect` take the training split, which `eval` does not."""
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return [{"question": f"{number} + 1?", "answer": f"It is\n#### {number + 1}"} for number in range(5)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    argv = data(problems, "--problems", "gsm8k", "--limit", "3", "--dry-run")
    if command == "collect":
        place = argv.index("--output-file")
        argv = ["collect", *argv[1:place], *argv[place + 2 :]]
    assert main(argv) == 0
    assert re.search(r"^problems +3$", capsys.readouterr().out, re.M)
    assert asked == [("openai/gsm8k", "main", "train")]


def test_training_problems_are_not_those_of_the_evaluation():
    training = {problem.id for problem in load_training_problems("arithmetic", 200)}
    assert len(training) == 200
    assert not training & {problem.id for problem in load_problems("arithmetic", 200)}


def test_dataset_that_cannot_be_loaded(monkeypatch):
    def load_dataset(*name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RunError, match=r"'openai/gsm8k' cannot be loaded .*pass a file: --problems FILE\.jsonl"):
        load_training_problems("gsm8k")


def baseline(*options):
    parser = make_eval_parser()
    argv = ["eval", "--model", "m", "--problems", "arithmetic", "--output-dir", "o", "--baseline", "b", *options]
    args = parser.parse_args(argv)
    share_options(args, "baseline_")
    return model_spec(args, "baseline_", "--baseline")


def make_eval_parser():
    from stepdpo_trl.cli.main import make_parser

    return make_parser()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--backend vllm", {"backend": "vllm"}),
        ("--backend vllm --vllm-args=-tp=2", {"vllm_args": "-tp=2"}),
        ("--backend vllm --vllm-args -dp=2 --baseline-vllm-args --enforce-eager", {"vllm_args": "--enforce-eager"}),
        ("--backend vllm --vllm-args -tp=2 --baseline-backend transformers", {"vllm_args": None}),
        ("--backend vllm --baseline-backend transformers", {"backend": "transformers"}),
        ("--dtype bfloat16 --batch-size 4 --tokenizer t", {"dtype": "bfloat16", "batch_size": 4, "tokenizer": "t"}),
        ("--dtype bfloat16 --baseline-dtype float32", {"dtype": "float32"}),
        (
            "--base-url http://a/v1 --api-key-env K --max-concurrent-requests 3",
            {"backend": "openai", "base_url": "http://a/v1", "api_key_env": "K", "max_concurrent_requests": 3},
        ),
        ("--base-url http://a/v1 --baseline-backend vllm", {"backend": "vllm", "base_url": None}),
        (
            "--base-url http://a/v1 --api-key-env K --baseline-base-url http://b/v1",
            {"base_url": "http://b/v1", "api_key_env": "OPENAI_API_KEY"},
        ),
        ("--dtype bfloat16 --baseline-base-url http://b/v1", {"backend": "openai", "dtype": "auto"}),
        ("--revision r --adapter a", {"revision": None, "adapter": None}),
    ],
)
def test_options_of_the_baseline_default_to_those_of_the_model(options, expected):
    spec = baseline(*options.split())
    assert {name: getattr(spec, name) for name in expected} == expected


def test_new_options_reach_the_models_and_the_sampling(problems, monkeypatch):
    asked = []

    class Session:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def collect(self, folder, problems, name, model, prompt, sampling, *more):
            asked.append((model, sampling))
            return {"right": 0, "wrong": 1, "unreadable": 0}

    monkeypatch.setattr("stepdpo_trl.pipeline.session.Session", Session)
    argv = ["collect", "--problems", str(problems), "--output-dir", "run", "--top-k", "20"]
    assert main([*argv, "--model", "m", "--revision", "v1"]) == 0
    assert main([*argv, "--model", "m", "--base-url", "http://a/v1", "--max-concurrent-requests", "5"]) == 0
    assert (asked[0][0].revision, asked[0][1].top_k) == ("v1", 20)
    assert asked[1][0].max_concurrent_requests == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-concurrent-requests", "4"], "--max-concurrent-requests has no effect without a server (--base-url)"),
        (["--base-url", "http://a/v1", "--batch-size", "4"], "limit the requests, use --max-concurrent-requests."),
        (["--base-url", "http://a/v1", "--revision", "v1"], "--revision has no effect at a server"),
        (["--judge-max-concurrent-requests", "4"], "without a server (--judge-base-url)"),
    ],
)
def test_options_of_servers(problems, capsys, options, message):
    assert main(data(problems, "--judge-model", "j", *options)) == 2
    assert message in capsys.readouterr().err


def test_dry_run_of_data(problems, no_models, capsys):
    assert main(data(problems, "--num-samples", "4", "--max-attempts", "10", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^problems +{PROBLEMS}$", out, re.M)
    assert re.search(rf"^collect +{4 * PROBLEMS} +{4 * PROBLEMS * 400:,}$", out, re.M)
    wrong = round(0.3 * 4 * PROBLEMS)
    assert re.search(rf"^localize +{wrong * 4 * 8} +{wrong * 4 * 8 * 200:,}$", out, re.M)  # 1 + log2(6 steps) prefixes
    assert re.search(rf"^rectify +{wrong * 10} +{wrong * 10 * 200:,}$", out, re.M)
    assert "Wrong solutions: 30% assumed." in out
    assert max(map(len, out.splitlines())) <= 80
    assert not (problems.parent / "run").exists()


def test_dry_run_of_a_run(problems, capsys):
    """Measured values replace assumptions, and existing records are not counted again."""
    run = problems.parent / "run"
    sampling = ["--prompt", "plain", "--temperature", "1", "--max-new-tokens", "96", "--num-samples", "3"]
    where = ["--model", str(MODEL_PATH), "--problems", str(problems), "--output-dir", str(run)]
    assert main(["collect", *where, *sampling]) == 0
    wrong = sum('"outcome": "wrong"' in line for line in (run / "solutions.jsonl").read_text().splitlines())
    capsys.readouterr()
    assert main(["collect", *where, *sampling, "--dry-run"]) == 0
    assert re.search(r"^collect +0 +0$", capsys.readouterr().out, re.M)
    assert main(["localize", str(run), "--judge", "llm", "--judge-model", "j", "--votes", "3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^localize +{3 * wrong} +{3 * wrong * 400:,}$", out, re.M)
    assert "measured in this run" in out
    assert main(["localize", str(run), "--judge", "arithmetic"]) == 0
    located = sum('"step": null' not in line for line in (run / "verdicts.arithmetic.jsonl").read_text().splitlines())
    capsys.readouterr()
    assert main(["localize", str(run), "--judge", "arithmetic", "--dry-run"]) == 0
    assert re.search(r"^localize +0 +0$", capsys.readouterr().out, re.M)
    assert main(["rectify", str(run), "--max-attempts", "7", "--dry-run"]) == 0
    assert re.search(rf"^rectify +{7 * located} ", capsys.readouterr().out, re.M)


def test_dry_run_of_a_run_that_grows(problems, capsys):
    """Only what is missing is counted."""
    run = problems.parent / "run"
    records = {
        "settings": [
            {
                "key": "collect",
                "problems": "p",
                "prompt": {"user": "{{ problem }}"},
                "sampling": {},
                "num_samples": 1,
                "seed": 0,
                "shard": [0, 1],
                "model": {"model": "m", "backend": "transformers"},
            },
            {"key": "localize rollout", "num_rollouts": 8},
        ],
        "solutions": [{"key": f"s{n}", "outcome": "wrong", "steps": 4} for n in range(3)],
        "verdicts.rollout": [{"key": f"s{n}", "step": 2, "judge": "rollout", "evidence": {}} for n in range(3)],
        # one correction, found with 4 samples; two; none in 20 samples
        "corrections.rollout": [
            {"key": f"s{n}", "step": 2, "found": found, "samples": samples, "dropped": 0}
            for n, (found, samples) in enumerate([([1], 4), ([1, 2], 2), ([], 20)])
        ],
    }
    run.mkdir()
    for name, rows in records.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def requests(command, *options):
        assert main([command, str(run), *options, "--dry-run"]) == 0
        return int(re.search(rf"^{command} +([\d,]+) ", capsys.readouterr().out, re.M)[1].replace(",", ""))

    assert requests("localize") == 0
    assert requests("localize", "--num-rollouts", "16") == 3 * 3 * 8  # 1 + log2(4 steps) prefixes
    assert requests("rectify") == 0
    assert requests("rectify", "--max-attempts", "50") == 30
    assert requests("rectify", "--num-corrections", "2") == 16
    assert requests("rectify", "--num-corrections", "2", "--max-attempts", "50") == 46 + 30
    assert requests("rectify", "--rectifier", "another") == 60


def test_dry_run_needs_a_run(tmp_path, capsys):
    assert main(["localize", str(tmp_path / "none"), "--judge", "arithmetic", "--dry-run"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_dry_run_of_eval(problems, no_models, capsys):
    where = ["--problems", str(problems), "--output-dir", str(problems.parent / "out")]
    models = ["--model", str(MODEL_PATH), "--baseline", "other"]
    assert main(["eval", *where, *models, "--num-samples", "4", "--temperature", "0.7", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(rf" {4 * PROBLEMS} +{4 * PROBLEMS * 400:,}$", out, re.M)) == 2
    assert not (problems.parent / "out").exists()
    tasks = ["eval", "--tasks", "gsm8k", "--model", "m", "--output-dir", str(problems.parent / "out"), "--dry-run"]
    assert main(tasks) == 2
    assert "--dry-run cannot count the problems of --tasks" in capsys.readouterr().err


@pytest.mark.parametrize("module", [data_module, eval_module])
def test_top_k_is_passed_by_name(module):
    """The four numbers of `Sampling` could be mixed up if they were passed by position."""
    from dataclasses import fields

    from stepdpo_trl.generation import Sampling

    assert module.Sampling is Sampling
    assert [field.name for field in fields(Sampling)] == ["temperature", "top_p", "max_new_tokens", "top_k"]


def test_log_level_and_log_file(problems, tmp_path, monkeypatch, capsys):
    def collect(args):
        log = logging.getLogger("stepdpo_trl.pipeline")
        log.info("an info")
        log.warning("a warning")
        raise RunError("it failed.")

    monkeypatch.setattr(data_module, "_collect", collect)
    argv = ["collect", "--model", "m", "--problems", str(problems), "--output-dir", "run"]
    for level, printed in (("warning", ["a warning"]), ("info", ["an info", "a warning"]), ("error", [])):
        file = tmp_path / f"{level}.log"
        assert main([*argv, "--log-level", level, "--log-file", str(file)]) == 2
        assert capsys.readouterr().err.splitlines() == [*printed, "stepdpo collect: error: it failed."]
        logged = file.read_text().splitlines()
        assert [re.sub(r"^[\d-]+ [\d:,]+ ", "", line) for line in logged] == [
            *(f"{'INFO' if 'info' in text else 'WARNING'} stepdpo_trl.pipeline: {text}" for text in printed),
            "ERROR stepdpo_trl: stepdpo collect: error: it failed.",
        ]
    assert logging.getLogger("stepdpo_trl").handlers == []


def test_messages_of_transformers_become_one_line(tmp_path, capsys, monkeypatch):
    def merge(*args):
        raise GenerationError("The model cannot be loaded: no connection.\nCheck your internet connection.")

    monkeypatch.setattr("stepdpo_trl.generation.merging.merge_adapter", merge)
    assert main(["merge", "adapter", "--output-dir", str(tmp_path / "merged")]) == 2
    assert capsys.readouterr().err == (
        "stepdpo merge: error: The model cannot be loaded: no connection. Check your internet connection.\n"
    )


def test_log_file_that_cannot_be_written(problems, capsys):
    argv = data(problems, "--log-file", str(problems.parent / "none" / "x.log"))
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("stepdpo data: error: ")
    assert "No such file or directory" in err


def test_every_command_has_the_logging_options():
    from stepdpo_trl.cli.loop import make_parser as make_loop_parser
    from stepdpo_trl.cli.main import make_parser
    from stepdpo_trl.cli.train import make_parser as make_train_parser

    parsers = {**make_parser().commands.choices, "loop": make_loop_parser(), "train": make_train_parser()}
    for parser in parsers.values():
        names = {name.replace("_", "-") for name in parser._option_string_actions}
        assert {"--log-level", "--log-file"} <= names


@pytest.fixture
def adapter(chat_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted.eval()


def test_merge(adapter, chat_model, tmp_path, capsys):
    """The tokenizer comes from the base model, as the adapter has none."""
    folder, adapted = adapter
    merged = tmp_path / "deep" / "merged"
    assert main(["merge", str(folder), "--output-dir", str(merged)]) == 0
    assert f"Merged model: {merged}" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template
    ids = torch.tensor([tokenizer("What is 2 + 3?")["input_ids"]])
    logits = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
    assert main(["merge", str(folder), "--output-dir", str(merged)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_merge_without_an_adapter(chat_model, tmp_path, capsys):
    assert main(["merge", str(chat_model), "--output-dir", str(tmp_path / "merged")]) == 2
    assert "is not the folder of a PEFT adapter" in capsys.readouterr().err


def test_env(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines)
    names = "stepdpo_trl python torch trl transformers peft accelerate datasets deepspeed bitsandbytes vllm"
    assert set(names.split()) <= set(rows)
    assert rows["torch"] == torch.__version__
    assert "cpu" in rows.get("devices", "") or torch.cuda.is_available()
    assert len(lines) <= 24


def test_upstream_noise():
    """Only the two known messages are suppressed."""
    silence_upstream()
    kernel = logging.getLogger("bitsandbytes.backends.cpu.ops")
    records = [
        kernel.makeRecord(kernel.name, 30, "f", 1, text, (), None)
        for text in ("Failed to load CPU gemm_4bit_forward from kernels-community: x", "another")
    ]
    assert [bool(kernel.filter(record)) for record in records] == [False, True]
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        silence_upstream()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("`gradient_checkpointing_enable` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)
        warnings.warn("`other` is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == [
        "`gradient_checkpointing` is deprecated",
        "`other` is deprecated",
    ]
