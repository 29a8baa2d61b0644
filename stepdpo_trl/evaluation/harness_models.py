"""Models as lm-evaluation-harness uses them: in its own process, or at a server that its own client queries."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..generation import ModelSpec, Request, Sampling
from ..generation.protocol import DEFAULT_CONCURRENT_REQUESTS
from ..runs.run_directory import RunError

_TRIES = 10  # of a request to a server. The pauses of lm-evaluation-harness, up to 10 s, add up to a minute then
_TIMEOUT = 600  # seconds for one answer, as for `--problems`

logger = logging.getLogger(__name__)


@contextmanager
def naming_the_task(name: str, model: ModelSpec) -> Iterator[None]:
    """
    Turn errors of lm-evaluation-harness at a server, such as those of its HTTP package, into one that names the task.

    Args:
        name (`str`):
            Name of the task.
        model (`ModelSpec`):
            The model.

    Raises:
        RunError: If an error is raised in the context, and the model is at a server.
    """
    try:
        yield
    except Exception as error:
        if model.backend == "transformers":
            raise
        first: BaseException = error  # its own handling of an error may fail and hide it
        while (earlier := first.__cause__ or first.__context__) is not None:
            first = earlier
        raise RunError(
            f"lm-evaluation-harness ended {name} with an error ({type(first).__name__}: {first}). Check the server, "
            "and rerun the same command to resume: completed answers are kept."
        ) from error


def connect(model: ModelSpec, batch_size: int | None, path: Path, resources: ExitStack) -> dict[str, Any]:
    """
    Return the arguments of `simple_evaluate` that describe a model, after a test of its server.

    Args:
        model (`ModelSpec`):
            The model.
        batch_size (`int`, *optional*):
            Number of sequences per batch, see [`model_arguments`].
        path (`Path`):
            Folder for the log of a server that vLLM starts.
        resources (`ExitStack`):
            Context that ends such a server, and restores the environment.

    Returns:
        `dict[str, Any]`: The arguments.

    Raises:
        GenerationError: If the server cannot be used.
        RunError: If lm-evaluation-harness cannot use the model.
    """
    if model.backend == "transformers":
        return model_arguments(model, batch_size)
    from ..generation.openai import OpenAIGenerator

    if model.backend == "vllm":
        from ..generation.vllm import VLLMGenerator
        from ..generation.vllm_command import one_server

        servers = VLLMGenerator(one_server(model), path)  # lm-evaluation-harness has one address
        resources.callback(servers.close)
        servers.prepare()
        (model,) = servers.server_specs()
    # Its errors name a wrong key, address or redirect, while lm-evaluation-harness would follow a redirect
    client = OpenAIGenerator(model)
    client.prepare()
    client.complete(Request("test", "1", 0), Sampling(0.0, 1.0, 1))
    # lm-evaluation-harness reads the key from there. A server that is started here must not get that of another one
    resources.enter_context(_environment("OPENAI_API_KEY", os.environ.get(model.api_key_env, "")))
    arguments = model_arguments(model, None)
    if client.max_length is None:
        logger.warning(
            f"The server at {model.base_url} does not say how many tokens a prompt may have. lm-evaluation-harness "
            "cuts few-shot prompts to 2,048 tokens."
        )
    else:
        arguments["model_args"]["max_length"] = client.max_length
    return arguments


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable until the context ends."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def model_arguments(model: ModelSpec, batch_size: int | None) -> dict[str, Any]:
    """
    Return the arguments of `simple_evaluate` that describe a model.

    Args:
        model (`ModelSpec`):
            The model.
        batch_size (`int`, *optional*):
            Number of sequences per batch, defaults to the largest that fits on a GPU, and to 1 on a CPU.

    Returns:
        `dict[str, Any]`: The arguments.

    Raises:
        RunError: If lm-evaluation-harness cannot use the model.
    """
    arguments: dict[str, Any]
    if model.backend == "openai":
        arguments = {
            "model": model.model,
            "base_url": f"{str(model.base_url).rstrip('/')}/completions",
            "num_concurrent": model.max_concurrent_requests or DEFAULT_CONCURRENT_REQUESTS,
            "max_retries": _TRIES,
            "timeout": _TIMEOUT,
            "tokenizer": model.tokenizer or model.model,
            # By default that of the server, if it has an endpoint for it, which adds a BOS token
            "tokenizer_backend": "huggingface",
        }
        return {"model": "local-completions", "model_args": arguments, "batch_size": 1}
    arguments = {"pretrained": model.model, "dtype": model.dtype}
    arguments |= {"tokenizer": model.tokenizer} if model.tokenizer else {}
    arguments |= {"revision": model.revision} if model.revision else {}
    if model.revision != model.tokenizer_revision:
        raise RunError(
            f"--revision {model.revision} and --tokenizer {model.tokenizer} cannot be combined with --tasks: "
            "lm-evaluation-harness would load that revision of the tokenizer as well. Remove --tokenizer."
        )
    from torch.cuda import is_available

    arguments |= {"peft": model.adapter} if model.adapter else {}
    # lm-eval defaults to a GPU, even where there is none
    device, default_batch_size = ("cuda", "auto") if is_available() else ("cpu", 1)
    return {"model": "hf", "model_args": arguments, "batch_size": batch_size or default_batch_size, "device": device}
