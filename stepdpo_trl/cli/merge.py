"""The command `merge`: merge an adapter into its base model."""

import argparse
from pathlib import Path
from typing import Any

from ..runs.run_directory import RunError
from .console import log_options
from .options import add_command


def add_merge_command(commands: Any) -> None:
    """
    Add the command to the main parser.

    Args:
        commands (`argparse._SubParsersAction`):
            The subparsers of the main parser.
    """
    parser = add_command(
        commands,
        "merge",
        "Merge a PEFT adapter into its base model.",
        _merge,
        "The result can be loaded by every inference backend.",
        "  stepdpo merge outputs/step-dpo --output-dir outputs/step-dpo-merged",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="Folder of the adapter.")
    parser.add_argument_group("Output").add_argument(
        "--output-dir", required=True, metavar="DIR", type=Path, help="Folder of the merged model; must not exist."
    )
    log_options(parser)


def _merge(args: argparse.Namespace) -> None:
    from ..generation.merging import merge_adapter

    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise RunError(f"--output-dir {args.output_dir} exists and is not empty. Remove it, or pass another folder.")
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    merge_adapter(args.adapter, args.output_dir)
    print(f"Merged model: {args.output_dir}")
