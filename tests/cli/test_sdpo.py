import json

import pytest
from datasets import Dataset
from trl.scripts.utils import DatasetConfig

from stepdpo_trl.cli.train import main, parse_arguments

from ..tiny import step_rows

CPU = ["--output_dir", "o", "--use_cpu", "true", "--bf16", "false"]
NAMES = ["--model_name_or_path", "m", "--dataset_name", "d"]
DATASETS = "{model_name_or_path: m, sdpo: true, datasets: [{path: x}, {path: y}], %s}"


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


@pytest.fixture
def pairs(tmp_path):
    """Write step pairs, with a column `stage` if one is given, and return the options that select them."""

    def write(stage=None):
        dataset = Dataset.from_list(step_rows(8))
        if stage is not None:
            dataset = dataset.add_column("stage", stage)
        dataset.to_parquet(tmp_path / "pairs.parquet")
        return ["--dataset_name", str(tmp_path / "pairs.parquet")]

    return write


def test_options_from_command_line_and_file(config):
    argv = [*CPU, *NAMES, "--sdpo", "--stage_fractions", "0.25", "0.75", "--stage_schedule", "continuous"]
    (*_, sdpo), _, _ = parse_arguments([*argv, "--stage_options", '{"2": {"beta": 0.05}}'])
    assert (sdpo.sdpo, sdpo.stage_fractions, sdpo.stage_schedule) == (True, [0.25, 0.75], "continuous")
    assert sdpo.stage_options == {"2": {"beta": 0.05}}
    text = "{sdpo: true, stage_fractions: [0.25, 0.75], stage_options: {2: {beta: 0.05}}}"
    (*_, sdpo), _, _ = parse_arguments([*config(text), *CPU, *NAMES])
    callback = sdpo.make_callback()
    assert (callback.fractions, callback.schedule) == ([0.25, 0.75], "restart")
    assert callback.stage_options == {"2": {"beta": 0.05}}


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        ([*NAMES, "--stage_fractions", "0.5", "0.5"], "{}", "--stage_fractions has no effect without stages"),
        (NAMES, "stage_schedule: continuous", "--stage_schedule has no effect without stages"),
        ([*NAMES, "--stage_options", '{"1": {"beta": 1}}'], "{}", "--stage_options has no effect without stages"),
        ([*NAMES, "--stage_fraction", "0.5"], "{}", "Did you mean --stage_fractions?"),
        ([*NAMES, "--stage_schedule", "constant"], "sdpo: true", "invalid choice: 'constant'"),
        (NAMES, "{sdpo: true, stage_schedule: constant}", "Unknown schedule 'constant'"),
        (NAMES, "{sdpo: true, stage_options: {2: {betta: 1}}}", "unknown option 'betta'. Did you mean 'beta'?"),
        (NAMES, "{sdpo: true, stage_options: {beta: 1}}", "must map names of stages to their options"),
        (NAMES, "{sdpo: true, stage_options: [1]}", "must map names of stages to their options"),
        ([*NAMES, "--stage_options", "beta=1"], "sdpo: true", "'beta=1' is not JSON"),
        ([*NAMES, "--dataset_streaming"], "sdpo: true", "--dataset_streaming cannot be used with --sdpo"),
        ([*NAMES, "--stage_fractions", "0.5", "0.6"], "sdpo: true", "must be positive and sum to 1"),
        ([], DATASETS % "streaming: true", "--streaming cannot be used with --sdpo"),
        ([], DATASETS % "stage_fractions: [0.5, 0.5]", "each of `datasets` is already a stage"),
        ([], DATASETS % "test_split_size: 0.1", "--test_split_size draws different rows"),
    ],
)
def test_bad_options(capsys, config, argv, text, message):
    with pytest.raises(SystemExit) as stop:
        parse_arguments([*config(text), *CPU, *argv])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif("fraction" not in DatasetConfig.__dataclass_fields__, reason="needs a newer TRL")
def test_fraction_of_a_mixture(capsys, config):
    with pytest.raises(SystemExit):
        parse_arguments([*config("{sdpo: true, datasets: [{path: x, fraction: 0.5}]}"), *CPU, *NAMES[:2]])
    assert "`fraction` under `datasets` is a share of a mixture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "argv", "message"),
    [
        (None, [], "--sdpo needs stages: the data has no column `stage`"),
        ([1, 2] * 4, ["--stage_fractions", "0.5", "0.5"], "a column `stage`, and --stage_fractions is set as well"),
        (None, ["--stage_fractions", "0.01", "0.99"], "Stage 1 is empty"),
    ],
)
def test_data_without_stages(pairs, stage, argv, message):
    """The error comes before the model is loaded: there is no model "m"."""
    with pytest.raises(ValueError, match=message):
        main([*CPU, *NAMES[:2], *pairs(stage), "--sdpo", *argv])


@pytest.mark.parametrize("source", ["fractions", "column", "datasets"])
def test_stages_of_a_run(source, chat_model, config, pairs, tmp_path):
    """Every way to define stages gives a stage of six rows and one of two."""
    options = {
        "model_name_or_path": chat_model,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "sdpo": True,
        "stage_options": {"2": {"beta": 0.3}},
        "report_to": "none",
        "save_strategy": "no",
    }
    data = pairs([1] * 6 + [2] * 2 if source == "column" else None)
    if source == "datasets":
        file = {"path": "parquet", "data_files": data[1]}
        options["datasets"] = [{**file, "split": split} for split in ("train[:6]", "train[6:]")]
        data = []
    if source == "fractions":
        options["stage_fractions"] = [0.75, 0.25]
    if source == "column":
        options.update(eval_strategy="steps", eval_steps=1, dataset_test_split="train")
    main([*config(json.dumps(options)), *CPU[2:], *data])
    report = json.loads((tmp_path / "out" / "sdpo_report.json").read_text())
    assert [(stage["rows"], stage["beta"]) for stage in report["stages"]] == [(6, 0.1), (2, 0.3)]
