"""Training data of each method, from the same samples of the initial model."""

import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from experiment_parts import read_rows, write_rows
from sources import Rows, Sample

from stepdpo_trl.data.answers import RIGHT, WRONG

STEP_COLUMNS = ("prompt", "initial_reason_steps", "chosen", "rejected")
ENDS = ("chosen_ends_solution", "rejected_ends_solution")
# Finish reasons by the problem's id and the text of a solution
Endings = Mapping[tuple[str, str], str]


def draw(rows: Rows, count: int) -> Rows:
    """Draw rows at random, or return all of them in another order if there are not enough."""
    return random.Random(0).sample(rows, min(count, len(rows)))


def step_rows(pairs: Iterable[dict[str, Any]]) -> Rows:
    """Return the rows of Step-DPO."""
    return [{name: pair[name] for name in (*STEP_COLUMNS, *ENDS, "problem_id")} for pair in pairs]


def whole_rows(pairs: Iterable[dict[str, Any]], endings: Endings) -> Rows:
    """
    Return the rows of DPO on the whole solutions of step pairs, from the wrong step to the end.

    The common steps before are the context, as for Step-DPO. They would cancel in the loss.

    Args:
        pairs (`Iterable[dict]`):
            Step pairs.
        endings (`Mapping[tuple[str, str], str]`):
            Finish reasons. An end of turn is only trained where the model wrote one.

    Returns:
        `list[dict]`: The rows.
    """
    rows = []
    for pair in pairs:
        row = {name: pair[name] for name in ("prompt", "initial_reason_steps", "problem_id")}
        for which in ("chosen", "rejected"):
            rest = pair[f"full_{which}"]
            row[which] = rest
            row[f"{which}_ends_solution"] = endings[pair["problem_id"], row["initial_reason_steps"] + rest] == "stop"
        rows.append(row)
    return rows


def independent_rows(samples: Iterable[Sample]) -> Rows:
    """
    Pair right with wrong solutions of a problem, each used once.

    Args:
        samples (`Iterable[Sample]`):
            Solutions.

    Returns:
        `list[dict]`: The first pair of each problem, in random order, then the second ones, and so on.
    """
    right: dict[str, list[Sample]] = {}
    wrong: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem = {RIGHT: right, WRONG: wrong}.get(sample.solution.outcome)
        if by_problem is not None:
            by_problem.setdefault(sample.solution.problem.id, []).append(sample)
    problems = [key for key in right if key in wrong]
    random.Random(0).shuffle(problems)
    return list(
        _in_turns([_independent_row(*pair) for pair in zip(right[p], wrong[p], strict=False)] for p in problems)
    )


def _independent_row(right: Sample, wrong: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": right.prompt, "initial_reason_steps": right.prefix}
    for which, sample in (("chosen", right), ("rejected", wrong)):
        row[which] = sample.solution.text[len(sample.prefix) :]
        row[f"{which}_ends_solution"] = sample.solution.finish_reason == "stop"
    return {**row, "problem_id": right.solution.problem.id}


def right_rows(pairs: Rows, samples: Iterable[Sample], corrected: Iterable[tuple[str, str, str]], count: int) -> Rows:
    """
    Return the rows of SFT: complete right solutions of the problems of step pairs, without duplicates.

    Args:
        pairs (`list[dict]`):
            Step pairs.
        samples (`Iterable[Sample]`):
            Solutions.
        corrected (`Iterable[tuple[str, str, str]]`):
            Problem, text and finish reason of corrected solutions.
        count (`int`):
            Number of rows.

    Returns:
        `list[dict]`: Rows of the format prompt and completion. There are fewer if the model found fewer solutions.
    """
    texts: dict[str, dict[str, None]] = {pair["problem_id"]: {} for pair in pairs}  # in order, without duplicates
    prompts = {pair["problem_id"]: pair["prompt"] for pair in pairs}
    solutions = (sample.solution for sample in samples if sample.solution.outcome == RIGHT)
    found = ((solution.problem.id, solution.text, solution.finish_reason) for solution in solutions)
    for problem, text, finish_reason in (*corrected, *found):
        if problem in texts and finish_reason == "stop":
            texts[problem].setdefault(text)
    chosen = _in_turns([(problem, text) for text in own] for problem, own in texts.items())
    return [
        {
            "prompt": [{"role": "user", "content": prompts[problem]}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for problem, text in islice(chosen, count)
    ]


def _in_turns(groups: Iterable[Sequence[Any]]) -> Iterator[Any]:
    """Yield the first element of each group, then the second ones, and so on."""
    for turn in zip_longest(*groups):
        yield from (element for element in turn if element is not None)


def staged_rows(rows: Rows, gamma: Sequence[float]) -> Rows:
    """
    Return the rows of sDPO in two stages of equal size, those that the initial model finds easy first.

    Args:
        rows (`list[dict]`):
            Rows of Step-DPO.
        gamma (`Sequence[float]`):
            log p(chosen) - log p(rejected) of each row under the initial model.

    Returns:
        `list[dict]`: The rows with a column `stage`.
    """
    from datasets import Dataset

    from stepdpo_trl import split_stages

    stages = split_stages(Dataset.from_list(rows), "easy_to_hard", fractions=[0.5, 0.5], gamma=gamma)
    return [{**row, "stage": int(name)} for name, part in stages.items() for row in part]


def write_staged(source: Path, target: Path, model: str, dtype: str) -> None:
    """
    Measure gamma of the rows of Step-DPO and write the rows of sDPO.

    Args:
        source (`Path`):
            File of Step-DPO.
        target (`Path`):
            File of sDPO.
        model (`str`):
            The initial model.
        dtype (`str`):
            Data type of its weights.
    """
    import torch
    from datasets import Dataset

    from stepdpo_trl import StepDPOConfig, measure_gamma

    rows, on_cpu = read_rows(source), not torch.cuda.is_available()
    data = Dataset.from_list([{name: row[name] for name in (*STEP_COLUMNS, *ENDS)} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        args = StepDPOConfig(
            folder,
            model_init_kwargs={"dtype": dtype},
            per_device_train_batch_size=8,
            bf16=False,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            report_to="none",
        )
        gamma = measure_gamma(model, data, args)
    write_rows(target, staged_rows(rows, gamma.tolist()))
