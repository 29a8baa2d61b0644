"""Standard benchmarks, handed over to lm-evaluation-harness with the right names and shots."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from ..generation import ModelSpec
from ..generation.protocol import DEFAULT_CONCURRENT_REQUESTS
from ..runs.run_directory import RunError


@dataclass(frozen=True)
class HarnessTask:
    """
    A task of lm-evaluation-harness.

    Args:
        name (`str`):
            Its name there.
        shots (`int`):
            Examples before each problem.
        metrics (`tuple[str, ...]`):
            What is reported, by its name there: metric and filter. The first one counts in means.
    """

    name: str
    shots: int
    metrics: tuple[str, ...]


HARNESS: dict[str, tuple[HarnessTask, ...]] = {
    # H4: the mean that SOLAR 10.7B (arXiv 2312.15166) and sDPO (arXiv 2403.19270, section 4.1) report, with the
    # shots and metrics of the Open LLM Leaderboard
    "h4": (
        HarnessTask("arc_challenge", 25, ("acc_norm,none",)),
        HarnessTask("hellaswag", 10, ("acc_norm,none",)),
        HarnessTask("mmlu", 5, ("acc,none",)),
        HarnessTask("truthfulqa_mc2", 0, ("acc,none",)),
    ),
    "gsm8k": (HarnessTask("gsm8k", 5, ("exact_match,strict-match", "exact_match,flexible-extract")),),
    "math": (HarnessTask("minerva_math", 4, ("exact_match,none", "math_verify,none")),),
}
KEPT_OF_A_SAMPLE = ("doc_id", "target", "filter", "filtered_resps")  # and its metrics; the rest is the data set


def evaluate_tasks(
    path: Path, names: Sequence[str], model: ModelSpec, batch_size: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """
    Run tasks of lm-evaluation-harness, each by a call of its `simple_evaluate`.

    Args:
        path (`Path`):
            Folder for `results.json`, the records of each task, and answers so far.
        names (`Sequence[str]`):
            Names in [`HARNESS`].
        model (`ModelSpec`):
            The model.
        batch_size (`int`, *optional*):
            Sequences at once. Defaults to what fits, on a GPU, and to 1 elsewhere.
        limit (`int`, *optional*):
            The first so many problems of each task.

    Returns:
        `dict[str, Any]`: What is in `results.json`.

    Raises:
        RunError: If a package is missing.
    """
    simple_evaluate = _simple_evaluate(names)
    from ..generation.chat import check_model
    from .evaluate import begin, identity, write_text

    check_model(model, template=False)  # tasks are texts to be continued, also by models without chat
    tasks = [task for name in dict.fromkeys(names) for task in HARNESS[name]]
    settings = {"tasks": [asdict(task) for task in tasks], "model": identity(model), "limit": limit}
    with begin(path, settings) as run:
        done = run.log("tasks")
        for task in tasks:
            if task.name in done:
                continue
            found = simple_evaluate(
                **handed_over(model, batch_size),
                tasks=[task.name],
                num_fewshot=task.shots,
                limit=limit,
                use_cache=str(path / f"answers.{task.name}"),  # goes on from there after a kill
            )
            missing = [metric for metric in task.metrics if metric not in found["results"][task.name]]
            if missing:
                raise RunError(
                    f"lm-evaluation-harness {version('lm-eval')} does not report {', '.join(missing)} for "
                    f"{task.name}; 0.4.11 does. Install that one."
                )
            write_text(path / f"records.{task.name}.jsonl", _records(found["samples"]))
            done.append(task.name, {"version": version("lm-eval"), "results": _figures(found["results"])})
        results: dict[str, Any] = {**settings, "results": {task.name: done[task.name] for task in tasks}}
        if "h4" in names:
            results["h4"] = fmean(done[task.name]["results"][task.name][task.metrics[0]] for task in HARNESS["h4"])
        write_text(path / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def handed_over(model: ModelSpec, batch_size: int | None) -> dict[str, Any]:
    """
    The arguments of `simple_evaluate` that describe a model.

    Raises:
        RunError: If lm-evaluation-harness cannot take it.
    """
    if model.backend == "openai":
        if model.api_key_env != "OPENAI_API_KEY":
            raise RunError(
                f"--api-key-env {model.api_key_env}: lm-evaluation-harness reads the key from "
                "OPENAI_API_KEY. Set that."
            )
        server: dict[str, Any] = {"base_url": f"{str(model.base_url).rstrip('/')}/completions"}
        server["num_concurrent"] = model.max_concurrent_requests or DEFAULT_CONCURRENT_REQUESTS
        arguments = {"model": model.model, **server, "tokenizer": model.tokenizer or model.model}
        return {"model": "local-completions", "model_args": arguments, "batch_size": 1}
    arguments = {"pretrained": model.model, "dtype": model.dtype}
    arguments |= {"tokenizer": model.tokenizer} if model.tokenizer else {}
    if model.backend == "vllm":
        return {"model": "vllm", "model_args": arguments, "batch_size": batch_size or "auto"}
    from torch.cuda import is_available

    arguments |= {"peft": model.adapter} if model.adapter else {}
    # It would take a GPU for granted
    device, fitting = ("cuda", "auto") if is_available() else ("cpu", 1)
    return {"model": "hf", "model_args": arguments, "batch_size": batch_size or fitting, "device": device}


def show_tasks(results: dict[str, Any]) -> str:
    """The figures, to be printed."""
    lines = [f"{'':<18}{'shots':>6}   {'metric':<30}accuracy, with standard error"]
    for task in results["tasks"]:
        found = results["results"][task["name"]]["results"][task["name"]]
        for metric in task["metrics"]:
            value, error = found[metric], found.get(metric.replace(",", "_stderr,"))
            shown = f"{value:.1%} ± {error:.1%}" if isinstance(error, float) else f"{value:.1%}"
            lines.append(f"{task['name']:<18}{task['shots']:>6}   {metric:<30}{shown}")
    lines += [f"{'H4 (mean)':<57}{results['h4']:.1%}"] if "h4" in results else []
    return "\n".join(lines)


def _simple_evaluate(names: Sequence[str]) -> Any:
    """What runs tasks, if all that they need is there."""
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise RunError(
            "--tasks are handed over to lm-evaluation-harness, which is missing. Install it: "
            "pip install 'stepdpo_trl[lm-eval]'"
        ) from error
    try:
        grammar = version("antlr4-python3-runtime")
    except PackageNotFoundError:
        grammar = "none"
    if "math" in names and not grammar.startswith("4.11"):
        raise RunError(
            f"--tasks math: lm-evaluation-harness reads answers with antlr4-python3-runtime 4.11, and {grammar} is "
            "installed. Install it: pip install 'lm-eval[math]'"
        )
    return simple_evaluate


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metrics of a task and its parts, without what cannot be written down."""
    return {
        name: {metric: value for metric, value in sorted(found.items()) if isinstance(value, (int, float, str))}
        for name, found in sorted(results.items())
    }


def _records(samples: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        {"task": task, **{name: sample[name] for name in (*KEPT_OF_A_SAMPLE, *sample["metrics"])}}
        for task, found in sorted(samples.items())
        for sample in found
    ]
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
