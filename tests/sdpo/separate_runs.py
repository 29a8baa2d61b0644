"""sDPO runs, and their oracle: separate DPO runs with the model saved and loaded in between."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from stepdpo_trl import SDPOCallback

from ..tiny import plain_rows
from ..training import make_trainer

MODES = ("full", "scores", "lora", "qlora")
OPTIONS = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "max_grad_norm": 1.0,
}


def two_stages(first=9, second=11, rows=plain_rows):
    """Return two datasets. By default, neither fills batches of two or accumulations of two batches."""
    rows = rows(first + second)
    return [Dataset.from_list(rows[:first]), Dataset.from_list(rows[first:])]


def lora(**options):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def mode_options(mode):
    """Return the arguments of the trainer or its config that a mode needs."""
    return {
        **({"precompute_ref_log_probs": True} if mode == "scores" else {}),
        **({"peft_config": lora()} if mode in ("lora", "qlora") else {}),
        **({"quantization_config": nf4()} if mode == "qlora" else {}),
    }


def staged_run(model, folder, mode="full", stages=None, callback=None, **options):
    """Create a trainer with stages. `options` are arguments of the trainer or its config."""
    # Without shared prefixes, which are equal up to rounding only
    options = {"shared_prefix": "off", **OPTIONS, **mode_options(mode), **options}
    return make_trainer(model, folder, stages or two_stages(), callbacks=[callback or SDPOCallback()], **options)


def separate_runs(model, folder, mode="full", stages=None, cls=DPOTrainer, config_cls=DPOConfig, **options):
    """Train and save each stage with a separate trainer, and return the trainers."""
    trainers = []
    options = {**OPTIONS, **mode_options(mode), **options}
    base, quantization = model, options.get("quantization_config")
    for number, stage in enumerate(stages or two_stages(), start=1):
        output_dir = Path(folder) / str(number)
        if number > 1 and "peft_config" in options:
            tokenizer = AutoTokenizer.from_pretrained(base)
            loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
            model = PeftModel.from_pretrained(loaded, model, is_trainable=True)
            names = ("peft_config", "quantization_config")
            options = {**{n: v for n, v in options.items() if n not in names}, "processing_class": tokenizer}
        trainer = make_trainer(model, output_dir, stage, cls, config_cls, **options)
        for name, parameter in trainer.model.named_parameters():
            if quantization is not None and ".ref." in name:  # else it stays in float32 and the loss is not ln 2
                parameter.data = parameter.data.bfloat16()
        trainer.train()
        trainer.save_model()
        trainers.append(trainer)
        model = str(output_dir)
    return trainers


def record_rows(trainer):
    """Record the rows of each optimizer step on this process, as `(global_step, tokens)`."""
    seen, compute_loss = [], trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        pairs = len(inputs["input_ids"]) // 2
        for ids, mask in zip(inputs["input_ids"][:pairs], inputs["attention_mask"][:pairs], strict=True):
            seen.append((trainer.state.global_step, tuple(ids[mask.bool()].tolist())))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    return seen


def check_rows(trainer, seen, repeated=0):
    """
    Check that each epoch of a stage trains on each of its rows once, and on `repeated` more that fill up batches.
    """
    for stage in trainer.stages:
        rows = [tuple(row["prompt_ids"] + row["chosen_ids"]) for row in stage.dataset]
        for epoch in range(stage.epochs):
            first = stage.first_update + epoch * stage.updates_per_epoch
            drawn = [row for update, row in seen if first <= update < first + stage.updates_per_epoch]
            assert set(drawn) == set(rows)
            assert len(drawn) == len(rows) + repeated
        assert {row[0] for row in seen} >= set(range(stage.first_update, stage.last_update))


def trained_weights(trainer):
    """Return the trained weights: those of the model, or of the policy adapter."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." not in n}
