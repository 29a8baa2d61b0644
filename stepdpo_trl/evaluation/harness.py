"""Benchmarks of lm-evaluation-harness, run with the settings that the papers report."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.files import write_atomically
from ..generation import ModelSpec
from ..runs.run_directory import RunError
from .harness_models import connect, naming_the_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarnessTask:
    """
    Task, group or tag of lm-evaluation-harness.

    Args:
        name (`str`):
            Its name in lm-evaluation-harness.
        shots (`int`, *optional*):
            Number of few-shot examples, defaults to the number that lm-evaluation-harness configures.
        metrics (`tuple[str, ...]`, *optional*, defaults to `()`):
            Accuracies to print, as `"metric,filter"`. The first one enters the mean of a group. Empty for all metrics
            that lm-evaluation-harness reports.
    """

    name: str
    shots: int | None = None
    metrics: tuple[str, ...] = ()


# Groups of tasks that this package names. All other names are those of lm-evaluation-harness.
HARNESS: dict[str, tuple[HarnessTask, ...]] = {
    # H4: the mean reported for SOLAR 10.7B (arXiv 2312.15166) and sDPO (arXiv 2403.19270, section 4.1), with the
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
RECORD_FIELDS = ("doc_id", "target", "filter", "filtered_resps")  # kept with the metrics; the rest is in the dataset


def evaluate_tasks(
    path: Path,
    names: Sequence[str],
    model: ModelSpec,
    batch_size: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """
    Run tasks of lm-evaluation-harness, each with one call of its `simple_evaluate`.

    Args:
        path (`Path`):
            Output folder for `results.json`, the records of each task, and the answers so far.
        names (`Sequence[str]`):
            Names in [`HARNESS`], or tasks, groups and tags of the installed lm-evaluation-harness.
        model (`ModelSpec`):
            The model.
        batch_size (`int`, *optional*):
            Number of sequences per batch, defaults to the largest that fits on a GPU, and to 1 on a CPU.
        limit (`int`, *optional*):
            Number of problems of each task, from the first.
        num_fewshot (`int`, *optional*):
            Number of few-shot examples of all tasks, defaults to that of each task.

    Returns:
        `dict[str, Any]`: The content of `results.json`.

    Raises:
        RunError: If a package is missing, a task is not known, or the arguments contradict each other.
    """
    tasks = _tasks(names, num_fewshot)
    simple_evaluate = _load_simple_evaluate(names)
    from ..generation.chat import check_model
    from .evaluate import answers_name, identity, open_evaluation

    check_model(model, template=False)  # tasks are plain text to complete, so models without a chat template work too
    settings = {
        "tasks": [asdict(task) for task in tasks],
        "model": identity(model),
        "limit": limit,
        "num_fewshot": num_fewshot,
    }
    with open_evaluation(path, settings) as run, ExitStack() as resources:
        done = run.log("tasks")
        arguments: dict[str, Any] = {}
        for task in tasks:
            if task.name in done:
                continue
            arguments = arguments or connect(model, batch_size, path, resources)
            # Resumes an interrupted task. Named after the model, because lm-eval looks answers up by prompt alone
            cache = str(path / f"answers.{task.name}.{answers_name(model)}")
            with naming_the_task(task.name, model):
                found = simple_evaluate(
                    **arguments, tasks=[task.name], num_fewshot=task.shots, limit=limit, use_cache=cache
                )
            missing = [metric for metric in task.metrics if metric not in found["results"][task.name]]
            if missing:
                raise RunError(
                    f"lm-evaluation-harness {version('lm-eval')} does not report {', '.join(missing)} for "
                    f"{task.name}, but 0.4.11 does. Install that version: pip install lm-eval==0.4.11"
                )
            shots = {name: count or 0 for name, count in sorted(found.get("n-shot", {}).items())}
            _warn_fixed_shots(task, shots)
            write_atomically(path / f"records.{task.name}.jsonl", _records(found["samples"]))
            run.keep_settings("eval", settings)
            metrics = _serializable(found["results"])
            done.append(task.name, {"version": version("lm-eval"), "num_fewshot": shots, "results": metrics})
        results: dict[str, Any] = {**settings, "results": {task.name: done[task.name] for task in tasks}}
        if "h4" in names:
            results["h4"] = fmean(done[task.name]["results"][task.name][task.metrics[0]] for task in HARNESS["h4"])
        write_atomically(path / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def show_tasks(results: dict[str, Any]) -> str:
    """
    Format the results of lm-evaluation-harness for printing.

    Args:
        results (`dict[str, Any]`):
            The content of `results.json`.

    Returns:
        `str`: A table with one line per task and metric.
    """
    rows = [row for task in results["tasks"] for row in _rows(task, results["results"][task["name"]])]
    widths = [max([least, *(len(row[column]) for row in rows)]) for column, least in enumerate((18, 6, 30))]
    header = ("", "shots", "metric", "value ± standard error")
    lines = [
        f"{name:<{widths[0]}}{shots:>{widths[1]}}   {metric:<{widths[2]}}{value}"
        for name, shots, metric, value in (header, *rows)
    ]
    lines += [f"{'H4 (mean)':<{sum(widths) + 3}}{results['h4']:.1%}"] if "h4" in results else []
    return "\n".join(lines)


def _rows(task: dict[str, Any], done: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, shots, metric and value of each metric. Subtasks are listed only if the task has no metrics."""
    results, shots = done["results"], done["num_fewshot"]
    metrics = {name: task["metrics"] or _reported_metrics(result) for name, result in results.items()}
    for name in [task["name"]] if metrics.get(task["name"]) else results:
        used = sorted({shots[name]} if name in shots else set(shots.values()))
        used_range = "-".join(map(str, used[:1] + used[1:][-1:]))
        for metric in metrics[name]:
            value, error = results[name][metric], results[name].get(metric.replace(",", "_stderr,", 1))
            form = ".1%" if task["metrics"] else ".4f"  # other metrics need not be accuracies
            shown = f"{value:{form}} ± {error:{form}}" if isinstance(error, float) else f"{value:{form}}"
            yield f"{name}  ", used_range, f"{metric}  ", shown


def _reported_metrics(result: dict[str, Any]) -> list[str]:
    return [
        name for name, value in result.items() if "," in name and "_stderr," not in name and not isinstance(value, str)
    ]


def _tasks(names: Sequence[str], num_fewshot: int | None) -> list[HarnessTask]:
    """
    Return the tasks with these names, without duplicates.

    Raises:
        RunError: If `num_fewshot` is negative, or a task is named twice with different numbers of shots.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise RunError(f"--num-fewshot {num_fewshot} must be at least 0.")
    tasks: dict[str, HarnessTask] = {}
    for name in dict.fromkeys(names):
        for task in HARNESS.get(name, (HarnessTask(name),)):
            if num_fewshot is not None:
                task = replace(task, shots=num_fewshot)
            if tasks.setdefault(task.name, task).shots != task.shots:
                raise RunError(
                    f"--tasks {' '.join(names)} contains {task.name} twice, with different numbers of few-shot "
                    "examples. Set --num-fewshot, or evaluate one of them in another --output-dir."
                )
    return list(tasks.values())


def _warn_fixed_shots(task: HarnessTask, shots: dict[str, int]) -> None:
    """Warn if lm-evaluation-harness did not use the number of shots that was requested."""
    other = sorted({used for used in shots.values() if task.shots is not None and used != task.shots})
    if other:
        logger.warning(
            f"{task.name} was evaluated with {', '.join(map(str, other))} few-shot examples instead of {task.shots}: "
            "lm-evaluation-harness fixes the number of some tasks."
        )


def _load_simple_evaluate(names: Sequence[str]) -> Any:
    """Import `simple_evaluate`, and check that everything the tasks need is installed."""
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise RunError(
            "--tasks needs lm-evaluation-harness, which is not installed. Install it: "
            "pip install 'stepdpo_trl[lm-eval]'"
        ) from error
    _check_names([name for name in names if name not in HARNESS])
    try:
        antlr = version("antlr4-python3-runtime")
    except PackageNotFoundError:
        antlr = "none"
    if "math" in names and not antlr.startswith("4.11"):
        raise RunError(
            f"--tasks math: lm-evaluation-harness parses answers with antlr4-python3-runtime 4.11, but {antlr} is "
            "installed. Install it: pip install 'lm-eval[math]'"
        )
    return simple_evaluate


def _check_names(names: Sequence[str]) -> None:
    if not names:
        return  # the index of all tasks takes seconds to build
    from lm_eval.tasks import TaskManager

    known = {*HARNESS, *TaskManager().all_tasks}
    for name in names:
        if name not in known:
            nearest = get_close_matches(name, sorted(known), n=3)
            suggestion = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
            raise RunError(
                f"--tasks {name!r} is not a task of lm-evaluation-harness {version('lm-eval')}.{suggestion} Pass one "
                f"of {', '.join(HARNESS)}, or a name that `lm-eval ls tasks` lists."
            )


def _serializable(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Drop metrics that JSON cannot hold, and sort the rest."""
    return {
        name: {metric: value for metric, value in sorted(found.items()) if isinstance(value, (int, float, str))}
        for name, found in sorted(results.items())
    }


def _records(samples: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        {"task": task, **{name: sample[name] for name in (*RECORD_FIELDS, *sample["metrics"])}}
        for task, found in sorted(samples.items())
        for sample in found
    ]
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
