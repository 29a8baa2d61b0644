"""Options of the commands of the data pipeline."""

import argparse
import re
from typing import Any

from ..data.prompts import STEP_PROMPTS
from ..pipeline.judge_options import DEFAULT_CHECK
from ..pipeline.judges.expressions import JUDGES
from .console import log_options
from .options import (
    OF_THE_RUN,
    add_command,
    judge_expression,
    log_and_dry_run_options,
    model_options,
    positive,
    sampling_options,
    task_options,
)
from .problems import TRAINING_SETS

MODEL = "Qwen/Qwen2.5-7B-Instruct"
# Sampling of Step-DPO (arXiv 2406.18629, section 4.1)
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": 1024, "seed": 0}
_MOVED = "Needed if the model or its server has moved since."
_SEVERAL = "Needed if the run has several."

DATA = f"""\
  stepdpo data --model {MODEL} --problems problems.jsonl \\
      --output-dir run --output-file pairs.jsonl --judge arithmetic,rollout
The same with a model on a server:
  stepdpo data --model Qwen/Qwen2.5-72B-Instruct \\
      --base-url http://localhost:8000/v1 --problems problems.jsonl \\
      --output-dir run --output-file pairs.jsonl
To resume after an interruption, rerun the same command."""


def add_data(commands: Any, handler: Any) -> None:
    """Add `data`: all stages of the pipeline in one command."""
    parser = add_command(
        commands,
        "data",
        "Make step pairs: collect, localize, rectify and build in one command.",
        handler,
        "Every answer of a model is stored in the output folder, so that rerunning the same command resumes the run.",
        DATA,
    )
    _collect_options(parser)
    _run_options(parser, "--output-dir")
    _localize_options(parser)
    _rectify_options(parser)
    _build_options(parser)


def add_collect(commands: Any, handler: Any) -> None:
    """Add `collect`."""
    parser = add_command(
        commands,
        "collect",
        "Sample solutions of problems and check their answers.",
        handler,
        "The wrong solutions are the input of localize.",
        f"  stepdpo collect --model {MODEL} --problems problems.jsonl \\\n      --output-dir run",
    )
    _collect_options(parser)
    _run_options(parser, "--output-dir")


def add_localize(commands: Any, handler: Any) -> None:
    """Add `localize`."""
    parser = add_command(
        commands,
        "localize",
        "Find the first wrong step of each wrong solution.",
        handler,
        "A run can hold the verdicts of several judges.",
        "  stepdpo localize run --judge arithmetic,rollout",
    )
    _run_options(parser, "run")
    _localize_options(parser)
    model_options(parser, "", "Model that wrote the solutions", _MOVED, defaults=OF_THE_RUN)


def add_rectify(commands: Any, handler: Any) -> None:
    """Add `rectify`."""
    parser = add_command(
        commands,
        "rectify",
        "Sample corrections of the first wrong step until the answer is right.",
        handler,
        example="  stepdpo rectify run --num-corrections 2",
    )
    _run_options(parser, "run")
    _rectify_options(parser).add_argument(
        "--judge",
        type=judge_expression,
        metavar="JUDGES",
        help=f"Judge whose verdicts are corrected. {_SEVERAL}",
    )
    _judge_options(parser, parser.add_argument_group("Judges"))
    model_options(parser, "", "Model that wrote the solutions", _MOVED, defaults=OF_THE_RUN)


def add_build(commands: Any, handler: Any) -> None:
    """Add `build`."""
    parser = add_command(
        commands,
        "build",
        "Write the corrections of a run as a dataset of step pairs.",
        handler,
        "Duplicates and problems of test sets are left out.",
        "  stepdpo build run --output-file pairs.jsonl --exclude test.jsonl",
    )
    parser.add_argument("run", metavar="RUN", help="Folder of the run.")
    _build_options(parser)
    log_options(parser)


def add_report(commands: Any, handler: Any) -> None:
    """Add `report`."""
    parser = add_command(
        commands,
        "report",
        "Print counts and costs of a run, and write report.html.",
        handler,
        example="  stepdpo report run",
    )
    parser.add_argument("run", metavar="RUN", help="Folder of the run.")
    log_options(parser)


def add_import(commands: Any, handler: Any) -> None:
    """Add `import`."""
    parser = add_command(
        commands,
        "import",
        "Convert a published dataset to step pairs.",
        handler,
        example="  stepdpo import prm800k phase2_train.jsonl --output-file pairs.jsonl",
    )
    formats = ("prm800k", "math-shepherd", "processbench")
    parser.add_argument("format", choices=formats, metavar="FORMAT", help=f"One of {', '.join(formats)}.")
    parser.add_argument("file", metavar="FILE", help="The file as published.")
    group = parser.add_argument_group("Output")
    _output_file(group)
    group.add_argument(
        "--cases", action="store_true", help="Write solutions with their first wrong step, to test judges on."
    )
    log_options(parser)


def _run_options(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("Run") if name.startswith("--") else parser
    required = {"required": True} if name.startswith("--") else {}
    help_text = "Folder of the run; created if missing, resumed if not." if required else "Folder of the run."
    group.add_argument(name, metavar="DIR" if required else "RUN", help=help_text, **required)  # type: ignore[arg-type]
    group = group if required else parser.add_argument_group("Run")
    group.add_argument("--shard", type=_shard, metavar="I/N", help="Process part I of N only, counted from 0.")
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="Run here, or on the machines of a Ray cluster."
    )
    group.add_argument(
        "--shards", type=positive, default=1, metavar="N", help="With Ray, parts processed at the same time."
    )
    group.add_argument("--num-gpus", type=float, default=0, metavar="N", help="With Ray, GPUs per part.")
    log_and_dry_run_options(parser)


def _collect_options(parser: argparse.ArgumentParser) -> None:
    model_options(
        parser,
        "",
        "Model",
        "Model whose mistakes are collected and corrected, normally the one to train.",
        required=True,
    )
    group = parser.add_argument_group("Problems and prompt")
    group.add_argument(
        "--problems",
        required=True,
        metavar="SET",
        help="A .jsonl or .parquet file with the columns problem and answer (see --checker), or the training split of "
        f"{' or '.join(TRAINING_SETS)}.",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="Use the first N problems only.")
    group.add_argument(
        "--prompt",
        default="qwen2-boxed",
        metavar="PROMPT",
        help=f"{', '.join(STEP_PROMPTS)}, or a file with a Jinja template that contains {{{{ problem }}}}.",
    )
    group.add_argument(
        "--response-prefix",
        metavar="TEXT",
        help="Text that every solution starts with, such as 'Step 1:'. (default: that of the named prompt)",
    )
    task_options(group)
    sampling_options(parser, SAMPLING, num_samples=2, help_only=False)


def _localize_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Judges")
    group.add_argument(
        "--judge",
        type=judge_expression,
        default="rollout",
        metavar="JUDGES",
        help=f"Judge of the first wrong step: {', '.join(JUDGES)}. Join judges that must agree with +, and "
        "fallbacks with a comma: arithmetic,rollout+llm asks the next judges if arithmetic abstains.",
    )
    group.add_argument(
        "--num-rollouts",
        type=positive,
        default=8,
        metavar="N",
        help="Maximum number of continuations sampled from a prefix (rollout).",
    )
    group.add_argument("--port", type=int, help="Port of the page for verdicts (human). (default: a free one)")
    _judge_options(parser, group)


def _judge_options(parser: argparse.ArgumentParser, group: Any) -> None:
    group.add_argument("--votes", type=positive, default=1, metavar="N", help="Replies that vote (llm).")
    group.add_argument(
        "--no-gold", action="store_true", help="Do not show the correct answer and solution to the judge (llm)."
    )
    group.add_argument(
        "--judge-prompt",
        metavar="FILE",
        help="Jinja template with problem, answer, solution and steps (llm). (default: built in)",
    )
    group.add_argument("--prm", metavar="MODEL", help="Process reward model, such as Qwen/Qwen2.5-Math-PRM-7B (prm).")
    group.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="Probability below which a step counts as wrong (prm).",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run code that comes with the process reward model (prm).",
    )
    model_options(parser, "judge-", "Model of the llm judge", "Required if llm is one of the judges.")


def _rectify_options(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("Corrections")
    group.add_argument(
        "--num-corrections", type=positive, default=1, metavar="N", help="Preferred steps per wrong solution."
    )
    group.add_argument(
        "--max-attempts",
        type=positive,
        default=20,
        metavar="N",
        help="Maximum number of continuations sampled per wrong solution.",
    )
    group.add_argument(
        "--check",
        type=judge_expression,
        default=DEFAULT_CHECK,
        metavar="JUDGES",
        help="Judges that must not reject a preferred step: arithmetic, llm, prm, a combination, or none. (default: "
        "arithmetic with --checker math, otherwise none)",
    )
    model_options(
        parser,
        "rectifier-",
        "Rectifier",
        "Another model to write the preferred steps. By default the model corrects itself.",
        flag="--rectifier",
    )
    return group


def _output_file(parser: Any) -> None:
    parser.add_argument(
        "--output-file",
        required=True,
        metavar="FILE",
        help="A .jsonl or .parquet file, or hub:USER/NAME for a private dataset on the Hub.",
    )


def _build_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Dataset")
    _output_file(group)
    group.add_argument("--corrections", metavar="NAME", help=f"Corrections to use. {_SEVERAL}")
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="FILE",
        help="File with the problems of a test set, which are left out. Can be repeated.",
    )
    group.add_argument(
        "--max-pairs-per-problem", type=positive, metavar="N", help="Maximum number of pairs per problem."
    )
    group.add_argument("--logps", metavar="MODEL", help="Add the log-probabilities of both steps under this model.")
    group.add_argument(
        "--license", type=_license, metavar="ID", help="License to state in the data card, such as apache-2.0."
    )


def _license(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a license identifier of the Hub, such as apache-2.0")
    return text


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I below N, such as 0/4")
    return int(match[1]), int(match[2])
