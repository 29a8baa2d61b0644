"""The vLLM inference backend, tested with a fake `vllm` module: requests, devices and completions."""

import os
import sys
import types

import pytest

from stepdpo_trl.generation import GenerationError, ModelSpec, Request, Sampling, make_generator, vllm
from stepdpo_trl.quickstart import MODEL_PATH

STAND_IN = """
import os
from types import SimpleNamespace as Box

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class LLM:
    def __init__(self, **options):
        self.options = options

    def generate(self, prompts, parameters, use_tqdm):
        answers = []
        for prompt, parameter in zip(prompts, parameters, strict=True):
            caching = self.options["enable_prefix_caching"]
            text = f"{os.environ['CUDA_VISIBLE_DEVICES']} {parameter.options['seed']} {caching}"
            reason = "length" if parameter.options["seed"] == 3 else "stop"
            output = Box(text=text, finish_reason=reason, token_ids=[1, 2])
            answers.append(Box(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return answers
"""


def test_a_copy_on_each_gpu(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))  # for the worker processes
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(vllm, "BATCH", 2)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    generator = make_generator(ModelSpec(str(MODEL_PATH), "vllm"))
    text = generator.render("What is 1 + 2 * 3?", "Step 1:")
    requests = [Request(str(n), text, n) for n in range(9)]
    parts = list(generator.generate(requests, Sampling(0.5, 0.9, 7), done={"1"}))
    answers = {request.key: answer for part in parts for request, answer in part}
    assert max(map(len, parts)) == 2
    assert set(answers) == set("02345678")
    assert {answer.text.split()[0] for answer in answers.values()} <= {"4", "6"}
    assert all(answer.text.split()[1:] == [key, "True"] for key, answer in answers.items())
    assert {key for key, answer in answers.items() if answer.finish_reason == "length"} == {"3"}
    ids = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert {(answer.prompt_tokens, answer.tokens) for answer in answers.values()} == {(len(ids), 2)}
    workers = list(generator.pool._processes.values())
    del generator
    assert not any(worker.is_alive() for worker in workers)


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(GenerationError, match=r"stepdpo_trl\[vllm\]"):
        make_generator(ModelSpec(str(MODEL_PATH), "vllm"))
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(GenerationError, match="needs a GPU"):
        make_generator(ModelSpec(str(MODEL_PATH), "vllm"))
