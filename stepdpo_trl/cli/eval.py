"""Arguments of the command that measures accuracy: eval."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.prompts import STEP_PROMPTS
from ..evaluation.problems import PROBLEM_SETS, load_problems
from ..generation import ModelSpec, Sampling
from ..generation.model_folders import adapter_base
from ..pipeline.policy import resolve_step_prompt
from ..runs.run_directory import RunError
from .options import add_command, model_options, model_spec, positive, text_of

# What holds where nothing is said. Said options are told from these, as some go with --problems alone.
DEFAULTS: dict[str, Any] = {"prompt": "qwen2-boxed", "num_samples": 1, "temperature": 0.0, "top_p": 1.0}
DEFAULTS |= {"max_new_tokens": 1024, "seed": 0}
PROMPTS = {"arithmetic": "plain"}  # of known problems whose model was trained on another


def add_eval_command(commands: Any) -> None:
    """
    Add the command.

    Args:
        commands (`argparse._SubParsersAction`):
            Where to.
    """
    parser = add_command(commands, "eval", "measure the accuracy of a model, or compare two", _eval)
    what = parser.add_mutually_exclusive_group(required=True)
    sets = ", ".join(PROBLEM_SETS)
    what.add_argument("--problems", metavar="SET", help=f"{sets}, or JSON lines or Parquet: problem, answer")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="h4, gsm8k, math, or tasks of lm-evaluation-harness")
    parser.add_argument(
        "--output-dir", required=True, metavar="FOLDER", help="for answers, results.json, records.jsonl"
    )
    parser.add_argument("--limit", type=positive, help="the first so many problems")
    _adapter(model_options(parser, "", "the model"), "")
    _adapter(model_options(parser, "baseline-", "another one to compare it with", flag="--baseline"), "baseline-")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="few-shot examples (with --tasks)")
    group = parser.add_argument_group("what it is asked (with --problems)")
    group.add_argument("--prompt", help=f"{', '.join(STEP_PROMPTS)}, or a file with a Jinja template (qwen2-boxed)")
    group.add_argument(
        "--response-prefix", help="how every answer begins, such as 'Step 1:' (that of the named prompt)"
    )
    group.add_argument("--num-samples", type=positive, help="solutions of each problem (1)")
    group.add_argument("--temperature", type=float, help="(0: greedy)")
    group.add_argument("--top-p", type=float, help="(1)")
    group.add_argument("--max-new-tokens", type=int, help="(1024)")
    group.add_argument("--seed", type=int, help="(0)")


def _adapter(group: Any, prefix: str) -> None:
    group.add_argument(f"--{prefix}adapter", metavar="FOLDER", help="adapter of PEFT's on top (transformers)")


def _eval(args: argparse.Namespace) -> None:
    model, other = (_on_base(spec) for spec in (model_spec(args), model_spec(args, "baseline_", "--baseline")))
    assert model is not None
    if args.tasks:
        _eval_tasks(args, model, other)
    else:
        _eval_problems(args, [model, other] if other else [model])


def _on_base(spec: ModelSpec | None) -> ModelSpec | None:
    """An adapter that is named as a model, on its base model."""
    base = adapter_base(spec.model) if spec and not spec.adapter and not spec.base_url else None
    return replace(spec, model=base, adapter=spec.model) if spec and base else spec


def _eval_tasks(args: argparse.Namespace, model: ModelSpec, other: ModelSpec | None) -> None:
    said = [name for name in (*DEFAULTS, "response_prefix") if getattr(args, name) is not None] + ["baseline"] * bool(
        other
    )
    if said:
        named = ", ".join("--" + name.replace("_", "-") for name in said)
        raise RunError(
            f"{named} cannot go with --tasks: "
            "lm-evaluation-harness has its own prompts and sampling, and takes one model at a time. Leave them out."
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
    if args.top_p is not None and not options["temperature"]:
        raise RunError(f"--top-p {args.top_p} has no effect at temperature 0. Leave it out, or give a --temperature.")
    sampling = Sampling(options["temperature"], options["top_p"], options["max_new_tokens"])
    prompt = resolve_step_prompt(text_of(options["prompt"]), args.response_prefix)
    from ..evaluation.evaluate import check_comparison, evaluate
    from ..evaluation.results import table
    from ..pipeline.session import Session

    num_samples, seed = options["num_samples"], options["seed"]
    check_comparison(models, sampling, num_samples)
    problems = load_problems(args.problems, args.limit)
    name = args.problems if args.problems in PROBLEM_SETS else Path(args.problems).stem
    with Session() as session:
        results = evaluate(session, Path(args.output_dir), name, problems, models, prompt, sampling, num_samples, seed)
    print(f"{table(results)}\n\nResults and records: {args.output_dir}")
