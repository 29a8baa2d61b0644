import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from stepdpo_trl import StepDPOConfig, StepDPOTrainer

from ..reference_dpo import step_dpo_loss
from ..tiny import plain_rows, step_rows, tiny_model
from ..training import BETA, assert_same_weights, logged, make_trainer, weights

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")


def test_accumulation_equals_one_large_batch(plain_model, tmp_path):
    large = make_trainer(plain_model, tmp_path, per_device_train_batch_size=8)
    small = make_trainer(plain_model, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for trainer in (large, small):
        trainer.train()
        assert trainer.state.global_step == 1
    assert_same_weights(weights(large), weights(small), rtol=1e-5, atol=1e-7)


def conversational_rows(number):
    """Return ordinary preference pairs as messages."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
        }
        for row in plain_rows(number)
    ]


@pytest.mark.parametrize("kind", ["map-style", "stream", "conversational"])
def test_plain_preference_data_equals_dpo_trainer_bit_for_bit(kind, plain_model, chat_model, tmp_path):
    dataset = Dataset.from_list(conversational_rows(8) if kind == "conversational" else plain_rows())
    dataset = dataset.to_iterable_dataset() if kind == "stream" else dataset
    model = chat_model if kind == "conversational" else plain_model
    options = {"config_cls": DPOConfig, "max_steps": 4, "optim": "adamw_torch", "gradient_checkpointing": True}
    result = {}
    for cls in (DPOTrainer, StepDPOTrainer):
        trainer = make_trainer(model, tmp_path, dataset, cls, **options)
        trainer.train()
        result[cls] = weights(trainer)
    assert_same_weights(result[DPOTrainer], result[StepDPOTrainer], rtol=0, atol=0)
    assert not torch.equal(next(iter(result[DPOTrainer].values())), next(iter(tiny_model(300).parameters())))


@pytest.mark.parametrize(("cls", "output_dir"), [(DPOTrainer, "m-DPO"), (StepDPOTrainer, "m-Step-DPO")])
def test_args_none(cls, output_dir, plain_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The default configuration sets bf16, which Transformers refuses without a GPU
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model = AutoModelForCausalLM.from_pretrained(plain_model)
    model.config._name_or_path = "someone/m"
    tokenizer = AutoTokenizer.from_pretrained(plain_model)
    rows = plain_rows() if cls is DPOTrainer else step_rows()
    trainer = cls(model, ref_model=tiny_model(300), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert trainer.args.output_dir == output_dir
    assert (trainer.args.beta, trainer.args.learning_rate, trainer.args.max_length) == (0.1, 1e-6, 1024)


def test_dpo_config_equals_default_step_dpo_config(chat_model, tmp_path):
    stock = make_trainer(chat_model, tmp_path, config_cls=DPOConfig)
    own = make_trainer(chat_model, tmp_path, config_cls=StepDPOConfig)
    assert list(stock.train_dataset) == list(own.train_dataset)


def test_stream_equals_map_style_dataset(chat_model, tmp_path):
    rows = Dataset.from_list(step_rows())
    result = []
    for dataset in (rows, rows.to_iterable_dataset()):
        # streams are not shuffled
        trainer = make_trainer(chat_model, tmp_path, dataset, max_steps=4, train_sampling_strategy="sequential")
        trainer.train()
        result.append(trainer)
    assert logged(result[0], "loss") == logged(result[1], "loss")
    assert_same_weights(weights(result[0]), weights(result[1]), rtol=0, atol=0)


def test_step_pairs_and_plain_pairs_in_evaluation(chat_model, tmp_path):
    messages = conversational_rows(4)
    evals = {
        "steps": Dataset.from_list(step_rows(4)),
        "stream": Dataset.from_list(step_rows(4)).to_iterable_dataset(),
        "plain": Dataset.from_list(messages),
    }
    trainer = make_trainer(chat_model, tmp_path, eval_dataset=evals, eval_strategy="steps", eval_steps=1)
    stock = make_trainer(chat_model, tmp_path, Dataset.from_list(messages), DPOTrainer, DPOConfig)
    assert trainer.eval_dataset["plain"]["chosen_ids"] == stock.train_dataset["chosen_ids"]
    trainer.train()
    assert len(logged(trainer, "eval_plain_loss")) == 2
    assert logged(trainer, "eval_steps_loss") == logged(trainer, "eval_stream_loss")

    new = trainer.evaluate(Dataset.from_list(step_rows(4)))  # raw rows, as passed to the trainer
    assert new["eval_loss"] == pytest.approx(logged(trainer, "eval_steps_loss")[-1], abs=1e-6)


def test_precomputed_reference_gives_same_weights(chat_model, tmp_path):
    result = []
    for precompute in (False, True):
        trainer = make_trainer(chat_model, tmp_path, precompute_ref_log_probs=precompute, num_train_epochs=2)
        trainer.train()
        result.append(weights(trainer))
    assert trainer.ref_model is None
    assert_same_weights(*result, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_gives_same_weights(chat_model, tmp_path):
    result = []
    for checkpointing in (False, True):
        trainer = make_trainer(chat_model, tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        result.append(weights(trainer))
    assert_same_weights(*result, rtol=1e-5, atol=1e-7)


def test_sync_ref_model(chat_model, tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = make_trainer(chat_model, tmp_path, **options)
    trainer.train()
    reference = dict(trainer.ref_model.named_parameters())
    assert_same_weights(weights(trainer), reference, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # deprecated upstream
def test_compute_metrics(chat_model, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mean_logit": float(np.mean(prediction.predictions))}

    trainer = make_trainer(
        chat_model, tmp_path, eval_dataset=Dataset.from_list(step_rows(4)), compute_metrics=compute_metrics
    )
    assert "eval_mean_logit" in trainer.evaluate()
    longest = max(len(row["prompt_ids"] + row["chosen_ids"]) for row in trainer.eval_dataset)
    assert seen[0].predictions.shape[1:] == (longest, trainer.model.config.vocab_size)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_resumed_run_equals_uninterrupted_run(peft_config, chat_model, tmp_path):
    options = {"max_steps": 4, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    uninterrupted = make_trainer(chat_model, tmp_path, peft_config=peft_config, **options)
    uninterrupted.train()
    resumed = make_trainer(chat_model, tmp_path, peft_config=peft_config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(uninterrupted), weights(resumed), rtol=0, atol=0)


def test_lora_reference_is_the_base_model(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, peft_config=LORA, num_train_epochs=2, learning_rate=0.1)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)

    triples = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert loss.item() < 0.69
    torch.testing.assert_close(loss, step_dpo_loss(trainer.model, base, triples, BETA), rtol=1e-5, atol=1e-5)


def test_peft_model_reference_is_its_initial_adapter(chat_model, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # as in a trained adapter
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "rewards/margins")[-1] != pytest.approx(0, abs=1e-6)


def test_model_card_and_tags(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, save_strategy="epoch")
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "trained with Step-DPO" in card
    assert "https://huggingface.co/papers/2406.18629" in card
    assert "lai2024stepdpo" in card
    assert re.search(r"^- step-dpo$", card, re.MULTILINE)
    assert set(trainer.model.model_tags) == {"trl", "dpo", "step-dpo"}

    plain = make_trainer(chat_model, tmp_path, plain_rows())
    plain.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "trained with DPO" in card
    assert "step-dpo" not in card


@pytest.mark.gpu
def test_cuda_equals_the_oracle(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, use_cpu=False, ref_model=tiny_model(300, seed=2))
    assert trainer.model.device.type == "cuda"
    policy, reference = AutoModelForCausalLM.from_pretrained(chat_model), tiny_model(300, seed=2)
    triples = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss.cpu(), step_dpo_loss(policy, reference, triples, BETA), rtol=1e-4, atol=1e-4)
