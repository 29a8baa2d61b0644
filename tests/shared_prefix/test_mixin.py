"""Compares training with shared prefixes to training on padded sequences."""

import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from stepdpo_trl import StepDPOConfig, StepDPOTrainer
from stepdpo_trl.shared_prefix.mixin import check_parts, longest_first
from stepdpo_trl.shared_prefix.support import why_not_shared
from stepdpo_trl.step_dpo.sampler import PromptGroupSampler

from ..step_dpo.test_loss import LOSSES
from ..tiny import CHATML, byte_level_tokenizer, plain_rows, step_rows, tiny_model
from ..training import assert_same_weights, config, logged, make_trainer, weights
from .architectures import tiny_decoder
from .test_tree import trie_size

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
METRICS = (
    "loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "entropy",
)
METRICS += ("rewards/accuracies", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")


def problem_rows():
    """Return step rows with three pairs for each of three problems."""
    rows = step_rows(9)
    return [{**row, "prompt": rows[i % 3]["prompt"]} for i, row in enumerate(rows)]


def loss_gradients_and_metrics(tmp_path, **options):
    tokenizer = byte_level_tokenizer(CHATML)
    policy, reference = tiny_model(len(tokenizer), 1), tiny_model(len(tokenizer), 2)
    trainer = make_trainer(policy, tmp_path, step_rows(4), ref_model=reference, processing_class=tokenizer, **options)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss, {n: p.grad for n, p in trainer.model.named_parameters()}, dict(trainer._metrics["train"])


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(str(value) for value in options.values()))
def test_every_loss(options, tmp_path):
    options = {"beta": 0.02, **options}
    loss, gradients, metrics = loss_gradients_and_metrics(tmp_path, shared_prefix="on", **options)
    expected_loss, expected, expected_metrics = loss_gradients_and_metrics(tmp_path, shared_prefix="off", **options)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for name, values in metrics.items():
        assert values == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-5), name
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


def test_length_of_an_answer_to_an_empty_prompt(plain_model, tmp_path):
    """The first token has no prediction, but counts when DPOTrainer divides by the length."""
    rows = [
        {"prompt": "", "chosen": "12 + 30", "rejected": "42 - 7 ="},
        {"prompt": "", "chosen": "a", "rejected": "bc"},
    ]
    losses = []
    for choice in ("on", "off"):
        options = {"ref_model": tiny_model(300, 2), "loss_type": ["ipo"], "shared_prefix": choice}
        trainer = make_trainer(plain_model, tmp_path, rows, **options)
        losses.append(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def ref_adapter(path):
    """Return a PEFT model, whose initial adapter DPOTrainer copies as the reference."""
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), LORA)


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
MODES = {
    "full": {},
    "plain pairs": {"rows": plain_rows()},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora": {"peft_config": LORA},
    "lora precomputed": {"peft_config": LORA, "precompute_ref_log_probs": True},
    "ref adapter": {"model": ref_adapter},
    "qlora": {"peft_config": LORA, "quantization_config": NF4},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "lora checkpointing": {"peft_config": LORA, "gradient_checkpointing": True},
    "truncated": {"max_length": 60},
    "plain truncated": {"rows": plain_rows(), "max_length": 30, "truncation_mode": "keep_end"},
    "workers": {"dataloader_num_workers": 1},
    "sync": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def trained(path, tmp_path, model=None, **options):
    model = model(path) if model else path
    options = {"max_steps": 3, "processing_class": AutoTokenizer.from_pretrained(path), **options}
    trainer = make_trainer(model, tmp_path, **options)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_training_equals_padded_sequences(mode, chat_model, tmp_path):
    shared = trained(chat_model, tmp_path, shared_prefix="on", **MODES[mode])
    budget = {"max_tokens_per_forward": 170, "max_length": 165}
    packs = trained(chat_model, tmp_path, shared_prefix="on", **{**budget, **MODES[mode]})
    padded = trained(chat_model, tmp_path, shared_prefix="off", **MODES[mode])
    # QLoRA's adapter is in bfloat16, so small differences of sums can be rounded up to different weights
    rtol, atol = (1e-2, 2e-3) if mode == "qlora" else (1e-4, 1e-6)
    for trainer in (shared, packs):
        assert trainer.shares_prefixes
        for name in METRICS:
            assert logged(trainer, name) == pytest.approx(logged(padded, name), rel=rtol, abs=10 * atol), name
        assert_same_weights(weights(trainer), weights(padded), rtol=rtol, atol=atol)


def test_budget_splits_the_batch(chat_model, tmp_path):
    """Without a split, the test above would not test the budget."""
    trainer = make_trainer(chat_model, tmp_path, shared_prefix="on", max_tokens_per_forward=170, max_length=165)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["prefix_tree"].packs) > 1
    assert all(pack.tokens <= 170 for pack in batch["prefix_tree"].packs)


def test_each_token_of_a_batch_is_computed_once(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, problem_rows(), per_device_train_batch_size=9)
    computed = []
    trainer.model.base_model.embed_tokens.register_forward_hook(lambda *call: computed.append(call[1][0].numel()))
    (batch,) = trainer.get_train_dataloader()
    trainer.compute_loss(trainer.model, batch)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert computed == [trie_size(rows)]
    assert computed[0] < 0.4 * batch["input_ids"].numel()


def test_defaults(chat_model, tmp_path):
    """Plain pairs with a DPOConfig are not shared, so that they equal DPOTrainer bit for bit."""
    assert make_trainer(chat_model, tmp_path).shares_prefixes
    assert make_trainer(chat_model, tmp_path, plain_rows()).shares_prefixes
    assert make_trainer(chat_model, tmp_path, config_cls=DPOConfig).shares_prefixes
    for options in ({"rows": plain_rows(), "config_cls": DPOConfig}, {"shared_prefix": "off"}):
        trainer = make_trainer(chat_model, tmp_path, **options)
        assert not trainer.shares_prefixes
        assert isinstance(trainer.data_collator, DataCollatorForPreference)
        assert not hasattr(trainer.model.base_model, "forward_without_tree")


def test_off_equals_dpo_trainer_bit_for_bit(chat_model, tmp_path):
    ours = trained(chat_model, tmp_path, rows=plain_rows(), shared_prefix="off")
    stock = trained(chat_model, tmp_path, rows=plain_rows(), cls=DPOTrainer, config_cls=DPOConfig)
    assert_same_weights(weights(ours), weights(stock), rtol=0, atol=0)


@pytest.mark.parametrize("precompute", [False, True])
def test_evaluate(precompute, chat_model, tmp_path):
    results = []
    for choice in ("on", "off"):
        eval_dataset = {"first": Dataset.from_list(step_rows(5)), "plain": Dataset.from_list(plain_rows(3))}
        options = {"shared_prefix": choice, "eval_dataset": eval_dataset, "precompute_ref_log_probs": precompute}
        trainer = make_trainer(chat_model, tmp_path, **options)
        new = Dataset.from_list(step_rows(7)[5:])
        results.append({**trainer.evaluate(), **trainer.evaluate(new, metric_key_prefix="new")})
    shared, padded = results
    assert {"eval_first_loss", "eval_plain_loss", "new_loss", "eval_rewards/margins"} <= shared.keys()
    for name, value in padded.items():
        if not name.endswith(("time", "per_second")):
            assert shared[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # deprecated upstream
def test_predict_returns_logits_of_whole_sequences(chat_model, tmp_path):
    predictions = []
    for choice in ("on", "off"):
        trainer = make_trainer(chat_model, tmp_path, shared_prefix=choice)
        predictions.append(trainer.predict(trainer.train_dataset))
    torch.testing.assert_close(*(torch.tensor(one.predictions) for one in predictions), rtol=0, atol=0)


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(chat_model, tmp_path):
    options = {
        "shared_prefix": "on",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "group_by_prompt": True,
    }
    uninterrupted = make_trainer(chat_model, tmp_path, problem_rows(), **options)
    uninterrupted.train()
    resumed = make_trainer(chat_model, tmp_path, problem_rows(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(uninterrupted), weights(resumed), rtol=0, atol=0)


def test_reference_scores_are_computed_longest_first(chat_model, tmp_path):
    def scored(**options):
        trainer = make_trainer(chat_model, tmp_path, precompute_ref_log_probs=True, **options)
        return trainer, torch.tensor([trainer.train_dataset[f"ref_{name}_logps"] for name in ("chosen", "rejected")])

    trainer, shared = scored(shared_prefix="on")
    torch.testing.assert_close(shared, scored(shared_prefix="off")[1], rtol=1e-5, atol=1e-5)
    ordered = trainer.train_dataset.select(longest_first(trainer.train_dataset))
    lengths = [sum(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in ordered]
    assert lengths == sorted(lengths, reverse=True)


def test_replaced_reference_model(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, shared_prefix="on")
    tokenizer = byte_level_tokenizer(CHATML)
    other = {"ref_model": tiny_model(len(tokenizer), 5), "processing_class": tokenizer, "shared_prefix": "off"}
    trainer.ref_model = make_trainer(tiny_model(len(tokenizer), 3), tmp_path, **other).ref_model
    batch = next(iter(trainer.get_train_dataloader()))
    whole = {name: value for name, value in batch.items() if name != "prefix_tree"}
    for model in (trainer.ref_model, trainer.model):
        for one, other in zip(*(trainer.compute_ref_log_probs(model, b) for b in (batch, whole)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    torch.testing.assert_close(*(trainer.compute_loss(trainer.model, b) for b in (batch, whole)), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ unsupported


def refused(tmp_path, model, **options):
    """Return the error of `shared_prefix="on"`, which contains the reason why prefixes cannot be shared."""
    tokenizer = byte_level_tokenizer(CHATML)
    options = {"processing_class": tokenizer, "precompute_ref_log_probs": True, "rows": step_rows(2), **options}
    with pytest.raises(ValueError, match="`shared_prefix='on'` is not possible because ") as error:
        make_trainer(model, tmp_path, shared_prefix="on", **options)
    return str(error.value)


UNSUPPORTED = {
    "gpt_oss": ("attention sinks", {"num_local_experts": 4}),
    "qwen3_next": ("carry a state", {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4}),
    "lfm2": ("carry a state", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("carry a state", {}),
    "falcon_h1": ("carry a state", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    "gemma3_text": ("attend to later tokens", {"use_bidirectional_attention": True}),
    "gpt_neox": ("not been tested for 'gpt_neox', only for cohere2, ", {}),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models(name, tmp_path):
    reason, options = UNSUPPORTED[name]
    vocabulary = len(byte_level_tokenizer(CHATML))
    assert reason in refused(tmp_path, tiny_decoder(name, vocab_size=vocabulary, **options))


def test_auto_logs_the_reason(tmp_path, caplog):
    tokenizer = byte_level_tokenizer(CHATML)
    model = tiny_decoder("gpt_neox", vocab_size=len(tokenizer))
    with caplog.at_level(logging.WARNING):
        options = {"processing_class": tokenizer, "ref_model": copy.deepcopy(model), "max_tokens_per_forward": 2048}
        trainer = make_trainer(model, tmp_path, **options)
    (message,) = [record.message for record in caplog.records if "Prefixes are not shared" in record.message]
    assert "because it has not been tested for 'gpt_neox'" in message
    assert message.endswith("max_tokens_per_forward=2048 has no effect.")
    trainer.train()
    assert trainer.state.global_step == 2


def test_unsupported_reference_model(tmp_path):
    tokenizer = byte_level_tokenizer(CHATML)
    model = tiny_model(len(tokenizer))
    assert "gpt_neox" in refused(tmp_path, model, ref_model=tiny_decoder("gpt_neox", vocab_size=len(tokenizer)))


def test_unsupported_options(chat_model, tmp_path):
    def reason(**options):
        return refused(tmp_path, chat_model, processing_class=None, **options)

    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "prepends virtual tokens to each sequence (PROMPT_TUNING)" in reason(peft_config=prompt_tuning)
    assert "slices batches" in reason(accelerator_config={"dispatch_batches": True})
    assert "`torch_compile=True`" in reason(torch_compile=True)
    assert "uses its own masks" in reason(model_init_kwargs={"attn_implementation": "flex_attention"})


@pytest.mark.parametrize(("short", "kind"), [("cp", "context"), ("sp", "sequence"), ("tp", "tensor")])
def test_unsupported_parallelism(short, kind, chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, shared_prefix="off")
    parallelism = SimpleNamespace(**{f"{other}_enabled": other == short for other in ("cp", "sp", "tp")})
    state = {"parallelism_config": parallelism, "dataloader_config": trainer.accelerator.dataloader_config}
    trainer.accelerator = SimpleNamespace(**state)
    assert why_not_shared(trainer) == f"{kind} parallelism splits sequences or heads"


class OtherCollator(DataCollatorForPreference):
    """Adds a key that a prefix tree does not have."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


def test_collators(chat_model, tmp_path):
    dataset = Dataset.from_list(step_rows())
    options = {"ref_model": None, "train_dataset": dataset}
    with pytest.raises(ValueError, match="the data collator is a OtherCollator, and only DPOTrainer's is supported"):
        StepDPOTrainer(
            chat_model, args=config(tmp_path, shared_prefix="on"), data_collator=OtherCollator(0), **options
        )
    own = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=64)
    trainer = StepDPOTrainer(chat_model, args=config(tmp_path), data_collator=own, **options)
    assert trainer.shares_prefixes
    assert why_not_shared(trainer) == (
        "the data collator is a SharedPrefixCollator, and only DPOTrainer's is supported"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_prefix": "yes"}, r"`shared_prefix='yes'` must be one of \['auto', 'on', 'off'\]"),
        ({"max_tokens_per_forward": 100}, r"too small for one sequence, which can have 1024 tokens \(`max_length`\)"),
        ({"max_tokens_per_forward": 0, "max_length": None}, "too small for one sequence, which can have 1 tokens"),
        ({"max_tokens_per_forward": 2048, "shared_prefix": "off"}, "has no effect with `shared_prefix='off'`"),
    ],
)
def test_invalid_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        StepDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_split_batches_and_reentrant_checkpointing_on_several_processes(tmp_path):
    options = {"max_tokens_per_forward": 2048, "gradient_checkpointing": True}
    args = config(tmp_path, **options, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = tiny_decoder("llama").config
    with pytest.raises(ValueError, match="not possible with reentrant gradient checkpointing on several processes"):
        check_parts(args, model, 2)
    check_parts(args, model, 1)
    check_parts(config(tmp_path, **options), model, 2)


@pytest.mark.parametrize("name", ["llama", "olmo3"])  # the same RoPE for all layers; one per layer type
def test_split_batches_and_dynamic_rope(name, tmp_path):
    args = config(tmp_path, max_tokens_per_forward=2048, max_length=65)
    model = tiny_decoder(name).config
    check_parts(args, model, 1)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.rope_parameters = rope if name == "llama" else {"full_attention": rope, "sliding_attention": rope}
    with pytest.raises(ValueError, match="longest sequence of a batch \\(rope_type='dynamic'\\)"):
        check_parts(args, model, 1)
    args.max_length = 64  # the model's original length, up to which the positions do not change
    check_parts(args, model, 1)


def test_a_sequence_longer_than_the_budget_is_reported(chat_model, tmp_path, caplog):
    trainer = make_trainer(chat_model, tmp_path, max_tokens_per_forward=20, max_length=None, shared_prefix="on")
    trainer.train()
    (message,) = [record.message for record in caplog.records if "max_tokens_per_forward" in record.message]
    assert message.startswith("A sequence has ")


# ------------------------------------------------------------------------------------------------ order


def test_pairs_of_a_prompt_are_consecutive(chat_model, tmp_path):
    options = {"per_device_train_batch_size": 3, "group_by_prompt": True}
    trainer = make_trainer(chat_model, tmp_path, problem_rows(), **options)
    drawn = []
    for epoch in range(2):
        loader = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        order = [trainer.train_dataset[i]["prompt"] for i in loader.batch_sampler.sampler]
        assert [len(set(order[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
        assert len(set(order)) == 3
        drawn.append(list(loader.batch_sampler.sampler))
        assert sorted(drawn[-1]) == list(range(9))
    assert drawn[0] != drawn[1]


def test_order_depends_only_on_seed_and_epoch():
    prompts = np.array([ord(name) for name in "abcabcab"])
    first, second = PromptGroupSampler(prompts, 3), PromptGroupSampler(prompts, 3)
    torch.manual_seed(5)
    assert list(first) == list(second)
    assert len(first) == 8
    second.set_epoch(1)
    assert list(first) != list(second)


def test_conflicting_orders(chat_model, tmp_path):
    stream = Dataset.from_list(step_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match="two different orders"):
        make_trainer(chat_model, tmp_path, group_by_prompt=True, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="needs all rows at once, but the train dataset is a stream"):
        make_trainer(chat_model, tmp_path, stream, group_by_prompt=True, max_steps=1)


def test_loaded_adapter(chat_model, tmp_path):
    """Prefixes are shared for a PeftModel from disk, whose reference is the adapter `"ref"`."""
    ref_adapter(chat_model).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trainer = make_trainer(model, tmp_path, processing_class=AutoTokenizer.from_pretrained(chat_model))
    assert trainer.shares_prefixes
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)
