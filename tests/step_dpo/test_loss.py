import tempfile
from functools import cache

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ..reference_dpo import step_dpo_loss
from ..tiny import CHATML, TOKENIZERS, byte_level_tokenizer, character_tokenizer, step_rows, tiny_model
from ..training import BETA, make_trainer


@cache
def oracle_trainer(name):
    """Return a trainer whose reference model differs from its policy."""
    tokenizer = TOKENIZERS[name]()
    policy, reference = tiny_model(len(tokenizer), seed=1), tiny_model(len(tokenizer), seed=2)
    return make_trainer(policy, tempfile.mkdtemp(), ref_model=reference, processing_class=tokenizer)


def loss_and_gradients(trainer, rows):
    dataset = trainer._prepare_dataset(Dataset.from_list(rows), trainer.processing_class, trainer.args, "drawn")
    batch = trainer.data_collator(list(dataset))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return dataset, loss, {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


words = st.text(st.sampled_from(list("Step 12:=+\n the42.√é ")), max_size=25)
pairs = st.fixed_dictionaries(
    {
        "prompt": words.filter(bool),
        "initial_reason_steps": words,
        "chosen": words.map(lambda text: text + " yes"),
        "rejected": words.map(lambda text: text + " no"),
    }
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(pairs, min_size=1, max_size=4))
def test_loss_and_gradients_equal_equation_2(name, rows):
    trainer = oracle_trainer(name)
    dataset, loss, gradients = loss_and_gradients(trainer, rows)

    policy = tiny_model(len(trainer.processing_class), seed=1)
    reference = tiny_model(len(trainer.processing_class), seed=2)
    triples = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]
    expected = step_dpo_loss(policy, reference, triples, BETA)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for parameter_name, parameter in policy.named_parameters():
        torch.testing.assert_close(gradients[parameter_name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_masks_by_hand(tmp_path):
    # Token ids are positions in this string; <pad> is 10
    tokenizer = character_tokenizer("2+3\nS:=5 6")
    rows = [
        {"prompt": "2+3", "initial_reason_steps": "S:", "chosen": " =5 ", "rejected": "=6"},
        {"prompt": "3", "initial_reason_steps": "", "chosen": "5", "rejected": "6 6"},
    ]
    trainer = make_trainer(
        tiny_model(12), tmp_path, rows, ref_model=tiny_model(12), processing_class=tokenizer, max_length=10
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["input_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 8, 6, 7, 8],  # 2 + 3 \n S : | space = 5 space   chosen
        [2, 3, 7, 10, 10, 10, 10, 10, 10, 10],  # 3 \n | 5                  chosen
        [0, 1, 2, 3, 4, 5, 6, 9, 10, 10],  # 2 + 3 \n S : | = 6             rejected
        [2, 3, 9, 8, 9, 10, 10, 10, 10, 10],  # 3 \n | 6 space 6            rejected
    ]
    assert batch["completion_mask"].tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    ]


def test_padding_does_not_change_the_loss():
    trainer = oracle_trainer("chat")
    rows = step_rows(6)
    _, together, gradients = loss_and_gradients(trainer, rows)
    singles = [loss_and_gradients(trainer, [row]) for row in rows]
    torch.testing.assert_close(together, torch.stack([loss for _, loss, _ in singles]).mean(), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        mean = torch.stack([single[name] for _, _, single in singles]).mean(0)
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)


LOSSES = [
    {"loss_type": loss_type, "label_smoothing": 0.1}
    for loss_type in [
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
        *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm"),
    ]
]
LOSSES += [
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
    {"use_weighting": True},
    {"ld_alpha": 0.5},
    {"precompute_ref_log_probs": True},
]


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(str(value) for value in options.values()))
def test_gradient_comes_only_from_step_tokens(options, tmp_path):
    """For every loss, the gradient is nonzero exactly at the positions that predict a token of a step."""
    tokenizer = byte_level_tokenizer(CHATML)
    policy, reference = tiny_model(len(tokenizer), 1), tiny_model(len(tokenizer), 2)
    # The small beta keeps losses such as hinge from saturating. Without sharing, there are prefix positions to check
    options = {"beta": 0.02, "shared_prefix": "off", **options}
    trainer = make_trainer(policy, tmp_path, step_rows(3), ref_model=reference, processing_class=tokenizer, **options)
    hidden_states = []
    trainer.model.base_model.register_forward_hook(lambda *call: hidden_states.append(call[-1].last_hidden_state))
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, hidden_states[0])
    has_gradient = gradient.abs().sum(-1) > 0
    predicts_step_token = torch.nn.functional.pad(batch["completion_mask"][:, 1:], (0, 1)).bool()
    assert torch.equal(has_gradient, predicts_step_token)
