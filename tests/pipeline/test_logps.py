"""Log-probabilities of steps: against one sequence at a time, and how much is held in memory for them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl.pipeline.logps import add_logps
from stepdpo_trl.quickstart import MODEL_PATH

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
    """The most positions whose scores over the vocabulary, or log-probabilities, were in one tensor."""

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
def test_one_sequence_at_a_time_and_what_is_in_memory():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)
    rows = [dict(row) for row in ROWS]
    with Largest(model.config.vocab_size) as largest:
        add_logps(rows, str(MODEL_PATH), batch_size=4)
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
    assert longest_prefix > 4 * longest_step  # or the next would say nothing
    assert 0 < largest.logps <= longest_step  # one row at a time
    assert 0 < largest.scores <= 4 * 4 * longest_step  # of each of four rows where any of four has a step
