"""Compares the estimate of activation memory with the tensors that PyTorch keeps, and tests the advice."""

import logging

import pytest
import torch
from datasets import Dataset

from stepdpo_trl.shared_prefix import memory
from stepdpo_trl.shared_prefix.memory import activation_bytes, most_tokens

from ..tiny import plain_rows, step_rows
from ..training import make_trainer
from .architectures import tiny_decoder


def kept_bytes(model, tokens):
    """Return the bytes that a forward keeps for the backward, counting each tensor once and without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the reference keeps the address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.randint(3, 40, (1, tokens)), use_cache=False)
    return sum(size for size, _ in kept.values())


SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "phi3", "granite"])
def test_estimate(name, dtype):
    few, many = (kept_bytes(tiny_decoder(name, num_hidden_layers=layers, **SIZES).to(dtype), 48) for layers in (2, 6))
    config = tiny_decoder(name, num_hidden_layers=4, **SIZES).config
    assert activation_bytes(config, dtype.itemsize) == pytest.approx((many - few) / 48, rel=0.25)


def test_seven_billion_parameters_by_hand():
    """Qwen2.5-7B in bfloat16: 28 layers of 2 * 3584 * 6 + 2 * (2 * 3584 + 2 * 3584 + 2 * 512 + 4 * 18944) bytes."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    config = tiny_decoder("qwen2").config.__class__(num_attention_heads=28, num_key_value_heads=4, **sizes)
    assert activation_bytes(config, 2) == 28 * (43008 + 2 * (7168 + 7168 + 1024 + 75776)) == 6_307_840


def advice(trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer.train()
    return [record.message for record in caplog.records if "Gradient checkpointing is enabled" in record.message]


def test_advice(chat_model, tmp_path, caplog):
    trainer = make_trainer(chat_model, tmp_path, gradient_checkpointing=True, per_device_train_batch_size=2)
    pairs = [len(row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]) for row in trainer.train_dataset]
    assert most_tokens(trainer) == sum(sorted(pairs)[-2:])
    (message,) = advice(trainer, caplog)
    assert f"the largest batch ({most_tokens(trainer)} tokens)" in message
    # 1 / (forward 1 + recomputation 1 + backward 2 + reference 1)
    assert "would save about 20% of the computation" in message
    assert trainer.args.gradient_checkpointing


def test_no_advice_without_memory(chat_model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert not advice(make_trainer(chat_model, tmp_path, gradient_checkpointing=True), caplog)


@pytest.mark.parametrize("options", [{}, {"shared_prefix": "off", "gradient_checkpointing": True}], ids=str)
def test_no_advice_without_checkpointing_or_sharing(options, chat_model, tmp_path, caplog):
    assert not advice(make_trainer(chat_model, tmp_path, plain_rows(), **options), caplog)


def test_most_tokens_of_a_stream(chat_model, tmp_path):
    stream = Dataset.from_list(step_rows()).to_iterable_dataset()
    assert most_tokens(make_trainer(chat_model, tmp_path, stream, max_steps=1)) is None
    bounded = make_trainer(chat_model, tmp_path, stream, max_steps=1, max_tokens_per_forward=1500)
    assert most_tokens(bounded) == 1500
