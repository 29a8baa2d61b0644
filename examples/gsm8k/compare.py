"""
Compare Step-DPO with other methods on GSM8K, from a model and problems to a table.

    python examples/gsm8k/compare.py
    python examples/gsm8k/compare.py --quick   # checks in about ten minutes that everything works

The model learns from its own mistakes: its solutions are sampled and corrected, every method is tuned with the same
number of trials on held-out training problems, and trained with the best setting. The test problems are used once per
trained model. All work is stored in the output folder. To resume after an interruption, rerun the same command.
README.md describes the methods and what a run costs.
"""

import argparse
import os
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.append(str(EXAMPLES))  # parts that are shared with other experiments
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from plan import FULL_RATES, LOOP, METHODS, RANDOM, STEP, Connection, Settings, quick_settings  # noqa: E402

from stepdpo_trl.cli.parsing import CommandParser  # noqa: E402

NAMES = (*METHODS, LOOP)


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    parser = CommandParser(prog="compare.py", description=__doc__)
    default = Settings()

    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    add("--output-dir", "folder of the comparison", type=Path, default=Path("outputs/gsm8k"), metavar="DIR")
    add("--model", f"model id or folder (default: {default.model})")
    add("--train", f"training problems: gsm8k or a file (default: {default.train})", metavar="SET")
    add("--test", f"test problems: gsm8k or a file (default: {default.test})", metavar="SET")
    add(
        "--held-out",
        f"training problems, from the last, that are used for tuning only (default: {default.held_out})",
        type=_count,
        metavar="N",
    )
    text = "existing run of `stepdpo data` to use instead of sampling; can be repeated"
    add("--run", text, action="append", metavar="DIR")
    add("--pairs", f"number of step pairs to train on (default: {default.pairs})", type=_count, metavar="N")
    add(
        "--methods",
        f"{', '.join(NAMES)} (default: all but {RANDOM})",
        nargs="+",
        choices=NAMES,
        metavar="METHOD",
        default=[name for name in NAMES if name != RANDOM],
    )
    add("--seeds", "number of training seeds", type=_count, metavar="N", default=2)
    add(
        "--rates",
        "learning rates to try (default: 3e-6 3e-5 3e-4, and with --full 1e-7 1e-6 1e-5)",
        type=_positive,
        nargs="+",
    )
    add("--betas", f"values of beta to try (default: {' '.join(map(str, default.betas))})", type=_positive, nargs="+")
    add("--epochs", f"number of epochs (default: {default.epochs:g})", type=_positive, metavar="N")
    add("--batch", f"number of pairs per update (default: {default.batch})", type=_count, metavar="N")
    add("--full", "train all weights instead of an adapter", action="store_true")
    add("--dtype", f"data type of the weights (default: {default.dtype})", choices=("bfloat16", "float32"))
    add("--backend", "inference backend (default: transformers)", choices=("transformers", "vllm"))
    add("--vllm-args", "arguments of `vllm serve` in one string", metavar="ARGS")
    add("--base-url", "server of the initial model, to sample its solutions", metavar="URL")
    add("--served-model", "name of the model on the server (default: that of --model)", metavar="NAME")
    add("--max-concurrent-requests", "requests sent to the server at the same time", type=_count, metavar="N")
    add("--quick", "small model, few problems: check that everything works", action="store_true")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Settings, Connection]:
    """
    Parse and validate the command line.

    Args:
        argv (`list[str]`, *optional*):
            The command line. Defaults to `sys.argv[1:]`.

    Returns:
        `tuple`: The arguments, the settings and the connection.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("served_model", "max_concurrent_requests"):
        if getattr(args, name) is not None and args.base_url is None:
            parser.error(
                f"--{name.replace('_', '-')} has no effect without --base-url. Pass the address of the server."
            )
    if args.vllm_args is not None and args.backend != "vllm":
        parser.error("--vllm-args needs --backend vllm.")
    if LOOP in args.methods and STEP not in args.methods:
        parser.error(f"--methods: {LOOP} continues from {STEP}. Add {STEP}, or remove {LOOP}.")
    for run in args.run or ():
        if not Path(run).is_dir():
            parser.error(f"--run {run!r} is not a folder. Pass the --output-dir of `stepdpo data`.")
    settings = quick_settings(Settings()) if args.quick else Settings()
    names = ("model", "train", "test", "held_out", "pairs", "epochs", "batch", "dtype", "backend")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {name: tuple(value) for name in ("rates", "betas") if (value := getattr(args, name)) is not None}
    if args.full and args.rates is None:
        given["rates"] = FULL_RATES
    settings = replace(settings, **given, full=args.full, runs=tuple(args.run or ()))
    return args, settings, Connection(args.base_url, args.served_model, args.max_concurrent_requests, args.vllm_args)


def compare(args: argparse.Namespace, settings: Settings, connection: Connection) -> str:
    """
    Run what is left of the comparison.

    Args:
        args (`argparse.Namespace`):
            The arguments.
        settings (`Settings`):
            Settings that must stay the same.
        connection (`Connection`):
            Where models run.

    Returns:
        `str`: The tables.
    """
    import torch
    from data_stage import DataStage
    from report_stage import write_report
    from training_stage import TrainingStage
    from units import Units

    from stepdpo_trl.generation import ModelSpec
    from stepdpo_trl.generation.chat import check_model
    from stepdpo_trl.runs.run_directory import RunDirectory

    methods = [name for name in NAMES if name in args.methods]
    with RunDirectory(args.output_dir, create=True, inherited=True) as run:
        if "compare" not in run.settings():
            check_model(ModelSpec(settings.model))  # before the settings are stored
        run.keep_settings("compare", asdict(settings))
        data = DataStage(Units(run), settings, connection)
        data.make(methods)
        stage = TrainingStage(data, on_cpu=not torch.cuda.is_available())
        stage.evaluate_base()
        trained = [name for name in methods if name != LOOP]
        for name in trained:
            stage.tune(name)
        for seed in range(args.seeds):
            for name in trained:
                stage.train_best(name, seed)
        if LOOP in methods:
            stage.loop()
        return write_report(stage, methods, args.seeds)


def main() -> int:
    """Run the comparison, and return the exit status."""
    warnings.filterwarnings("ignore")
    args, settings, connection = parse_args()
    from stepdpo_trl.cli.interrupts import stoppable
    from stepdpo_trl.generation import GenerationError
    from stepdpo_trl.runs.run_directory import RunError

    with stoppable():
        try:
            text = compare(args, settings, connection)
        except (RunError, GenerationError, ValueError, OSError) as error:
            print(f"compare.py: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ncompare.py: interrupted. Rerun the same command to resume.", file=sys.stderr)
            return 130
    print(f"\n{text}\nTables, picture and changed solutions: {args.output_dir / 'report'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
