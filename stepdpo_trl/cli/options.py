"""Options that several commands share."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.checkers import MATH
from ..data.steps import AUTO, STYLES
from ..generation import BACKENDS, ModelSpec
from ..generation.addresses import check_address
from ..runs.run_directory import RunError
from .console import log_options
from .parsing import CommandParser

DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_FIELDS = (
    "model",
    "revision",
    "backend",
    "base_url",
    "api_key_env",
    "max_concurrent_requests",
    "vllm_args",
    "tokenizer",
    "batch_size",
    "dtype",
    "adapter",
)
# Options of the first model that also apply to the second one, and those that need the same server
_SHARED = ("tokenizer", "batch_size", "dtype")
_OF_SERVERS = ("base_url", "api_key_env", "max_concurrent_requests", "vllm_args")

Handler = Callable[[argparse.Namespace], None]


def add_command(
    commands: Any, name: str, summary: str, handler: Handler, description: str = "", example: str = "", **kwargs: Any
) -> CommandParser:
    """
    Add a command.

    Args:
        commands (`argparse._SubParsersAction`):
            The subparsers of the main parser.
        name (`str`):
            Name of the command.
        summary (`str`):
            One sentence for the list of commands.
        handler (`Callable[[argparse.Namespace], None]`):
            Function that runs the command.
        description (`str`, *optional*):
            Sentences that follow the summary in the help of the command.
        example (`str`, *optional*):
            Command line shown at the end of the help.
        **kwargs:
            Passed to `argparse.ArgumentParser`.

    Returns:
        `CommandParser`: The parser of the command.
    """
    parser: CommandParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary} {description}".strip(),
        epilog=f"Example:\n{example}" if example else None,
        **kwargs,
    )
    parser.set_defaults(handler=handler)
    return parser


def log_and_dry_run_options(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run`, `--log-level` and `--log-file`."""
    parser.add_argument(
        "--dry-run", action="store_true", help="Print counts and an estimate of requests and tokens, and stop."
    )
    log_options(parser)


@dataclass(frozen=True)
class ModelDefaults:
    """
    Defaults shown in the help of the options of a model.

    Args:
        model, revision, backend, base_url, api_key_env, max_concurrent_requests (`str`):
            Text for the option of the same name. Empty if there is no default.
        vllm_args, tokenizer, batch_size, dtype (`str`):
            The same.
    """

    model: str = ""
    revision: str = ""
    backend: str = "transformers, or openai with a base URL"
    base_url: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    max_concurrent_requests: str = "32, and 256 with vllm"
    vllm_args: str = ""
    tokenizer: str = "the model's"
    batch_size: str = "32"
    dtype: str = "auto"


OF_THE_FIRST_MODEL = ModelDefaults(
    backend="that of --backend",
    base_url="that of --base-url",
    api_key_env="that of --api-key-env",
    max_concurrent_requests="that of --max-concurrent-requests",
    vllm_args="those of --vllm-args",
    tokenizer="that of --tokenizer",
    batch_size="that of --batch-size",
    dtype="that of --dtype",
)
OF_THE_RUN = ModelDefaults(
    model="as in collect",
    revision="as in collect",
    backend="as in collect",
    base_url="as in collect",
    api_key_env="as in collect",
    max_concurrent_requests="as in collect",
    vllm_args="as in collect",
    tokenizer="as in collect",
    dtype="as in collect",
)


def model_options(
    parser: argparse.ArgumentParser,
    prefix: str,
    title: str,
    description: str = "",
    required: bool = False,
    flag: str | None = None,
    defaults: ModelDefaults | None = None,
) -> Any:
    """
    Add the options of a model.

    Args:
        parser (`argparse.ArgumentParser`):
            Parser of the command.
        prefix (`str`):
            Prefix of the options, empty for the first model.
        title (`str`):
            Title of the group.
        description (`str`, *optional*):
            Description of the group.
        required (`bool`, *optional*, defaults to `False`):
            Whether the model must be passed.
        flag (`str`, *optional*):
            Option for the model itself, defaults to `--{prefix}model`.
        defaults (`ModelDefaults`, *optional*):
            Defaults shown in the help.

    Returns:
        `argparse._ArgumentGroup`: The group.
    """
    named = defaults or ModelDefaults()
    group = parser.add_argument_group(title, description or None)

    def add(name: str, text: str, option: str | None = None, **kwargs: Any) -> None:
        default = getattr(named, name)
        option = option or f"--{prefix}{name.replace('_', '-')}"
        group.add_argument(option, help=f"{text} (default: {default})" if default else text, **kwargs)

    add(
        "model",
        "Model id on the Hub, or folder. With a server, the name that it serves the model under.",
        flag,
        dest=f"{prefix}model".replace("-", "_"),
        required=required,
        metavar="MODEL",
    )
    add("revision", "Branch, tag or commit of the model on the Hub.", metavar="REVISION")
    add("backend", "Inference backend. vllm starts servers, and stops them at the end.", choices=BACKENDS)
    add("base_url", "OpenAI-compatible server, such as http://localhost:8000/v1.", metavar="URL", type=address)
    add("api_key_env", "Environment variable with the API key of the server.", metavar="NAME")
    add("max_concurrent_requests", "Requests sent to the server at the same time.", type=positive, metavar="N")
    add(
        "vllm_args",
        "Arguments of `vllm serve` in one string, such as '--tensor-parallel-size 4 --max-model-len 8192'.",
        metavar="ARGS",
    )
    add("tokenizer", "Tokenizer with the chat template.", metavar="NAME")
    add("batch_size", "Sequences per batch of the transformers backend.", type=positive, metavar="N")
    add("dtype", "Data type of the weights.", choices=DTYPES)
    return group


def sampling_options(
    parser: argparse.ArgumentParser, defaults: dict[str, Any], num_samples: int, help_only: bool
) -> None:
    """
    Add the options of sampling.

    Args:
        parser (`argparse.ArgumentParser`):
            Parser of the command.
        defaults (`dict[str, Any]`):
            Default of each option of [`~stepdpo_trl.generation.Sampling`], and `"seed"`.
        num_samples (`int`):
            Default of `--num-samples`.
        help_only (`bool`):
            Whether to show the defaults in the help only. The parsed values are then `None` if not passed.
    """
    group = parser.add_argument_group("Sampling")

    def add(name: str, text: str, default: Any, **kwargs: Any) -> None:
        named = {"help": f"{text} (default: {default:g})"} if help_only else {"help": text, "default": default}
        group.add_argument(f"--{name.replace('_', '-')}", **named, **kwargs)

    add("num_samples", "Solutions sampled per problem.", num_samples, type=positive, metavar="N")
    add("temperature", "Sampling temperature; 0 is greedy decoding.", defaults["temperature"], type=float)
    add("top_p", "Share of the probability mass to sample from.", defaults["top_p"], type=float)
    add("top_k", "Number of most likely tokens to sample from; 0 for all.", defaults["top_k"], type=int)
    add("max_new_tokens", "Maximum number of tokens of a solution.", defaults["max_new_tokens"], type=int, metavar="N")
    add("seed", "Random seed.", defaults["seed"], type=int)


def task_options(group: Any) -> None:
    """Add the options that say what a solution is: how it is checked and split into steps."""
    group.add_argument(
        "--checker",
        default=MATH.name,
        metavar="CHECKER",
        help="math, exact (text) or choice (A to E) compare the final answer with the column answer. FILE.py:FUNCTION "
        "or package.module:FUNCTION is a function (problem: dict, solution: str) -> bool | None that receives the row "
        "and returns None for unreadable solutions.",
    )
    group.add_argument(
        "--steps",
        default=AUTO,
        metavar="STEPS",
        help=f"How solutions are split: {', '.join(STYLES)}, or a regular expression of the text that starts a step. "
        f"{AUTO} takes the first of these that finds two steps.",
    )


def address(text: str) -> str:
    """Parse the address of a server."""
    try:
        check_address(text)
    except ValueError as error:  # argparse would print the text, which may contain a password
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def judge_expression(text: str) -> str:
    """Parse a judge expression. Rejects `>`, which a shell reads as a redirection."""
    if ">" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} contains '>', which redirects the output in a shell. Use a comma: {text.replace('>', ',')!r}"
        )
    return text


def text_of(name_or_file: str) -> str:
    """
    Return a name unchanged, or the text of a file.

    Raises:
        RunError: If the file does not exist or is not UTF-8.
    """
    path = Path(name_or_file)
    if not path.suffix or "{{" in name_or_file:
        return name_or_file
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}). Pass a file with a template.") from error


def model_changes(args: argparse.Namespace, prefix: str = "", of_run: bool = False) -> dict[str, Any]:
    """
    Return the options of a model that were passed.

    Args:
        args (`argparse.Namespace`):
            The parsed arguments.
        prefix (`str`, *optional*, defaults to `""`):
            Prefix of the model's options, with underscores.
        of_run (`bool`, *optional*, defaults to `False`):
            Whether the options change the model of a run, which may already have the address of a server.

    Returns:
        `dict[str, Any]`: Values by the names of [`~stepdpo_trl.generation.ModelSpec`].

    Raises:
        RunError: If an option has no effect together with the others.
    """
    given = {name: getattr(args, f"{prefix}{name}", None) for name in MODEL_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    server = "base_url" in given
    reasons = {
        name: "at a server, which has loaded its model" for name in ("dtype", "revision", "vllm_args") if server
    }
    if server:
        limit = f"--{prefix}max-concurrent-requests".replace("_", "-")
        reasons["batch_size"] = f"at a server, which makes its own batches. To limit the requests, use {limit}"
    elif not of_run:
        without = f"without a server (--{prefix}base-url)".replace("_", "-")
        reasons["api_key_env"] = without
        if given.get("backend") != "vllm":
            reasons["max_concurrent_requests"] = without
            reasons["vllm_args"] = f"without --{prefix}backend vllm".replace("_", "-")
    for name, reason in reasons.items():
        if name in given:
            raise RunError(f"--{prefix}{name}".replace("_", "-") + f" has no effect {reason}. Remove it.")
    return {"backend": "openai", **given} if server else given


def model_spec(args: argparse.Namespace, prefix: str = "", flag: str | None = None) -> ModelSpec | None:
    """
    Return the description of a model.

    Args:
        args (`argparse.Namespace`):
            The parsed arguments.
        prefix (`str`, *optional*, defaults to `""`):
            Prefix of the model's options, with underscores.
        flag (`str`, *optional*):
            Option for the model itself, defaults to `--{prefix}model`.

    Returns:
        `ModelSpec`: The description, or `None` if no option of the model was passed.

    Raises:
        RunError: If options were passed, but not the model.
    """
    given = model_changes(args, prefix)
    if not given:
        return None
    if "model" not in given:
        name = flag or f"--{prefix.replace('_', '-')}model"
        raise RunError(f"Options of a model are given ({', '.join(given)}), but not its name: {name}.")
    return ModelSpec(**given)


def share_options(args: argparse.Namespace, prefix: str) -> None:
    """
    Apply options of the first model to another model that does not set them.

    Revision and adapter are never shared, the server only if backend and address are the same.

    Args:
        args (`argparse.Namespace`):
            The parsed arguments; changed in place.
        prefix (`str`):
            Prefix of the other model's options, with underscores.
    """
    first, other = ({name: getattr(args, f"{p}{name}", None) for name in MODEL_FIELDS} for p in ("", prefix))
    if other["model"] is None:
        return
    first["backend"] = first["backend"] or ("openai" if first["base_url"] else "transformers")
    backend = other["backend"] or ("openai" if other["base_url"] else first["backend"])
    shared = set(_SHARED)
    if backend == first["backend"] and other["base_url"] in (None, first["base_url"]):
        shared.update(_OF_SERVERS)
    if backend != "transformers":
        shared.discard("batch_size")
    if backend == "openai":
        shared.discard("dtype")
    for name in shared:
        if other[name] is None:
            setattr(args, f"{prefix}{name}", first[name])
    setattr(args, f"{prefix}backend", backend)
