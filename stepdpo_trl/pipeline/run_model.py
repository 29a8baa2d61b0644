"""The model that wrote the solutions of a run, as the run remembers it."""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any
from urllib.parse import urlsplit

from ..generation import ModelSpec
from ..generation.vllm_arguments import answer_arguments
from ..runs.run_directory import RunDirectory, RunError
from .collect import read_settings

logger = logging.getLogger(__name__)

# Fields of ModelSpec that do not change what the model answers: a run may continue with other values
_OPERATIONAL = ("base_url", "batch_size", "max_concurrent_requests", "api_key_env")
# Those that later stages use as well, unless they are passed
_KEPT = {
    "openai": ("base_url", "max_concurrent_requests", "api_key_env"),
    "vllm": ("max_concurrent_requests", "vllm_args"),
}


def model_settings(model: ModelSpec) -> dict[str, Any]:
    """
    Return the settings that the answers of a model depend on.

    Of `vllm_args`, these are the arguments that do not only concern hardware, memory and speed.

    Args:
        model (`ModelSpec`):
            The model.

    Returns:
        `dict[str, Any]`: Values by the names of `ModelSpec`.
    """
    settings = {field.name: getattr(model, field.name) for field in fields(model) if field.name not in _OPERATIONAL}
    return {**settings, "vllm_args": answer_arguments(model.vllm_args)}


def server_settings(model: ModelSpec) -> dict[str, Any] | None:
    """
    Return the settings of the server of a model that later stages use as well.

    Args:
        model (`ModelSpec`):
            The model.

    Returns:
        `dict[str, Any]` or `None`: Values by the names of `ModelSpec`. `None` for transformers.
    """
    if model.backend not in _KEPT:
        return None
    server = {name: getattr(model, name) for name in _KEPT[model.backend]}
    if model.api_key_env not in os.environ:  # may be a key that was passed by mistake
        server.pop("api_key_env", None)
    return server


def model_of_run(run: RunDirectory, changes: Mapping[str, Any] | None = None) -> ModelSpec:
    """
    Return the model that wrote the solutions of a run, at the same server.

    If another address is passed, the other settings of the server are kept, except for the API key of another host.

    Args:
        run (`RunDirectory`):
            The run.
        changes (`Mapping[str, Any]`, *optional*):
            Fields of `ModelSpec` that have changed since.

    Returns:
        `ModelSpec`: The model.

    Raises:
        RunError: If the run has no solutions, the address of its server is not known, or the arguments of vLLM change
            the answers of the model.
    """
    settings, changes = run.settings(), changes or {}
    stored = read_settings(run)["model"]
    model = {**stored, **changes}
    server = settings.get("server", {}) if model["backend"] == stored["backend"] else {}
    if model["backend"] != "vllm" and "vllm_args" not in changes:
        model["vllm_args"] = None
    if model["backend"] == "openai":
        if "base_url" not in {**server, **changes}:
            raise RunError(
                f"The solutions in {run.path} were sampled from a server, but its address is not in the run. Pass "
                "it as --base-url."
            )
        model = {**_kept_settings(run, server, changes), **model}
    elif model["backend"] == "vllm" and stored["backend"] == "vllm":
        _check_arguments(run, stored.get("vllm_args"), changes)
        model = {**stored, **server, **changes}
    return replace(ModelSpec("", "transformers"), **model)


def _kept_settings(run: RunDirectory, server: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's server that still apply, and say which server is used."""
    kept, key = dict(server), ""
    old, new = server.get("base_url"), changes.get("base_url")
    if new is None:
        logger.warning(f"{run.path}: using the server at {old}, as in `collect`. Pass --base-url to use another one.")
        return kept
    if old in (None, new):
        return kept
    if _host(new) != _host(old) and "api_key_env" not in changes:
        variable = kept.pop("api_key_env", ModelSpec.api_key_env)
        if variable != ModelSpec.api_key_env:
            key = f" The API key in {variable} is not sent to this host, unless you pass --api-key-env {variable}."
        if os.environ.get(ModelSpec.api_key_env):
            key += f" The API key in {ModelSpec.api_key_env} is sent to it."
    logger.warning(f"{run.path}: using the server at {new} instead of {old}.{key}")
    return kept


def _host(address: str) -> tuple[str, str | None]:
    url = urlsplit(address)
    return url.scheme, url.hostname


def _check_arguments(run: RunDirectory, stored: str | None, changes: Mapping[str, Any]) -> None:
    if "vllm_args" in changes and (now := answer_arguments(changes["vllm_args"])) != stored:
        raise RunError(
            f"--vllm-args differ from those of `collect` in {run.path}: {stored or 'none'} there, {now or 'none'} "
            "now, without those for hardware and speed. The answers of the model may depend on them. Pass those of "
            "`collect`, or use another folder."
        )
