"""Log-probabilities of steps: values and tokens against the trainer's, and memory."""

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl import StepDPOConfig, StepDPOTrainer
from stepdpo_trl.cli.data import _score
from stepdpo_trl.generation.transformers import TransformersGenerator
from stepdpo_trl.pipeline.logps import add_logps
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.run_directory import RunError
from stepdpo_trl.step_dpo.tokenization import StepTokenizer

from ..tiny import CHATML, byte_level_tokenizer, save_tiny_model, sentencepiece_tokenizer

ROWS = [
    {
        "prompt": "What is 7 + 2 * 4?",
        "initial_reason_steps": "Step 1: 2 * 4 = 8, leaving 7 + 8\n" * (10 + number // 2) + "Step 2:",
        "chosen": " 7 + 8 = 15" * (1 + number % 3),
        "rejected": " 7 + 8 = 16",
    }
    for number in range(6)
]


class Largest(TorchDispatchMode):
    """Largest number of positions whose logits, or log-probabilities, were in one tensor."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.scores, self.logps = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == self.vocabulary:
            positions = result.numel() // self.vocabulary
            self.scores = max(self.scores, positions)
            if function is torch.ops.aten._log_softmax.default:
                self.logps = max(self.logps, positions)
        return result


@torch.no_grad()
def test_values_and_memory():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)
    rows = [dict(row) for row in ROWS]
    with Largest(model.config.vocab_size) as largest:
        rows = list(add_logps(rows, model, StepTokenizer(tokenizer), batch_size=4))
    longest_prefix = longest_step = 0
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prefix = tokenizer(text + row["initial_reason_steps"], add_special_tokens=False)["input_ids"]
        longest_prefix = max(longest_prefix, len(prefix))
        for name in ("chosen", "rejected"):
            step = tokenizer(row[name], add_special_tokens=False)["input_ids"]
            longest_step = max(longest_step, len(step))
            logps = model(torch.tensor([prefix + step])).logits[0].log_softmax(-1)
            expected = sum(logps[len(prefix) + i - 1, token].item() for i, token in enumerate(step))
            assert row[f"{name}_logps"] == pytest.approx(expected, abs=1e-3)
    assert longest_prefix > 4 * longest_step  # or the next two lines would show nothing
    assert 0 < largest.logps <= longest_step  # one row at a time
    assert 0 < largest.scores <= 4 * 4 * longest_step  # for each of four rows, the positions of any step


@pytest.mark.parametrize("make_tokenizer", [sentencepiece_tokenizer, byte_level_tokenizer])
def test_tokens_are_those_of_the_trainer(make_tokenizer, tmp_path, monkeypatch):
    """`build --logps` sums over the tokens that the trainer labels, without an extra "▁" and with the end of turn."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    path = save_tiny_model(tmp_path / "model", tokenizer)
    rows = [
        {
            "prompt": "What is 12 + 30?",
            "initial_reason_steps": "Step 1:",
            "chosen": " 12 + 30 = 42",
            "rejected": " 12 + 30 = 41" + " therefore" * number,
            "chosen_ends_solution": number == 1,
            "rejected_ends_solution": False,
        }
        for number in range(3)
    ]
    args = StepDPOConfig(str(tmp_path), max_length=None, report_to="none", use_cpu=True, bf16=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = TransformersGenerator(model, tokenizer)
    monkeypatch.setattr(
        TransformersGenerator, "load", lambda spec: generator
    )  # AutoTokenizer would load another class
    trainer = StepDPOTrainer(path, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    rows = list(_score(path, rows))
    for row, ids in zip(rows, trainer.train_dataset, strict=True):
        for name in ("chosen", "rejected"):
            prefix, step = ids["prompt_ids"], ids[f"{name}_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([prefix + step])).logits[0].log_softmax(-1)
            expected = sum(logps[len(prefix) + i - 1, token].item() for i, token in enumerate(step))
            assert row[f"{name}_logps"] == pytest.approx(expected, abs=1e-3)


def test_log_probabilities_that_are_no_numbers():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(RunError, match=r"log-probability of a \w+ step is nan under the model '.*diverged"):
        list(add_logps([dict(ROWS[0])], model, StepTokenizer(tokenizer)))
