"""Estimates of requests and tokens for `--dry-run`. No model is loaded."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from statistics import fmean

from ..data.answers import WRONG
from ..generation import ModelSpec
from ..pipeline.judges.expressions import canonical, parse_judges
from ..pipeline.names import model_file_name
from ..runs.run_directory import RunDirectory

# Assumptions for a run without solutions
TOKENS, STEPS, WRONG_SHARE = 400, 6, 0.3
JUDGE_TOKENS = 400  # per reply of the llm judge


@dataclass
class Measured:
    """
    Existing records of a run and its shards.

    Args:
        solutions (`int`):
            Number of solutions.
        wrong (`int`):
            Number of wrong solutions.
        steps (`list[int]`):
            Number of steps of each wrong solution.
        tokens (`list[int]`):
            Number of tokens of each completion.
        verdicts (`dict[str, int]`):
            Number of verdicts by judge expression.
        located (`dict[str, int]`):
            Number of verdicts that name a step.
        attempts (`dict[str, list[tuple[int, int]]]`):
            Number of corrections found and of samples for each solution, by name of the corrections.
        rollouts (`dict[str, int]`):
            Number of rollouts per prefix, by judge expression.
    """

    solutions: int
    wrong: int
    steps: list[int]
    tokens: list[int]
    verdicts: dict[str, int]
    located: dict[str, int]
    attempts: dict[str, list[tuple[int, int]]]
    rollouts: dict[str, int]


def measure(paths: Iterable[Path], may_be_missing: bool) -> Measured:
    """Count the existing records of a run."""
    found = Measured(0, 0, [], [], {}, {}, {}, {})
    for path in paths:
        if may_be_missing and not path.is_dir():
            continue
        with RunDirectory(path) as run:
            for record in run.log("solutions").values():
                found.solutions += 1
                if record["outcome"] == WRONG:
                    found.wrong += 1
                    found.steps.append(record["steps"])
            # Completions of collect only: rollouts and corrections are shorter than a whole solution
            completions = run.logs("generations").get("policy", {}).values()
            found.tokens += [r["tokens"] for r in completions if str(r.get("stage", "")).startswith("collect")]
            for name, log in run.logs("verdicts").items():
                found.verdicts[name] = found.verdicts.get(name, 0) + len(log)
                located = sum(record["step"] is not None for record in log.values())
                found.located[name] = found.located.get(name, 0) + located
            for name, log in run.logs("corrections").items():
                attempts = [(len(record["found"]), record["samples"]) for record in log.values()]
                found.attempts[name] = found.attempts.get(name, []) + attempts
            for stage, settings in run.settings().items():
                if "num_rollouts" in settings:
                    found.rollouts[stage.removeprefix("localize ")] = settings["num_rollouts"]
    return found


def estimate(args: argparse.Namespace, paths: Sequence[Path], stages: Sequence[str], problems: int = 0) -> str:
    """
    Estimate the cost of pipeline stages.

    Args:
        args (`argparse.Namespace`):
            Arguments of the command.
        paths (`list[Path]`):
            Folders of the run.
        stages (`list[str]`):
            `"collect"`, `"localize"` and `"rectify"`, those that the command runs.
        problems (`int`, *optional*, defaults to `0`):
            Number of problems, for `"collect"`.

    Returns:
        `str`: Counts, a table, and the assumptions.
    """
    found = measure(paths, may_be_missing="collect" in stages)
    limit = getattr(args, "max_new_tokens", TOKENS)
    tokens = fmean(found.tokens) if found.tokens else min(TOKENS, limit)
    steps = fmean(found.steps) if found.steps else STEPS
    counts, rows, wrong = [], [], found.wrong
    if "collect" in stages:
        if args.shard:
            problems = len(range(args.shard[0], problems, args.shard[1]))
        solutions = max(problems * args.num_samples, found.solutions)
        share = found.wrong / found.solutions if found.solutions else WRONG_SHARE
        wrong = round(solutions * share)
        counts += [("problems", problems), ("solutions", solutions)]
        rows.append(("collect", solutions - found.solutions, tokens))
    counts += [("solutions in the run", found.solutions), ("wrong solutions", wrong)]
    if "localize" in stages:
        judge = canonical(args.judge)
        judged = min(found.verdicts.get(judge, 0), wrong)
        requests, each = _judge_cost(args, steps, tokens)
        more = max(args.num_rollouts - found.rollouts[judge], 0) if judge in found.rollouts else 0
        again = _prefixes(steps) * more  # an earlier run with fewer rollouts is continued
        total = (wrong - judged) * requests + judged * again
        each = ((wrong - judged) * requests * each + judged * again * tokens / 2) / max(total, 1)
        rows.append(("localize", total, each))
    if "rectify" in stages:
        located, attempts = _located(args, found, wrong, also_localizes="localize" in stages)
        counts.append(("located solutions", located))
        requests = max(located - len(attempts), 0) * args.max_attempts
        requests += sum(
            max(args.max_attempts - samples, 0) for pairs, samples in attempts if pairs < args.num_corrections
        )
        rows.append(("rectify", requests, tokens / 2))
    return "\n".join(
        [
            "Dry run: no model is loaded.",
            "",
            *(f"{name:<22}{count:>14,}" for name, count in counts),
            "",
            f"{'':<12}{'requests':>12}{'tokens':>16}",
            *(f"{name:<12}{requests:>12,}{round(requests * each):>16,}" for name, requests, each in rows),
            "",
            *_assumptions(found, tokens, steps, stages),
        ]
    )


def _prefixes(steps: float) -> int:
    """Return the number of prefixes that get rollouts: the empty one, then a binary search over the steps."""
    return 1 + ceil(log2(max(steps, 2)))


def _judge_cost(args: argparse.Namespace, steps: float, tokens: float) -> tuple[int, float]:
    """Return the number of requests per wrong solution and the mean number of tokens per request."""
    costs = []
    for name in (name for group in parse_judges(args.judge) for name in group):
        if name == "rollout":
            costs.append((_prefixes(steps) * args.num_rollouts, tokens / 2))
        elif name == "llm":
            costs.append((args.votes, JUDGE_TOKENS))
        elif name == "prm":
            costs.append((1, 0.0))
    requests = sum(count for count, _ in costs)
    return requests, sum(count * each for count, each in costs) / max(requests, 1)


def _located(
    args: argparse.Namespace, found: Measured, wrong: int, also_localizes: bool
) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of located solutions, and the corrections and samples of those already rectified."""
    judge = canonical(args.judge) if args.judge else next(iter(found.verdicts), "")
    verdicts, located = found.verdicts.get(judge, 0), found.located.get(judge, 0)
    if also_localizes:
        located += max(wrong - verdicts, 0)
    name = f"{judge}.by-{model_file_name(args.rectifier_model)}" if args.rectifier_model else judge
    return located, found.attempts.get(name, [])


def _assumptions(found: Measured, tokens: float, steps: float, stages: Sequence[str]) -> list[str]:
    lines = [
        f"Tokens per solution: {tokens:.0f} ({'measured in this run' if found.tokens else 'assumed'}).",
        "Tokens are those that models write; prompts come on top.",
    ]
    if "collect" in stages and not found.solutions:
        lines.append(f"Wrong solutions: {WRONG_SHARE:.0%} assumed.")
    if "localize" in stages:
        lines += [
            f"Steps per solution: {steps:.1f} ({'measured in this run' if found.steps else 'assumed'}).",
            "localize is an upper bound: rollouts stop at the first right answer.",
        ]
    if "rectify" in stages:
        lines += [
            "rectify is an upper bound: it stops when there are enough corrections.",
            "Rollouts and corrections are half as long as a solution.",
        ]
    return lines


def estimate_eval(problems: int, num_samples: int, models: Sequence[str], max_new_tokens: int) -> str:
    """
    Estimate the cost of an evaluation.

    Args:
        problems (`int`):
            Number of problems.
        num_samples (`int`):
            Solutions per problem.
        models (`list[str]`):
            Names of the models.
        max_new_tokens (`int`):
            Maximum number of tokens per solution.

    Returns:
        `str`: Counts, a table, and the assumptions.
    """
    requests, tokens = problems * num_samples, min(TOKENS, max_new_tokens)
    width = max(12, *(len(name) + 2 for name in models))
    return "\n".join(
        [
            "Dry run: no model is loaded.",
            "",
            f"{'problems':<22}{problems:>14,}",
            f"{'solutions per problem':<22}{num_samples:>14,}",
            "",
            f"{'':<{width}}{'requests':>12}{'tokens':>16}",
            *(f"{name:<{width}}{requests:>12,}{requests * tokens:>16,}" for name in models),
            "",
            f"Tokens per solution: {tokens} (assumed; at most {max_new_tokens}).",
            "Tokens are those that models write; prompts come on top.",
            "Existing answers in the output folder are not requested again.",
        ]
    )


def show_servers(models: Iterable[ModelSpec]) -> str:
    """
    Return the command lines of the vLLM servers that a command would start.

    Args:
        models (`Iterable[ModelSpec]`):
            The models of the command.

    Returns:
        `str`: The lines, after an empty line. Empty without vLLM.
    """
    from ..generation.vllm_command import describe_servers

    started = dict.fromkeys(model for model in models if model.backend == "vllm")
    return "".join(f"\n\n{describe_servers(model)}" for model in started)
