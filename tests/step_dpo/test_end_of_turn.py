"""DPOTrainer appends EOS to every step, which teaches the model to stop there. StepDPOTrainer does not."""

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from stepdpo_trl import StepDPOConfig, StepDPOTrainer

from ..tiny import byte_level_tokenizer, step_rows, tiny_model
from ..training import logged, make_trainer


@torch.no_grad()
def end_of_turn_log_prob(model, tokenizer, rows):
    """Return the mean log-probability of EOS directly after the preferred step and after the rejected step."""
    means = []
    for column in ("chosen", "rejected"):
        values = []
        for row in rows:
            text = f"{row['prompt']}\n{row['initial_reason_steps']}{row[column]}"
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
            values.append(torch.log_softmax(logits, -1)[tokenizer.eos_token_id])
        means.append(torch.stack(values).mean().item())
    return means


def change_by_training(cls, config_cls, rows, output_dir):
    tokenizer = byte_level_tokenizer()
    policy, reference = tiny_model(len(tokenizer), 1), tiny_model(len(tokenizer), 1)
    options = {"learning_rate": 1e-3, "optim": "adamw_torch", "num_train_epochs": 10}
    trainer = make_trainer(
        policy, output_dir, rows, cls, config_cls, ref_model=reference, processing_class=tokenizer, **options
    )
    before = end_of_turn_log_prob(policy, tokenizer, step_rows(16))
    trainer.train()
    after = end_of_turn_log_prob(policy, tokenizer, step_rows(16))
    return [b - a for a, b in zip(before, after, strict=True)], logged(trainer, "rewards/margins")[-1]


def test_only_dpo_trainer_teaches_the_model_to_stop_after_a_step(tmp_path):
    steps = Dataset.from_list(step_rows(16))
    # The same rows for DPOTrainer, with the prefix as part of the prompt
    plain = Dataset.from_list(
        [{**row, "prompt": f"{row['prompt']}\n{row['initial_reason_steps']}"} for row in step_rows(16)]
    ).select_columns(["prompt", "chosen", "rejected"])

    ours, our_margin = change_by_training(StepDPOTrainer, StepDPOConfig, steps, tmp_path)
    stock, stock_margin = change_by_training(DPOTrainer, DPOConfig, plain, tmp_path)
    assert min(our_margin, stock_margin) > 0.5  # both have learned the preference
    (ours_after_chosen, _), (stock_after_chosen, _) = ours, stock
    assert ours_after_chosen <= 0.0
    assert stock_after_chosen > 0.5  # stopping after a correct step has become 1.6 times as likely
