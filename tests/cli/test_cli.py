import json
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from datasets import Dataset
from transformers import TrainerState

from stepdpo_trl import __version__
from stepdpo_trl.cli import main as cli
from stepdpo_trl.cli.train import load_data, main, parse_arguments
from stepdpo_trl.runs.progress import ProgressLines

from ..tiny import step_rows


def run(capsys, *argv):
    """Return the exit status and output of a command line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"stepdpo_trl {__version__}\n")


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "Train with StepDPOTrainer" in out
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert "--overlong_prefix" in out
    assert out.startswith("usage: stepdpo train [--config FILE] [--option VALUE ...]\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "stepdpo: error: no command is given. See `stepdpo --help`.\n"),
        (("trian",), "stepdpo: error: trian is not a command. Did you mean train?\n"),
        (("frobnicate", "--model", "m"), "stepdpo: error: frobnicate is not a command. See `stepdpo --help`.\n"),
        (("--model", "m"), "stepdpo: error: --model is not a command. See `stepdpo --help`.\n"),
    ],
)
def test_no_or_unknown_command(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert (code, err) == (2, message)


def test_errors_are_printed_once(tmp_path):
    """Also those that come before the log file is open. Under pytest the root logger has handlers, which hides it."""
    for argv in (["loop", "--stages", "0", "--model", "m", "--output-dir", "o"], ["env", "--log-file", "none/x.log"]):
        command = [sys.executable, "-m", "stepdpo_trl.cli.main", *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("error: ") == len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("inspect", "pairs.jsonl", "--rwo", "1"),
            "inspect: error: --rwo is not a known argument. Did you mean --row?",
        ),
        (
            ("rectify", "run", "--rectifer=M"),
            "rectify: error: --rectifer is not a known argument. Did you mean --rectifier?",
        ),
        (("report", "run", "another"), "'another' does not belong to an option"),
    ],
)
def test_unknown_options(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err


FILE_KINDS = [("parquet", "parquet"), ("json", "jsonl")]
CPU = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu", "true", "--bf16", "false"]


@pytest.mark.parametrize(
    ("argv", "yaml", "message"),
    [
        (["--learnin_rate", "1e-6"], "", "--learnin_rate is not a known argument. Did you mean --learning_rate?"),
        ([], "overlong_prefx: drop", "--overlong_prefx is not a known argument. Did you mean --overlong_prefix?"),
        ([], "overlong_prefix: cut", "overlong_prefix='cut'` must be one of ['truncate', 'drop', 'error']"),
        ([], "- a list", "mapping"),
        ([], "beta: [", "while parsing"),
        (["--num_process", "2"], "", "Did you mean --num_processes?"),
        (["--model", "m"], "", "--model is not a known argument. Did you mean --model_name_or_path?"),
        (["--batch-size", "8"], "", "Did you mean --per_device_train_batch_size?"),
        (["--resume_from_checkpoint", "none/x"], "", "--resume_from_checkpoint none/x: there is no such folder."),
        (["--learning_rat", "1e-6"], "", "Did you mean --learning_rate?"),  # argparse would complete it
        (["--overlong_prefix", "cut"], "", "argument --overlong_prefix/--overlong-prefix: invalid choice: 'cut'"),
        (["--num_processes", "two"], "", "invalid int value: 'two'"),
        (["pairs.py"], "", "'pairs.py' does not belong to an option"),  # accelerate would run it as a script
        ([], "cpu: true", "'True' does not belong to an option. Flags of accelerate"),
        (["--config=other.yaml"], "", "--config must be passed once"),
        (["--dataset_name", "nowhere.jsonl"], "", "No such file: 'nowhere.jsonl'"),
        (["--test_split_size", "0.1"], "", "--test_split_size has no effect with `dataset_name`"),
        (["--dataset_name", ""], "datasets: [{pth: x}]", "unexpected keyword argument 'pth'"),
        (["--dataset_name", ""], "{datasets: [{path: x}], dataset_config: y}", "no effect with `datasets`"),
        (["--config_file", "nowhere.yaml"], "", "`nowhere.yaml` does not exist"),
        (["--dataset_name", ""], "", "Pass the data either as --dataset_name, or as `datasets`"),
        (["--model_name_or_path", ""], "", "No model is given. Pass --model_name_or_path."),
        (["--output_dir", ""], "", "No output folder is given. Pass --output_dir."),
    ],
)
def test_bad_arguments_are_one_line(capsys, tmp_path, argv, yaml, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml or "{}")
    code, _, err = run(capsys, "train", "--config", str(path), *CPU, *argv)
    assert code == 2
    assert "stepdpo train: error: " in err
    assert message in err
    assert len(err.splitlines()) == 1  # no traceback, no usage


def test_missing_file_and_unknown_accelerate_config(capsys):
    for config in (["--config", "nowhere.yaml"], ["--config=nowhere.yaml"]):
        code, _, err = run(capsys, "train", *config)
        assert code == 2
        assert "No such file or directory: 'nowhere.yaml'" in err
    code, _, err = run(capsys, "train", "--config")
    assert code == 2
    assert "with a file after it" in err
    for option in (["--accelerate_config", "zero4"], ["--accelerate_config=zero4"]):
        code, _, err = run(capsys, "train", *CPU, *option)
        assert code == 2
        assert "Accelerate config zero4 is neither a file nor a valid config" in err


def test_script_refuses_options_of_the_launcher(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*CPU, "--num_processes", "2"])
    assert stop.value.code == 2
    assert "--num_processes is not an argument of the script" in capsys.readouterr().err


def test_data_from_files_and_mixtures(tmp_path):
    Dataset.from_list(step_rows(6)).to_parquet(tmp_path / "pairs.parquet")
    Dataset.from_list(step_rows(4)).to_json(tmp_path / "pairs.jsonl")
    for file, rows in (("pairs.parquet", 6), ("pairs.jsonl", 4)):
        (script_args, _, _, dataset_args, _), _, _ = parse_arguments([*CPU, "--dataset_name", str(tmp_path / file)])
        data = load_data(script_args, dataset_args)
        assert [dict(row) for row in data["train"]] == step_rows(rows)
    config = tmp_path / "config.yaml"
    parts = [{"path": kind, "data_files": str(tmp_path / f"pairs.{end}")} for kind, end in FILE_KINDS]
    config.write_text(json.dumps({"datasets": parts, "test_split_size": 2}))
    parsed, _, _ = parse_arguments(["--config", str(config), *CPU, "--dataset_name", ""])
    data = load_data(parsed[0], parsed[3])
    assert (len(data["train"]), len(data["test"])) == (8, 2)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (subprocess.CalledProcessError(3, "python"), 1, "training ended with status 3; see its message above."),
        (KeyboardInterrupt(), 130, "interrupted. To resume, add --resume_from_checkpoint true."),
    ],
)
def test_failed_or_interrupted_training(capsys, monkeypatch, error, status, message):
    def launch(args):
        raise error

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    assert cli.main(["train", *CPU]) == status
    err = capsys.readouterr().err.strip()
    assert err.startswith("stepdpo train: ")
    assert err.endswith(message)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "passed"),
    [("true", "o/checkpoint-10"), ("True", "o/checkpoint-10"), ("false", None), ("o/checkpoint-9", "o/checkpoint-9")],
)
def test_resume_from_checkpoint(tmp_path, monkeypatch, value, passed):
    """`true` is the last complete checkpoint, and not a folder of that name."""
    monkeypatch.chdir(tmp_path)
    for name, complete in (("checkpoint-9", True), ("checkpoint-10", True), ("checkpoint-11", False)):
        (tmp_path / "o" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "o" / name / "trainer_state.json").write_text('{"global_step": 9}')
    Dataset.from_list(step_rows(4)).to_json(tmp_path / "pairs.jsonl")
    trainer = MagicMock()
    monkeypatch.setattr("stepdpo_trl.step_dpo.trainer.StepDPOTrainer", lambda *args, **kwargs: trainer)
    monkeypatch.setattr("stepdpo_trl.step_dpo.divergence.check_finite", lambda trainer: None)
    main([*CPU, "--dataset_name", str(tmp_path / "pairs.jsonl"), "--resume_from_checkpoint", value])
    trainer.train.assert_called_once_with(resume_from_checkpoint=passed)
    callback = trainer.add_callback.call_args.args[0]  # the output of a test is not a terminal
    callback.on_train_begin(None, TrainerState(max_steps=3, is_world_process_zero=True), None)
    assert isinstance(callback.training_bar, ProgressLines)


def test_resume_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    """Training that was interrupted early starts from the beginning."""
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(step_rows(4)).to_json(tmp_path / "pairs.jsonl")
    trainer = MagicMock()
    monkeypatch.setattr("stepdpo_trl.step_dpo.trainer.StepDPOTrainer", lambda *args, **kwargs: trainer)
    monkeypatch.setattr("stepdpo_trl.step_dpo.divergence.check_finite", lambda trainer: None)
    main([*CPU, "--dataset_name", str(tmp_path / "pairs.jsonl"), "--resume_from_checkpoint", "true"])
    trainer.train.assert_called_once_with(resume_from_checkpoint=None)
    assert "o has no complete checkpoint. Training starts from the beginning." in capsys.readouterr().err


@pytest.mark.slow
def test_train_launches_accelerate(chat_model, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in step_rows(8)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {chat_model}\ndataset_name: {pairs}\noutput_dir: {tmp_path / 'out'}\n"
        "beta: 0.4\nmax_steps: 5\nuse_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\n"
    )
    command = [sys.executable, "-m", "stepdpo_trl.cli.main", "train", "--config", str(config)]
    command += ["--num_processes", "1", "--cpu", "--max_steps", "2", "--log-file", str(tmp_path / "log.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Model saved to {tmp_path / 'out'}" in done.stdout
    assert "gemm_4bit" not in done.stderr
    assert "is deprecated" not in done.stderr
    assert (tmp_path / "log.txt").exists()
    arguments = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (arguments.beta, arguments.max_steps) == (0.4, 2)  # from the file; overridden on the command line
