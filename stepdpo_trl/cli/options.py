"""What the commands share: how they are added, options of models, and how those are read."""

import argparse
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..generation import BACKENDS, ModelSpec
from ..runs.run_directory import RunError

DTYPES = ("auto", "float32", "bfloat16", "float16")

Handler = Callable[[argparse.Namespace], None]


def add_command(commands: Any, name: str, what: str, handler: Handler) -> argparse.ArgumentParser:
    """Add a command that does `what` by calling `handler`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what.capitalize() + ".",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(handler=handler, parser=parser)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments of commands added by [`add_command`]. For an unknown option the error names the nearest."""
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            args.parser.error(f"{word!r} belongs to no option")
        nearest = get_close_matches(name, args.parser._option_string_actions, n=1, cutoff=0.0)[0]
        args.parser.error(f"{name} is not a known argument. Did you mean {nearest}?")
    return args


def model_options(
    parser: argparse.ArgumentParser, prefix: str, what: str, given: bool = True, flag: str | None = None
) -> Any:
    """
    Add the options that describe a model.

    Args:
        parser (`argparse.ArgumentParser`):
            The command.
        prefix (`str`):
            What the options begin with; nothing for those of the first model.
        what (`str`):
            Title of the group.
        given (`bool`, *optional*, defaults to `True`):
            Whether the first model has to be named.
        flag (`str`, *optional*):
            The option that names the model, defaults to `--{prefix}model`.

    Returns:
        `argparse._ArgumentGroup`: The group.
    """
    group = parser.add_argument_group(what)
    group.add_argument(
        flag or f"--{prefix}model",
        dest=f"{prefix}model".replace("-", "_"),
        required=given and not prefix,
        metavar="MODEL",
        help="id or folder; its name at a server",
    )
    group.add_argument(f"--{prefix}backend", choices=BACKENDS, help="transformers, or openai with an address")
    group.add_argument(f"--{prefix}base-url", metavar="URL", help="OpenAI-compatible server: http://localhost:8000/v1")
    group.add_argument(f"--{prefix}tokenizer", help="tokenizer with the chat template (the model's)")
    group.add_argument(f"--{prefix}batch-size", type=positive, help="sequences, or requests to a server, at once (32)")
    group.add_argument(f"--{prefix}dtype", choices=DTYPES, help="data type of the weights (auto)")
    group.add_argument(f"--{prefix}api-key-env", metavar="NAME", help="environment variable (OPENAI_API_KEY)")
    return group


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def text_of(name_or_file: str) -> str:
    """
    A name, or what stands in a file.

    Raises:
        RunError: If there is no such file, or it holds no text.
    """
    path = Path(name_or_file)
    if not path.suffix or "{{" in name_or_file:
        return name_or_file
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}). Name a file with a template.") from error


def model_changes(args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """
    What was said of a model.

    Raises:
        RunError: If something of it has no effect.
    """
    names = ("model", "backend", "base_url", "tokenizer", "batch_size", "dtype", "api_key_env", "adapter")
    given = {name: getattr(args, f"{prefix}{name}", None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name, wrong in (("dtype", "base_url" in given), ("api_key_env", "base_url" not in given)):
        if wrong and name in given:
            where = "at a server, which has loaded its model" if name == "dtype" else "without a server (base-url)"
            raise RunError(f"--{prefix}{name} has no effect {where}. Leave it out.".replace("_", "-"))
    return {"backend": "openai", **given} if "base_url" in given else given


def model_spec(args: argparse.Namespace, prefix: str = "", flag: str | None = None) -> ModelSpec | None:
    """
    The model that is described; arguments as for [`model_options`], with `_` in the prefix.

    Raises:
        RunError: If it is described and not named.
    """
    given = model_changes(args, prefix)
    if not given:
        return None
    if "model" not in given:
        name = flag or f"--{prefix.replace('_', '-')}model"
        raise RunError(f"Options of a model are given ({', '.join(given)}), but not its name: {name}.")
    return ModelSpec(**given)
