"""Generation with a fake vLLM, which returns its arguments and devices as text."""

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
            caching, revision = self.options["enable_prefix_caching"], self.options["revision"]
            seed, top_k = parameter.options["seed"], parameter.options["top_k"]
            text = f"{os.environ['CUDA_VISIBLE_DEVICES']} {seed} {caching} {revision} {top_k}"
            reason = "length" if parameter.options["seed"] == 3 else "stop"
            output = Box(text=text, finish_reason=reason, token_ids=[1, 2])
            answers.append(Box(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return answers
"""


def test_one_copy_per_gpu(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))  # for the worker processes
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(vllm, "BATCH", 2)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    generator = make_generator(ModelSpec(str(MODEL_PATH), "vllm", revision="v1"))
    text = generator.render("What is 1 + 2 * 3?", "Step 1:")
    requests = [Request(str(n), text, n) for n in range(9)]
    parts = list(generator.generate(requests, Sampling(0.5, 0.9, 7, 20), done={"1"}))
    answers = {request.key: answer for part in parts for request, answer in part}
    assert max(map(len, parts)) == 2
    assert set(answers) == set("02345678")
    assert {answer.text.split()[0] for answer in answers.values()} <= {"4", "6"}
    assert all(answer.text.split()[1:] == [key, "True", "v1", "20"] for key, answer in answers.items())
    assert {key for key, answer in answers.items() if answer.finish_reason == "length"} == {"3"}
    ids = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert {(answer.prompt_tokens, answer.tokens) for answer in answers.values()} == {(len(ids), 2)}
    workers = list(generator.pool._processes.values())
    del generator
    assert not any(worker.is_alive() for worker in workers)


def test_missing_package_or_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(GenerationError, match=r"stepdpo_trl\[vllm\]"):
        make_generator(ModelSpec(str(MODEL_PATH), "vllm"))
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(GenerationError, match="needs a GPU, but no GPU was found"):
        make_generator(ModelSpec(str(MODEL_PATH), "vllm"))
