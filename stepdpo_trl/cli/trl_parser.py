"""Parser of the training script. Imports TRL."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..step_dpo.config import StepDPOConfig
from .parsing import HelpFormatter
from .sdpo import SDPOArguments
from .train_help import own_options

# StepDPOConfig comes last: without a GPU it raises an error that would hide those of the others
DATACLASSES: Any = (ScriptArguments, ModelConfig, DatasetMixtureConfig, SDPOArguments, StepDPOConfig)
OptionCheck = Callable[[argparse.Namespace, Sequence[str], Sequence[str]], None]


class TrainParser(TrlParser):
    """
    `TrlParser` that checks all options before it creates the dataclasses.

    Args:
        check (`Callable`, *optional*):
            Called with the parsed options, and with the remaining arguments of the file and of the command line.
            Raises an error for unusable ones.
        **kwargs:
            Passed to `TrlParser`.
    """

    def __init__(self, check: OptionCheck | None = None, **kwargs: Any) -> None:
        super().__init__(DATACLASSES, formatter_class=HelpFormatter, **kwargs)
        self.check = check
        self._from_file: list[str] = []
        self.add_argument("--log_file", "--log-file", help="Append log messages to this file.")

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set defaults from a file and return its unknown options. Dashes in names are read as underscores."""
        self._from_file = super().set_defaults_with_config(**{k.replace("-", "_"): v for k, v in kwargs.items()})
        return self._from_file

    def parse_args_into_dataclasses(  # type: ignore[override]
        self, args: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Check the options, then create the dataclasses; see `HfArgumentParser`."""
        if self.check is not None:
            namespace, rest = self.parse_known_args(args)
            self.check(namespace, self._from_file, rest)
        return super().parse_args_into_dataclasses(args=args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        """Return the help, with the options of this project first."""
        own = {option.name for options in own_options().values() for option in options}
        if not any(group.title == "Options of stepdpo_trl" for group in self._action_groups):
            first = self.add_argument_group("Options of stepdpo_trl")
            for group in self._action_groups:
                if group is not first:
                    first._group_actions += [action for action in group._group_actions if action.dest in own]
                    group._group_actions[:] = [action for action in group._group_actions if action.dest not in own]
            self._action_groups.sort(key=lambda group: group is not first)
            self._optionals.title = "Options of TRL and transformers"
        return super().format_help()
