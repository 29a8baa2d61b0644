"""The command `env`: versions and devices, for bug reports."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__
from .console import log_options
from .options import add_command

PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "vllm",
    "openai",
    "lm-eval",
    "ray",
)


def add_env_command(commands: Any) -> None:
    """
    Add the command to the main parser.

    Args:
        commands (`argparse._SubParsersAction`):
            The subparsers of the main parser.
    """
    parser = add_command(
        commands,
        "env",
        "Print versions and devices, for bug reports.",
        _env,
        example="  stepdpo env",
    )
    log_options(parser)


def _env(args: argparse.Namespace) -> None:
    rows = [("stepdpo_trl", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows += _devices()
    print("\n".join(f"{name:<14}{value}" for name, value in rows))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("devices", f"unknown: torch cannot be imported ({error})")]
    if not torch.cuda.is_available():
        return [("cuda", "not available"), ("devices", f"cpu ({torch.get_num_threads()} threads)")]
    rows = [("cuda", str(torch.version.cuda))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"device {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return rows
