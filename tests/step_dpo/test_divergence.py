"""Training that diverges, or trains nothing, is an error."""

import json

import pytest
import torch

from stepdpo_trl.cli import train
from stepdpo_trl.step_dpo.divergence import check_finite

from ..tiny import step_rows
from ..training import make_trainer


@pytest.fixture
def trainer(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, max_steps=1)
    trainer.train()
    return trainer


def test_finite_weights_pass(trainer):
    check_finite(trainer)


def test_weights_that_are_no_numbers(trainer):
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = torch.nan
    message = r"diverged: 1 of 27 weights are not finite, such as model\.norm\.weight\..* \(now 0\.01\)"
    with pytest.raises(FloatingPointError, match=message):
        check_finite(trainer)
    trainer.model.model.norm.weight.requires_grad = False  # as those of a base model, or quantized ones
    check_finite(trainer)


def test_metrics_that_are_no_numbers(trainer):
    """As with fp16, whose scaler skips all steps: the Trainer itself leaves losses of NaN out of its averages."""
    trainer.state.log_history.insert(0, {"loss": float("inf")})
    check_finite(trainer)
    trainer.state.log_history.append({"loss": 0.0, "logps/chosen": float("nan")})
    with pytest.raises(FloatingPointError, match=r"diverged: logps/chosen is nan\. The model"):
        check_finite(trainer)


def test_a_diverged_training_saves_no_model(chat_model, tmp_path):
    """Brackets in the name of the file are no pattern."""
    (tmp_path / "pairs[1].jsonl").write_text("".join(json.dumps(row) + "\n" for row in step_rows()))
    (tmp_path / "pairs1.jsonl").write_text("{}")
    options = [
        "--model_name_or_path",
        chat_model,
        "--dataset_name",
        str(tmp_path / "pairs[1].jsonl"),
        "--max_steps",
        "3",
    ]
    options += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    with pytest.raises(FloatingPointError, match="Training diverged"):
        train.main([*options, "--learning_rate", "1e38", "--save_strategy", "no", "--dtype", "float32"])
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_fewer_rows_than_a_batch_that_are_all_dropped(chat_model, tmp_path):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 9}
    with pytest.raises(ValueError, match=r"has 8 rows, which is less than one batch.*Set it to False"):
        make_trainer(chat_model, tmp_path, **options).train()
    make_trainer(chat_model, tmp_path, **{**options, "per_device_train_batch_size": 8}).train()
