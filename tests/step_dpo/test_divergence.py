"""Training that diverges, or trains nothing, is an error."""

import json
import math
import multiprocessing

import pytest
import torch
from datasets import Dataset

from stepdpo_trl.cli import train
from stepdpo_trl.step_dpo.divergence import check_finite

from ..tiny import step_rows
from ..training import assert_same_weights, make_trainer, weights


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


@pytest.mark.long
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


@pytest.mark.long
def test_a_dataset_of_one_row(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, step_rows(1), eval_dataset=Dataset.from_list(step_rows(1)))
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.evaluate()["eval_loss"] < math.log(2)  # the same pair
    check_finite(trainer)


def test_an_empty_evaluation_set(chat_model, tmp_path):
    empty = Dataset.from_list(step_rows(1)).select([])
    with pytest.raises(ValueError, match=r"eval dataset is empty\. Check how it was loaded"):
        make_trainer(chat_model, tmp_path, eval_dataset=empty)


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method, chat_model, tmp_path):
    """Batches made in worker processes are the same, however these are started."""
    trainer = make_trainer(chat_model, tmp_path)
    trainer.train()
    other = make_trainer(chat_model, tmp_path, dataloader_num_workers=1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        other.train()
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert_same_weights(weights(trainer), weights(other), rtol=0, atol=0)


@pytest.mark.long
def test_fewer_rows_than_a_batch_that_are_all_dropped(chat_model, tmp_path):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 9}
    with pytest.raises(ValueError, match=r"has 8 rows, which is less than one batch.*Set it to False"):
        make_trainer(chat_model, tmp_path, **options).train()
    make_trainer(chat_model, tmp_path, **{**options, "per_device_train_batch_size": 8}).train()
