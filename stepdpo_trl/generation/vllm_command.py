"""The command lines of the vLLM servers of a model, with its tokenizer and its LoRA adapter."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .model_folders import adapter_base
from .protocol import GenerationError, ModelSpec
from .vllm_arguments import gpu_groups, parse_arguments, visible_gpus

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts


@dataclass(frozen=True)
class ServedModel:
    """
    A model as vLLM loads it.

    Args:
        base (`str`):
            Hub id or folder of the model.
        adapter (`str`, *optional*):
            Hub id or folder of a LoRA adapter.
        tokenizer (`str`):
            Hub id or folder of the tokenizer.
    """

    base: str
    adapter: str | None
    tokenizer: str

    @property
    def name(self) -> str:
        """Name of the model at the server."""
        return self.adapter or self.base


def served_model(spec: ModelSpec) -> ServedModel:
    """
    Return how vLLM loads a model. The folder of an adapter is served on its base model.

    Args:
        spec (`ModelSpec`):
            The model.

    Returns:
        `ServedModel`: Base model, adapter and tokenizer.
    """
    base = adapter_base(spec.model) if spec.adapter is None else None
    if base is None:
        return ServedModel(spec.model, spec.adapter, spec.tokenizer or spec.model)
    saved = (Path(spec.model) / "tokenizer_config.json").is_file()
    return ServedModel(base, spec.model, spec.tokenizer or (spec.model if saved else base))


def serve_command(spec: ModelSpec, port: int | str) -> list[str]:
    """
    Return the command line of a vLLM server.

    Args:
        spec (`ModelSpec`):
            The model.
        port (`int` or `str`):
            Port of the server.

    Returns:
        `list[str]`: The words of the command.

    Raises:
        GenerationError: If the adapter cannot be read, or is not a LoRA adapter.
    """
    model = served_model(spec)
    # Without `--generation-config vllm`, vLLM applies the penalties and filters of the model's generation_config.json
    # and so samples from another distribution than the one that is trained
    words = ["vllm", "serve", model.base, "--host", "127.0.0.1", "--port", str(port), "--dtype", spec.dtype]
    words += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    words += ["--tokenizer", model.tokenizer] if model.tokenizer != model.base else []
    words += ["--revision", spec.revision] if spec.revision else []
    words += ["--tokenizer-revision", spec.tokenizer_revision] if spec.tokenizer_revision else []
    if model.adapter is not None:
        module = json.dumps({"name": model.name, "path": model.adapter})
        words += ["--enable-lora", "--max-lora-rank", str(_rank(model.adapter)), "--lora-modules", module]
    return words + list(parse_arguments(spec.vllm_args).words)


def _rank(adapter: str) -> int:
    from peft import PeftConfig, PeftType

    try:
        config: Any = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise GenerationError(f"The adapter {adapter!r} cannot be loaded: {error}") from error
    if config.peft_type != PeftType.LORA:
        raise GenerationError(
            f"The adapter {adapter!r} is of type {PeftType(config.peft_type).value}, but vLLM loads LoRA adapters "
            "only. Merge it into its base model with `stepdpo merge`, and pass the merged model."
        )
    rank = max([config.r, *config.rank_pattern.values()])
    return next((most for most in _LORA_RANKS if most >= rank), rank)


def one_server(spec: ModelSpec) -> ModelSpec:
    """Return the model with arguments of vLLM for which one server uses all GPUs."""
    count = len(gpu_groups(parse_arguments(spec.vllm_args), visible_gpus()))
    if count == 1:
        return spec
    return replace(spec, vllm_args=f"{spec.vllm_args or ''} --data-parallel-size {count}".strip())


def describe_servers(spec: ModelSpec) -> str:
    """Return the command lines of the servers of a model, for `--dry-run`."""
    groups = gpu_groups(parse_arguments(spec.vllm_args), visible_gpus())
    command = shlex.join(serve_command(spec, "PORT"))
    lines = [f"CUDA_VISIBLE_DEVICES={','.join(group)} {command}" if group else command for group in groups]
    return "\n".join([f"vLLM servers of {spec.adapter or spec.model}: {len(lines)}", *lines])
