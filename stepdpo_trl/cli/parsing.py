"""Parser of the commands: option names, one-line errors, and help."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

# Old names of options; with the prefix of another model too, as in `--judge-api-key-variable`
RENAMED = {
    "out": "output-dir",
    "to": "output-file",
    "wanted": "num-corrections",
    "most": "max-attempts",
    "k": "num-rollouts",
    "samples": "num-samples",
    "opening": "response-prefix",
    "against": "baseline",
    "per-problem": "max-pairs-per-problem",
    "api-key-variable": "api-key-env",
}
RESUME = "--resume does not exist: rerun the same command to resume."
WIDTH = 80
CLOSE = 0.75  # minimum similarity of a suggested option
_OPTION = re.compile(r"--[A-Za-z][\w-]*")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that fits 80 columns and prints each default once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, WIDTH) - 2)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.default is not None and action.default is not argparse.SUPPRESS
        if "(default" in text or not has_default or action.default is False or action.default == []:
            return text
        return f"{text} (default: %(default)s)"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


class CommandParser(argparse.ArgumentParser):
    """
    Parser of one command.

    Underscores in option names are read as dashes. An error is printed in one line, without the usage.

    Args:
        strict (`bool`, *optional*, defaults to `True`):
            Whether unknown arguments are an error. They are reported before missing ones, since a misspelled option
            is often the reason why a required one is missing.
        **kwargs:
            Passed to `argparse.ArgumentParser`.
    """

    def __init__(self, *, strict: bool = True, **kwargs: Any) -> None:
        kwargs = {"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs}
        super().__init__(**kwargs)
        self.strict = strict
        self._positionals.title, self._optionals.title = "Arguments", "General options"
        if self.add_help:
            self._option_string_actions["--help"].help = "Show this help and exit."

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments; see `argparse.ArgumentParser.parse_known_args`."""
        words = join_vllm_args(use_dashes(sys.argv[1:] if args is None else args, self._option_string_actions))
        if self.strict:
            for name in option_names(words):
                if name not in self._option_string_actions:
                    self.error(unknown_option(name, self._option_string_actions))
        namespace, rest = super().parse_known_args(words, namespace)
        if self.strict and rest:
            self.error(
                f"{rest[0]!r} does not belong to an option. Remove it, or quote the value that it is a part of."
            )
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        """Return the help. The usage lists required arguments only."""
        self.usage = self.usage or self._short_usage()
        self._action_groups.sort(key=lambda group: group is self._optionals)  # general options last
        return super().format_help()

    def _short_usage(self) -> str:
        words = [self.prog]
        for action in self._actions:
            value = str(action.metavar or action.dest.upper())
            if not action.option_strings:
                words.append(value)
            elif action.required:
                words.append(f"{action.option_strings[0]} {value}")
        return wrap_usage([*words, "[options]"])


def wrap_usage(words: Iterable[str]) -> str:
    """Join the parts of a usage line and wrap it between them."""
    protected = " ".join(word.replace(" ", "\0") for word in words)
    width = WIDTH - 2 - len("usage: ")
    lines = textwrap.wrap(protected, width, subsequent_indent=" " * 4, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ").replace("%", "%%")


def use_dashes(words: Iterable[str], known: Iterable[str]) -> list[str]:
    """Replace underscores in the names of known options by dashes, up to `--`."""
    known, normalized, stopped = set(known), [], False
    for word in words:
        stopped = stopped or word == "--"
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        normalized.append(dashed + equals + value if not stopped and name not in known and dashed in known else word)
    return normalized


def join_vllm_args(words: Iterable[str]) -> list[str]:
    """Join `--vllm-args` and its value with an equals sign, since the value begins with a dash like an option."""
    joined: list[str] = []
    option = re.compile(r"--(?:[a-z]+-)?vllm-args")
    stopped = False
    for word in words:
        stopped = stopped or word == "--"
        if not stopped and joined and option.fullmatch(joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def option_names(words: Iterable[str]) -> list[str]:
    """Return the names of the options in a command line, up to `--`."""
    names = []
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if _OPTION.fullmatch(name):
            names.append(name)
    return names


def unknown_option(name: str, known: Iterable[str]) -> str:
    """
    Return the error message for an unknown option.

    Args:
        name (`str`):
            The option, such as `"--ouput-dir"`.
        known (`Iterable[str]`):
            Options of the command.

    Returns:
        `str`: The new name of a renamed option, or a suggestion if a known option is close.
    """
    known = list(known)
    dashed = name.replace("_", "-")
    if dashed == "--resume":
        return RESUME
    for old, new in RENAMED.items():
        renamed = re.sub(rf"^--((?:[a-z]+-)?){old}$", rf"--\g<1>{new}", dashed)
        renamed = re.sub(r"^--against-", "--baseline-", renamed)
        if renamed != dashed and renamed in known:
            return f"{name} was renamed to {renamed}."
    near = get_close_matches(dashed, known, n=1, cutoff=CLOSE)
    return f"{name} is not a known argument.{f' Did you mean {near[0]}?' if near else ''}"
