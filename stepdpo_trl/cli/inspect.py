"""The command `inspect`: show pairs and solutions."""

import argparse
import os
import shutil
import sys
from math import inf
from pathlib import Path
from typing import Any

from .console import log_options
from .options import DTYPES, add_command, positive

# Options of StepDPOConfig that change the tokens of a row
_TOKENS = ("prompt_suffix", "system_prompt", "prompt_template", "max_length")


def add_inspect_command(commands: Any) -> None:
    """
    Add the command to the main parser.

    Args:
        commands (`argparse._SubParsersAction`):
            The subparsers of the main parser.
    """
    parser = add_command(
        commands,
        "inspect",
        "Show a step pair or a solution, with its tokens and log-probabilities.",
        _inspect,
        "Tokens need --model or --tokenizer, log-probabilities need --model.",
        "  stepdpo inspect pairs.jsonl --row 0 --model Qwen/Qwen2.5-0.5B-Instruct",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help=".jsonl or .parquet file, folder of a run, or dataset on the Hub."
    )
    group = parser.add_argument_group("Rows")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--row",
        type=_row,
        action="append",
        metavar="N",
        help="Row to show, counted from 0. Can be repeated. (default: the first)",
    )
    which.add_argument("--solution", metavar="KEY", help="Solution of a run to show, by its key.")
    group.add_argument("--split", metavar="NAME", help="Split of a dataset on the Hub. (default: train)")
    models = parser.add_argument_group("Log-probabilities")
    models.add_argument("--model", metavar="POLICY", help="Model id, folder of a model, or folder of an adapter.")
    models.add_argument(
        "--reference",
        metavar="REF",
        help="Reference model. (default: the base model of an adapter, otherwise none)",
    )
    models.add_argument("--beta", type=float, help="Beta of the implicit reward. (default: 0.1)")
    models.add_argument("--dtype", choices=DTYPES, help="Data type of the weights. (default: float32)")
    tokens = parser.add_argument_group("Tokens, as in StepDPOConfig")
    tokens.add_argument("--tokenizer", metavar="NAME", help="Show tokens without a model. (default: the model's)")
    tokens.add_argument("--prompt-suffix", metavar="TEXT", help="Text appended to prompts, or step-dpo.")
    tokens.add_argument("--system-prompt", metavar="TEXT", help="System message.")
    tokens.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="plain, alpaca, or a text with {prompt}. (default: the chat template)",
    )
    tokens.add_argument("--max-length", type=positive, metavar="N", help="Maximum number of tokens. (default: 1024)")
    output = parser.add_argument_group("Output")
    output.add_argument("--html", type=Path, metavar="FILE", help="Write an HTML page instead.")
    output.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="Use colors; auto does on a terminal."
    )
    output.add_argument("--short", action="store_true", help="Shorten long prefixes in the middle.")
    log_options(parser)


def _row(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a row, which is a whole number of at least 0")
    return int(text)


def _inspect(args: argparse.Namespace) -> None:
    _check(args)
    from ..inspection.example import Scoring
    from ..inspection.sources import is_run, read_pairs, read_run

    path, numbers = Path(args.source), args.row or []
    if args.solution is not None and not is_run(path):
        raise ValueError(f"--solution needs the folder of a run, and {args.source} is not one. Use --row.")
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
    except BrokenPipeError:  # the pager was closed: discard the rest of the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check(args: argparse.Namespace) -> None:
    """Refuse options without effect and files that cannot be written, before anything is loaded."""
    for name in ("reference", "dtype", "beta"):
        if getattr(args, name) is not None and not args.model:
            raise ValueError(f"--{name} needs --model: there are no log-probabilities without a policy.")
    unused = [name for name in _TOKENS if getattr(args, name) is not None]
    if unused and not (args.model or args.tokenizer):
        named = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise ValueError(f"{named} changes tokens, which need --model or --tokenizer. Pass one of them.")
    if args.beta is not None and not 0 < args.beta < inf:
        raise ValueError(f"--beta {args.beta} must be a number above 0.")
    if args.split is not None and Path(args.source).is_file():
        raise ValueError(f"--split {args.split}: {args.source} is a file and has no splits. Remove --split.")
    if args.html and args.html.is_dir():
        raise ValueError(f"--html {args.html} is a folder. Pass a file in it.")
    if args.html and not args.html.parent.is_dir():
        raise ValueError(f"--html {args.html}: there is no folder {args.html.parent}. Create it, or use another.")


def _score(args: argparse.Namespace, examples: list[Any]) -> tuple[list[Any], Any]:
    from datasets.utils.logging import disable_progress_bar

    from ..generation.model_folders import adapter_base
    from ..inspection.example import Scoring
    from ..inspection.scores import RowEncoder, load_processing_class, score
    from ..step_dpo.config import StepDPOConfig

    disable_progress_bar()  # each row is tokenized on its own
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
