"""The command `eval`: measure accuracy."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.checkers import MATH, resolve_checker
from ..data.prompts import STEP_PROMPTS
from ..data.steps import AUTO, check_style
from ..evaluation.problems import PROBLEM_SETS, load_problems
from ..generation import ModelSpec, Sampling
from ..generation.model_folders import adapter_base
from ..pipeline.policy import resolve_step_prompt
from ..runs.run_directory import RunError
from .dry_run import estimate_eval, show_servers
from .options import (
    OF_THE_FIRST_MODEL,
    add_command,
    log_and_dry_run_options,
    model_options,
    model_spec,
    positive,
    sampling_options,
    share_options,
    task_options,
    text_of,
)

# Not passed to argparse, so that options that do not work with --tasks are only rejected if they were passed
DEFAULTS: dict[str, Any] = {"prompt": "qwen2-boxed", "num_samples": 1, "temperature": 0.0, "top_p": 1.0}
DEFAULTS |= {"top_k": 0, "max_new_tokens": 1024, "seed": 0}
PROMPTS = {"arithmetic": "plain"}  # default prompts of problem sets, if not qwen2-boxed
EXAMPLE = """\
  stepdpo eval --problems gsm8k --model outputs/lora \\
      --baseline Qwen/Qwen2.5-7B-Instruct --num-samples 4 --temperature 0.7 \\
      --output-dir eval/gsm8k
To resume after an interruption, rerun the same command."""


def add_eval_command(commands: Any) -> None:
    """
    Add the command to the main parser.

    Args:
        commands (`argparse._SubParsersAction`):
            The subparsers of the main parser.
    """
    parser = add_command(
        commands,
        "eval",
        "Measure the accuracy of a model, or compare two models.",
        _eval,
        "Prints the mean accuracy over all samples, with a 95% interval, and with a baseline the difference with "
        "paired tests. Every answer is stored in the output folder, so that rerunning the same command resumes the "
        "evaluation.",
        EXAMPLE,
        usage="%(prog)s (--problems SET | --tasks TASK ...) --model MODEL\n    --output-dir DIR [options]",
    )
    group = parser.add_argument_group("Problems and output")
    what = group.add_mutually_exclusive_group(required=True)
    sets = ", ".join(PROBLEM_SETS)
    what.add_argument(
        "--problems",
        metavar="SET",
        help=f"One of {sets} (their test splits), or a .jsonl or .parquet file with the columns problem and answer "
        "(see --checker).",
    )
    what.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="h4, gsm8k, math, or any tasks of lm-evaluation-harness."
    )
    group.add_argument(
        "--output-dir", required=True, metavar="DIR", help="Folder for answers, results.json and records.jsonl."
    )
    group.add_argument("--limit", type=positive, metavar="N", help="Use the first N problems only.")
    group.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="Examples before each problem (with --tasks). (default: that of the task)",
    )
    _adapter(
        model_options(parser, "", "Model", "Model, or folder of a PEFT adapter on its base model.", required=True), ""
    )
    _adapter(
        model_options(
            parser,
            "baseline-",
            "Baseline",
            "Second model, to compare the first one with on the same problems. The options not given here are those "
            "of the first model; revision and adapter are not shared.",
            flag="--baseline",
            defaults=OF_THE_FIRST_MODEL,
        ),
        "baseline-",
    )
    group = parser.add_argument_group("Prompt (with --problems)")
    group.add_argument(
        "--prompt",
        metavar="PROMPT",
        help=f"{', '.join(STEP_PROMPTS)}, or a file with a Jinja template that contains {{{{ problem }}}}. (default: "
        "qwen2-boxed, and plain with --problems arithmetic)",
    )
    group.add_argument(
        "--response-prefix",
        metavar="TEXT",
        help="Text that every solution starts with, such as 'Step 1:'. (default: that of the named prompt)",
    )
    task_options(group)
    sampling_options(parser, DEFAULTS, num_samples=1, help_only=True)
    log_and_dry_run_options(parser)


def _adapter(group: Any, prefix: str) -> None:
    group.add_argument(
        f"--{prefix}adapter", metavar="DIR", help="Folder of a PEFT adapter to load on the model (transformers, vllm)."
    )


def _eval(args: argparse.Namespace) -> None:
    share_options(args, "baseline_")
    model, other = (_on_base(spec) for spec in (model_spec(args), model_spec(args, "baseline_", "--baseline")))
    assert model is not None
    if args.tasks and args.dry_run:
        raise RunError("--dry-run cannot count the problems of --tasks. Use it with --problems.")
    if args.tasks:
        _eval_tasks(args, model, other)
    else:
        _eval_problems(args, [model, other] if other else [model])


def _on_base(spec: ModelSpec | None) -> ModelSpec | None:
    """Replace an adapter that is passed as a model by its base model with the adapter."""
    base = adapter_base(spec.model) if spec and not spec.adapter and not spec.base_url else None
    return replace(spec, model=base, adapter=spec.model) if spec and base else spec


def _eval_tasks(args: argparse.Namespace, model: ModelSpec, other: ModelSpec | None) -> None:
    given = [name for name in (*DEFAULTS, "response_prefix") if getattr(args, name) is not None]
    given += ["baseline"] if other else []
    given += [name for name, value in (("checker", MATH.name), ("steps", AUTO)) if getattr(args, name) != value]
    if given:
        named = ", ".join("--" + name.replace("_", "-") for name in given)
        raise RunError(
            f"{named} cannot be used with --tasks: lm-evaluation-harness has its own prompts and sampling, and "
            "evaluates one model at a time. Remove it."
        )
    from ..evaluation.harness import evaluate_tasks, show_tasks

    path = Path(args.output_dir)
    results = evaluate_tasks(path, args.tasks, model, args.batch_size, args.limit, args.num_fewshot)
    print(f"{show_tasks(results)}\n\nResults and records: {args.output_dir}")


def _eval_problems(args: argparse.Namespace, models: list[ModelSpec]) -> None:
    if args.num_fewshot is not None:
        raise RunError(
            f"--num-fewshot {args.num_fewshot} has no effect with --problems. Use it with --tasks, or remove it."
        )
    options = {**DEFAULTS, "prompt": PROMPTS.get(args.problems, DEFAULTS["prompt"])}
    options |= {name: value for name, value in vars(args).items() if value is not None}
    for name in ("top_p", "top_k"):
        value = getattr(args, name)
        if value is not None and not options["temperature"]:
            option = "--" + name.replace("_", "-")
            raise RunError(f"{option} {value} has no effect at temperature 0. Remove it, or pass a --temperature.")
    sampling = Sampling(options["temperature"], options["top_p"], options["max_new_tokens"], options["top_k"])
    prompt = resolve_step_prompt(text_of(options["prompt"]), args.response_prefix)
    from ..evaluation.evaluate import check_comparison, evaluate
    from ..evaluation.results import table
    from ..pipeline.session import Session

    num_samples, seed = options["num_samples"], options["seed"]
    check_comparison(models, sampling, num_samples)
    checker, steps = resolve_checker(args.checker), check_style(args.steps)
    problems = load_problems(args.problems, args.limit, checker)
    if args.dry_run:
        names = [model.adapter or model.model for model in models]
        print(estimate_eval(len(problems), num_samples, names, sampling.max_new_tokens) + show_servers(models))
        return
    name = args.problems if args.problems in PROBLEM_SETS else Path(args.problems).stem
    path = Path(args.output_dir)
    with Session() as session:
        results = evaluate(session, path, name, problems, models, prompt, sampling, num_samples, seed, checker, steps)
    print(f"{table(results)}\n\nResults and records: {args.output_dir}")
