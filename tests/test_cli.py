import json
import subprocess
import sys

import pytest
import torch

from stepdpo_trl import __version__, cli

from .tiny import step_rows


def run(capsys, *argv):
    """Exit status and output of a command line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"stepdpo_trl {__version__}\n")


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "train with StepDPOTrainer" in out
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert "--overlong_prefix" in out


@pytest.mark.parametrize(("argv", "message"), [((), "COMMAND"), (("trian",), "invalid choice: 'trian'")])
def test_no_or_unknown_command(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err


CPU = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu", "true", "--bf16", "false"]


@pytest.mark.parametrize(
    ("argv", "yaml", "message"),
    [
        (["--learnin_rate", "1e-6"], "", "--learnin_rate is not a known argument. Did you mean --learning_rate?"),
        ([], "overlong_prefx: drop", "--overlong_prefx is not a known argument. Did you mean --overlong_prefix?"),
        ([], "overlong_prefix: cut", "overlong_prefix='cut'` must be one of ['truncate', 'drop', 'error']"),
        ([], "- a list", "must contain a YAML mapping"),
        ([], "beta: [", "while parsing"),
        (["--num_process", "2"], "", "Did you mean --num_processes?"),
        (["--dataset_name", ""], "", "Name the data with --dataset_name"),
        (["--model_name_or_path", ""], "", "Name the model"),
    ],
)
def test_bad_arguments_are_one_sentence(capsys, tmp_path, argv, yaml, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml or "{}")
    code, _, err = run(capsys, "train", "--config", str(path), *CPU, *argv)
    assert code == 2
    assert err.startswith("stepdpo train: error: ")
    assert message in err


def test_missing_file_and_unknown_accelerate_config(capsys):
    code, _, err = run(capsys, "train", "--config", "nowhere.yaml")
    assert code == 2
    assert "No such file or directory: 'nowhere.yaml'" in err
    code, _, err = run(capsys, "train", *CPU, "--accelerate_config", "zero4")
    assert code == 2
    assert "zero4" in err


@pytest.mark.slow
def test_train_launches_accelerate(chat_model, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in step_rows(8)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {chat_model}\ndataset_name: {pairs}\noutput_dir: {tmp_path / 'out'}\n"
        "beta: 0.4\nmax_steps: 5\nuse_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\n"
    )
    command = [sys.executable, "-m", "stepdpo_trl.cli", "train", "--config", str(config)]
    command += ["--num_processes", "1", "--cpu", "--max_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Model saved to {tmp_path / 'out'}" in done.stdout
    arguments = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (arguments.beta, arguments.max_steps) == (0.4, 2)  # from the file; from the command line, which overrides
