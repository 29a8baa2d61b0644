"""Generation with vLLM: one copy of the model per GPU, each in its own worker process."""

import multiprocessing
import os
import weakref
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from .chat import load_tokenizer, render
from .protocol import Completion, GenerationError, ModelSpec, Request, Sampling

BATCH = 512  # requests per call of a worker, and so the most that a killed run loses per GPU

_engine: Any = None  # the `vllm.LLM` of a worker process


class VLLMGenerator:
    """
    Generator that runs a model in vLLM, with prefix caching.

    Args:
        spec (`ModelSpec`):
            The model.

    Raises:
        GenerationError: If vLLM is not installed, no GPU is found, or the tokenizer cannot be loaded.
    """

    def __init__(self, spec: ModelSpec) -> None:
        gpus = _gpus()
        self.tokenizer = load_tokenizer(spec.tokenizer or spec.model, revision=spec.tokenizer_revision)
        # `vllm.LLM` supports no data parallelism within one process
        context = multiprocessing.get_context("spawn")
        free = context.Queue()
        for gpu in gpus:
            free.put(gpu)
        self.copies = len(gpus)
        self.pool = ProcessPoolExecutor(len(gpus), context, initializer=_start, initargs=(free, spec))
        weakref.finalize(self, self.pool.shutdown)  # frees the GPUs for the next model

    def render(self, user: str, response_prefix: str) -> str:
        """Render a user message with the chat template, followed by the first words of the assistant's turn."""
        return render(self.tokenizer, [{"role": "user", "content": user}], response_prefix)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """Complete requests in large batches, see [`~stepdpo_trl.generation.Generator`]."""
        todo = [request for request in requests if request.key not in done]
        batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
        running: dict[Future[list[Completion]], list[Request]] = {}
        while batches or running:
            # One batch waits in the queue. More than one would delay the exit after an error.
            while batches and len(running) <= self.copies:
                batch = batches.pop(0)
                ids, seeds = [self._encode(request) for request in batch], [request.seed for request in batch]
                running[self.pool.submit(_complete, ids, seeds, sampling)] = batch
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield list(zip(running.pop(future), future.result(), strict=True))

    def _encode(self, request: Request) -> list[int]:
        prompt = request.prompt if isinstance(request.prompt, str) else render(self.tokenizer, request.prompt)
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]


def _gpus() -> list[str]:
    try:
        import torch
        import vllm  # noqa: F401
    except ImportError as error:
        raise GenerationError(
            "The inference backend 'vllm' requires the package vllm. Install it: pip install 'stepdpo_trl[vllm]'"
        ) from error
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if not gpus:
        raise GenerationError(
            "The inference backend 'vllm' needs a GPU, but no GPU was found. Use the backend 'transformers'."
        )
    return gpus


def _start(free: Any, spec: ModelSpec) -> None:
    """Load the model in a worker process, on the next free GPU."""
    global _engine
    os.environ["CUDA_VISIBLE_DEVICES"] = free.get()
    import vllm

    _engine = vllm.LLM(
        model=spec.model,
        tokenizer=spec.tokenizer,
        revision=spec.revision,
        tokenizer_revision=spec.tokenizer_revision,
        dtype=spec.dtype,
        enable_prefix_caching=True,
    )


def _complete(prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
    import vllm

    options = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
    }
    parameters = [vllm.SamplingParams(seed=seed, **options) for seed in seeds]
    outputs = _engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [_completion(output) for output in outputs]


def _completion(output: Any) -> Completion:
    answer = output.outputs[0]
    reason = "length" if answer.finish_reason == "length" else "stop"
    return Completion(answer.text, reason, len(output.prompt_token_ids), len(answer.token_ids))
