"""Names of options and error messages."""

import subprocess
import sys

import pytest

from stepdpo_trl.cli.main import main
from stepdpo_trl.cli.parsing import RENAMED

DATA = ["data", "--model", "m", "--problems", "p.jsonl", "--output-dir", "run", "--output-file", "x.jsonl"]
EVAL = ["eval", "--model", "m", "--problems", "arithmetic", "--output-dir", "out"]
COMMANDS = ["collect", "localize", "rectify", "build", "data", "report", "import", "eval", "inspect", "merge", "env"]
TRAIN = ["train", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


@pytest.fixture
def fails(capsys, tmp_path, monkeypatch):
    """Run a command that must fail, and return its one line of error."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        try:
            status = main(list(argv))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert list(tmp_path.iterdir()) == []
        assert len(err.splitlines()) == 1, err
        return err.rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("argv", "old", "new"),
    [
        (["collect", "--model", "m", "--problems", "p.jsonl"], "--out", "--output-dir"),
        (["build", "run"], "--to", "--output-file"),
        (["import", "prm800k", "f"], "--to", "--output-file"),
        (["rectify", "run"], "--wanted", "--num-corrections"),
        (["rectify", "run"], "--most", "--max-attempts"),
        (["localize", "run"], "--k", "--num-rollouts"),
        (DATA, "--samples", "--num-samples"),
        (DATA, "--opening", "--response-prefix"),
        (DATA, "--per-problem", "--max-pairs-per-problem"),
        (DATA, "--per_problem", "--max-pairs-per-problem"),
        (DATA, "--api-key-variable", "--api-key-env"),
        (DATA, "--judge-api-key-variable", "--judge-api-key-env"),
        (DATA, "--rectifier-api-key-variable", "--rectifier-api-key-env"),
        (EVAL, "--samples", "--num-samples"),
        (EVAL, "--against", "--baseline"),
        (EVAL, "--against-backend", "--baseline-backend"),
        (EVAL, "--against-adapter", "--baseline-adapter"),
        (EVAL, "--against-api-key-variable", "--baseline-api-key-env"),
        (["loop", "--model", "m"], "--out", "--output-dir"),
        (["loop", "--model", "m", "--output-dir", "x"], "--samples", "--num-samples"),
    ],
)
def test_old_names_are_rejected_with_the_new_name(fails, argv, old, new):
    """The old name is reported even if it leaves a required option missing."""
    expected = f"stepdpo {argv[0]}: error: {old} was renamed to {new}."
    assert fails(*argv, old, "1") == fails(*argv, f"{old}=1") == expected


def test_every_old_name_is_tested():
    tested = test_old_names_are_rejected_with_the_new_name.pytestmark[0].args[1]
    assert {old.removeprefix("--") for _, old, _ in tested} >= set(RENAMED)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "pairs.jsonl", "--rwo", "1"], "--rwo is not a known argument. Did you mean --row?"),
        (["rectify", "run", "--rectifer=M"], "--rectifer is not a known argument. Did you mean --rectifier?"),
        ([*DATA, "--tensor-parallel-size", "2"], "--tensor-parallel-size is not a known argument."),
        ([*DATA, "--tensor_parallel_size=2"], "--tensor_parallel_size is not a known argument."),
        (
            ["report", "run", "another"],
            "'another' does not belong to an option. Remove it, or quote the value that it is a ",
        ),
        (["collect", "--problems", "p.jsonl", "--output-dir", "run"], "the following arguments are required: --model"),
        (["collect", "--num-samples", "0"], "argument --num-samples: '0' is not a whole number of at least 1"),
    ],
)
def test_only_close_options_are_suggested(fails, argv, message):
    err = fails(*argv)
    assert err.startswith(f"stepdpo {argv[0]}: error: {message}")
    assert ("Did you mean" in err) == ("Did you mean" in message)


@pytest.mark.parametrize("command", COMMANDS)
def test_resume(fails, command):
    assert fails(command, "--resume") == (
        f"stepdpo {command}: error: --resume does not exist: rerun the same command to resume."
    )


def test_resume_of_loop_and_train(fails):
    assert "rerun the same command to resume" in fails("loop", "--resume", "--model", "m")
    assert "pass --resume_from_checkpoint true to resume from the last checkpoint" in fails(*TRAIN, "--resume")


@pytest.mark.parametrize("option", ["--judge", "--check"])
def test_redirection_in_a_judge_expression(fails, option):
    """A shell takes `--judge arithmetic>rollout` for a redirection; the quoted form must not work either."""
    err = fails(*DATA, option, "arithmetic>llm")
    assert "Use a comma: 'arithmetic,llm'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "No model is given. Pass --model_name_or_path."),
        (["--learnin_rate", "1e-6"], "--learnin_rate is not a known argument. Did you mean --learning_rate?"),
        (["--learnin-rate=1e-6"], "--learnin-rate is not a known argument. Did you mean --learning-rate?"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is not a known argument. See `stepdpo train "),
        (["--model_name_or_path", "m"], "Pass the data either as --dataset_name, or as `datasets` in the file."),
        (["--model_name_or_path", "m", "--dataset_name", "d"], "No output folder is given. Pass --output_dir."),
        ([*TRAIN[1:], "--stage_fractions", "0.5", "0.5"], "--stage_fractions has no effect without stages."),
    ],
)
def test_training_options_are_checked_before_the_hardware(fails, monkeypatch, argv, message):
    """Without a GPU, DPOConfig raises an error about bf16, which must not hide a mistake in the options."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fails("train", *argv).startswith(f"stepdpo train: error: {message}")


def test_training_without_a_gpu(fails, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fails(*TRAIN, "--bf16", "true") == (
        "stepdpo train: error: There is no GPU. Pass --use_cpu true --bf16 false to train on the CPU."
    )


def test_dashes_and_underscores(tmp_path, monkeypatch, capsys):
    """Commands accept underscores in option names, and the training script accepts dashes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    argv = ["collect", "--model", "m", "--problems", "p.jsonl", "--output_dir", "run", "--num_samples=3", "--dry_run"]
    assert main(argv) == 0
    assert "solutions                          3" in capsys.readouterr().out
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    options = ["--model-name-or-path", "m", "--dataset-name", "d", "--output-dir=o", "--use-cpu", "--bf16", "false"]
    assert main(["train", *options, "--num-processes", "1", "--accelerate-config", "single_gpu"]) == 0
    assert launched[0].num_processes == 1
    assert launched[0].config_file.endswith("single_gpu.yaml")
    (tmp_path / "config.yaml").write_text("learning-rate: 0.5\n")
    from stepdpo_trl.cli.train import parse_arguments

    (_, training_args, *_), _, _ = parse_arguments(["--config", "config.yaml", *options])
    assert training_args.learning_rate == 0.5


def test_dashes_and_underscores_in_the_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepdpo_trl.cli.loop.run_loop", lambda *args: None)
    argv = ["loop", "--model", "m", "--output_dir", "out", "--problems", "p.jsonl", "--num_samples", "3"]
    assert main([*argv, "--", "--learning-rate", "1e-6", "--use_cpu", "true", "--bf16", "false"]) == 0


def test_judge_expressions_need_no_quotes(tmp_path):
    """The documented form of a judge expression needs no quotes."""
    (tmp_path / "p.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    line = f"{sys.executable} -m stepdpo_trl.cli.main data --model m --problems p.jsonl --output-dir run "
    line += "--output-file x.jsonl --judge arithmetic,rollout --dry-run"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "localize" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
