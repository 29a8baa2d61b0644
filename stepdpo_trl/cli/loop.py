"""The command `loop`. It also takes options of `stepdpo data`, and after `--` options of `stepdpo train`."""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

from ..generation.merging import merge_adapter
from ..generation.model_folders import fingerprint
from ..pipeline.loop import MODEL, PAIRS, RUN, TRAINING, run_loop
from ..runs.run_directory import RunError
from .console import log_options, logging_to
from .parsing import CommandParser, join_vllm_args, option_names, unknown_option, use_dashes

# Options that the loop sets for each stage
_OF_DATA = ("--output-dir", "--output-file", "--shard", "--model", "--seed", "--dry-run", "--corrections")
_OF_TRAINING = ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint")
EXAMPLE = """\
Example:
  stepdpo loop --model Qwen/Qwen2.5-7B-Instruct --problems problems.jsonl \\
      --output-dir loop --stages 3 --judge arithmetic,rollout \\
      -- --learning_rate 5e-7 --beta 0.4 --num_train_epochs 4
To resume after an interruption, rerun the same command."""


def make_parser() -> CommandParser:
    """Create the parser of the options that belong to neither `data` nor `train`."""
    parser = CommandParser(
        prog="stepdpo loop",
        usage="%(prog)s --model MODEL --problems SET --output-dir DIR\n"
        "    [option of `stepdpo data` ...] -- [option of `stepdpo train` ...]",
        description="Alternate between making step pairs and training on them. The pairs of each stage are sampled "
        "from the model of the previous stage, which is also the reference model. All options of `stepdpo data` are "
        "accepted before the `--`, and those of `stepdpo train` after it. On a rerun all options but --model and "
        "--seed may change; they apply to the parts that have not been started.",
        epilog=EXAMPLE,
        strict=False,
    )
    group = parser.add_argument_group("Loop")
    group.add_argument("--model", required=True, metavar="MODEL", help="Model to start from: id on the Hub or folder.")
    group.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="Folder of all stages.")
    group.add_argument(
        "--stages", type=int, default=3, metavar="N", help="Number of stages; can be increased on a rerun."
    )
    group.add_argument(
        "--seed", type=int, default=0, help="Random seed of the first stage; each stage adds one to it."
    )
    log_options(parser)
    return parser


def loop(argv: list[str]) -> None:
    """
    Run the loop. Each part runs in a separate process, which frees the GPU for the next one.

    Args:
        argv (`list[str]`):
            The command line after `stepdpo loop`.

    Raises:
        RunError: If an option is invalid, or a part fails.
    """
    place = argv.index("--") if "--" in argv else len(argv)
    parser, data_parser = make_parser(), _make_data_parser()
    known = {*parser._option_string_actions, *data_parser._option_string_actions}
    words, training = join_vllm_args(use_dashes(argv[:place], known)), argv[place + 1 :]
    for name in option_names(words):
        if name not in known:
            parser.error(unknown_option(name, known))
    args, data = parser.parse_known_args(words)
    if args.stages < 1:
        raise RunError(f"--stages {args.stages} must be at least 1.")
    _check_data(data_parser, data)
    _check_training(training)
    with logging_to(args.log_level, args.log_file):
        _loop(args, data, training)


def _loop(args: argparse.Namespace, data: list[str], training: list[str]) -> None:
    log_file = [] if args.log_file is None else ["--log-file", args.log_file]

    def make_pairs(number: int, model: str, folder: Path) -> None:
        where = ["--output-dir", str(folder / RUN), "--output-file", str(folder / PAIRS)]
        own = ["--model", model, "--seed", str(args.seed + number - 1), "--log-level", args.log_level, *log_file]
        _run(folder, ["data", *own, *where, *data])

    def train(number: int, model: str, folder: Path) -> None:
        output_dir = folder / TRAINING
        own = ["--model_name_or_path", model, "--dataset_name", str(folder / PAIRS), "--output_dir", str(output_dir)]
        _run(folder, ["train", *own, *_resume(output_dir), *log_file, *training])
        if (output_dir / "adapter_config.json").is_file():
            merge_adapter(output_dir, folder / MODEL)
        else:
            os.replace(output_dir, folder / MODEL)

    settings = {"model": args.model, "weights": fingerprint([args.model]), "seed": args.seed}
    run_loop(args.output_dir, args.model, args.stages, make_pairs, train, settings)
    print(f"{args.stages} stages done. The model is in {args.output_dir / f'stage-{args.stages}' / MODEL}.")


def _make_data_parser() -> CommandParser:
    from .data import add_commands

    commands = CommandParser(prog="stepdpo", strict=False).add_subparsers()
    add_commands(commands)
    parser: CommandParser = commands.choices["data"]
    parser.prog = "stepdpo loop"
    return parser


def _check_data(parser: CommandParser, argv: list[str]) -> None:
    """Check the options before `--`. Exits with the parser's message if one is invalid."""
    given = [name for name in _OF_DATA if name in option_names(argv)]
    if given:
        raise RunError(f"{', '.join(given)} cannot be given: the loop sets it for each stage. Remove it.")
    args = parser.parse_args([*argv, "--model", "M", "--output-dir", RUN, "--output-file", PAIRS])
    if args.base_url or args.backend == "openai":
        raise RunError(
            "--base-url cannot be used in the loop: a server would keep answering with the model that it has loaded. "
            "Remove it; the loop loads the model of each stage itself (--backend transformers or vllm)."
        )


def _check_training(argv: list[str]) -> None:
    """Check the options after `--`. Exits with the parser's message if one is invalid."""
    from .train_arguments import parse_arguments, split_joined

    names = [name.removeprefix("--").replace("-", "_") for name in option_names(argv)]
    given = [name for name in _OF_TRAINING if name in names]
    if given:
        named = ", ".join(f"--{name}" for name in given)
        raise RunError(f"{named} cannot be given: the loop sets it for each stage. Remove it.")
    own = ["--model_name_or_path", "M", "--dataset_name", "pairs", "--output_dir", TRAINING]
    (_, config, _, _, sdpo), _, _ = parse_arguments(
        [*split_joined(argv), *own], prog="stepdpo loop ... --", launcher=True
    )
    prompt_options = ("prompt_suffix", "system_prompt", "prompt_template")
    values = {**{name: getattr(config, name) for name in prompt_options}, "sdpo": sdpo.sdpo}
    given = [f"{name}={value!r}" for name, value in values.items() if value]
    if given:
        raise RunError(
            f"{', '.join(given)} cannot be used in the loop: its pairs contain the whole prompt, word for word "
            "(--prompt), and --stages sets its stages. Remove it."
        )


def _resume(output_dir: Path) -> list[str]:
    """Return the options that resume an interrupted training."""
    from ..sdpo.files import find_checkpoint

    try:
        return ["--resume_from_checkpoint", str(find_checkpoint(output_dir, True)[0])]
    except ValueError:  # no checkpoint yet
        return []


def _run(folder: Path, argv: list[str]) -> None:
    print(f"\n{folder.name}: stepdpo {shlex.join(argv)}", flush=True)
    status = run_process([sys.executable, "-m", "stepdpo_trl.cli.main", *argv])
    if status:
        raise RunError(
            f"{folder.name}: `stepdpo {argv[0]}` ended with status {status}; see its message above. Fix the "
            "cause and rerun the same command to resume. To restart it with other options, remove "
            f"{folder / TRAINING if argv[0] == 'train' else folder}."
        )


def run_process(command: list[str], output: IO[bytes] | None = None) -> int:
    """
    Run a command and return its status. It also stops at Ctrl-C or SIGTERM.

    Args:
        command (`list[str]`):
            The command. It inherits the lock of a folder that was opened with `inherited=True`.
        output (`IO[bytes]`, *optional*):
            File for its output. By default, it is printed.

    Returns:
        `int`: The exit status.
    """
    stderr = None if output is None else subprocess.STDOUT
    process = subprocess.Popen(command, close_fds=False, stdout=output, stderr=stderr)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # A training consists of several processes. A second signal has no effect on `stepdpo data`.
        children = _children(process.pid) if "train" in command else []
        for each in (*children, process):
            with contextlib.suppress(psutil.Error):
                each.terminate()
        process.wait()
        psutil.wait_procs(children, timeout=10)
        raise


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []
