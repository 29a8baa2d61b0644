"""Arguments of the command that shows pairs and solutions: inspect."""

import argparse
import os
import shutil
import sys
from math import inf
from pathlib import Path
from typing import Any

from .options import DTYPES, add_command, positive

# Options of StepDPOConfig that decide how a row becomes tokens
_TOKENS = ("prompt_suffix", "system_prompt", "prompt_template", "max_length")


def add_inspect_command(commands: Any) -> None:
    """
    Add the command.

    Args:
        commands (`argparse._SubParsersAction`):
            Where to.
    """
    what = "show a pair or a solution, and what its tokens are worth to policy and reference"
    parser = add_command(commands, "inspect", what, _inspect)
    parser.add_argument("source", metavar="FILE", help=".jsonl, .parquet, the folder of a run, or a data set's name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--row", type=_row, action="append", metavar="N", help="which, from 0; may be repeated (the first)"
    )
    which.add_argument("--solution", metavar="KEY", help="of a run, by its key")
    parser.add_argument("--split", help="of a data set that is no file (train)")
    models = parser.add_argument_group("log-probabilities")
    models.add_argument("--model", metavar="POLICY", help="id or folder of a model, or folder of an adapter")
    models.add_argument("--reference", metavar="REF", help="likewise (the base model of an adapter, otherwise none)")
    models.add_argument("--beta", type=float, help="factor of the implicit reward (0.1)")
    models.add_argument("--dtype", choices=DTYPES, help="of the weights (float32)")
    tokens = parser.add_argument_group("tokens, as in StepDPOConfig")
    tokens.add_argument("--tokenizer", metavar="NAME", help="show tokens without a model (that of the model)")
    tokens.add_argument("--prompt-suffix", metavar="TEXT")
    tokens.add_argument("--system-prompt", metavar="TEXT")
    tokens.add_argument("--prompt-template", metavar="TEXT")
    tokens.add_argument("--max-length", type=positive, metavar="N", help="(1024)")
    output = parser.add_argument_group("output")
    output.add_argument("--html", type=Path, metavar="PAGE", help="write a page instead")
    output.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    output.add_argument("--short", action="store_true", help="leave out the middle of long prefixes, and say so")


def _row(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a row, which count from 0")
    return int(text)


def _inspect(args: argparse.Namespace) -> None:
    _check(args)
    from ..inspection.example import Scoring
    from ..inspection.sources import is_run, read_pairs, read_run

    path, numbers = Path(args.source), args.row or []
    if args.solution is not None and not is_run(path):
        raise ValueError(f"--solution is for the folder of a run, and {args.source} is none. Choose with --row.")
    examples = (
        read_run(path, numbers, args.solution)
        if is_run(path)
        else read_pairs(args.source, args.split or "train", numbers)
    )
    scoring = Scoring()
    if args.model or args.tokenizer:
        examples, scoring = _score(args, examples)
    if args.html:
        from ..inspection.page import write_page

        args.html.write_text(write_page(examples, scoring, args.short), encoding="utf-8")
        print(f"Page: {args.html}")
        return
    from ..inspection.terminal import Terminal, wants_color

    width = shutil.get_terminal_size().columns
    try:
        print(Terminal(scoring, width, wants_color(args.color, sys.stdout), args.short).write(examples), flush=True)
    except BrokenPipeError:  # the pager was closed; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check(args: argparse.Namespace) -> None:
    """What has no effect, or cannot be written, is said before anything is loaded."""
    for name in ("reference", "dtype", "beta"):
        if getattr(args, name) is not None and not args.model:
            raise ValueError(f"--{name} needs --model: there are no log-probabilities without a policy.")
    idle = [name for name in _TOKENS if getattr(args, name) is not None]
    if idle and not (args.model or args.tokenizer):
        named = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ValueError(f"{named} decides on tokens, and there are none without --model or --tokenizer.")
    if args.beta is not None and not 0 < args.beta < inf:
        raise ValueError(f"--beta {args.beta} must be a number above 0.")
    if args.split is not None and Path(args.source).is_file():
        raise ValueError(f"--split {args.split}: {args.source} has no splits. Leave it out.")
    if args.html and args.html.is_dir():
        raise ValueError(f"--html {args.html} is a folder. Name a file in it.")
    if args.html and not args.html.parent.is_dir():
        raise ValueError(f"--html {args.html}: there is no folder {args.html.parent}. Make it, or name another.")


def _score(args: argparse.Namespace, examples: list[Any]) -> tuple[list[Any], Any]:
    from datasets.utils.logging import disable_progress_bar

    from ..generation.model_folders import adapter_base
    from ..inspection.example import Scoring
    from ..inspection.scores import RowEncoder, load_processing_class, score
    from ..step_dpo.config import StepDPOConfig

    disable_progress_bar()  # of rows, one at a time
    given = {name: getattr(args, name) for name in _TOKENS if getattr(args, name) is not None}
    config = StepDPOConfig("unused", bf16=False, report_to="none", **given)
    encode = RowEncoder(load_processing_class(args.tokenizer or args.model), config)
    examples = [encode(example) for example in examples]
    if not args.model:
        return examples, Scoring()
    dtype = args.dtype or "float32"
    reference = args.reference or adapter_base(args.model)
    if reference is not None:
        examples = score(examples, reference, "reference", dtype)
    return score(examples, args.model, "policy", dtype), Scoring(
        args.model, reference, 0.1 if args.beta is None else args.beta
    )
