"""The last stage of the comparison: tables, picture, and the page with changed solutions."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from changes import find_changes, user_template, write_changes
from experiment_parts import read_rows
from plan import BASE, LOOP, STEP
from scores import DECODING, read_outcomes, read_records
from sources import costs
from tables import Result, write_tables
from training_stage import TrainingStage, best_trial

from stepdpo_trl.pipeline.loop import PAIRS, RUN


def read_result(folders: Sequence[Path]) -> Result:
    """Read the outcomes of a method, given the folders of its seeds."""
    return Result({decoding: [read_outcomes(folder / decoding) for folder in folders] for decoding in DECODING})


def results_of(stage: TrainingStage, methods: Sequence[str], seeds: int) -> dict[str, Result]:
    """
    Read the results of methods.

    Args:
        stage (`TrainingStage`):
            The stage that trained and evaluated them.
        methods (`Sequence[str]`):
            Names of the methods.
        seeds (`int`):
            Number of seeds.

    Returns:
        `dict[str, Result]`: The results, with the initial model first.
    """
    found = {BASE: read_result([stage.out / "final" / BASE])}
    for name in methods:
        if name == LOOP:
            found[name] = _result_of_loop(stage, found[STEP])
            continue
        units = [f"final/{name}/seed-{seed}" for seed in range(seeds)]
        result, facts = read_result([stage.out / unit for unit in units]), stage.data.facts_of(name)
        result.rows, result.tokens, result.data_minutes = facts["rows"], facts["tokens"], facts["minutes"]
        seconds = [stage.units.seconds(f"{unit}/train") for unit in units]
        result.training_minutes = math.fsum(seconds) / len(seconds) / 60
        result.trials = stage.trials_of(name)
        result.learning_rate, result.beta = best_trial(result.trials)
        found[name] = result
    return found


def _result_of_loop(stage: TrainingStage, first: Result) -> Result:
    """Read the result of the loop. Its costs include those of Step-DPO, its first stage."""
    result, folder = read_result([stage.out / "final" / LOOP / "seed-0"]), stage.out / LOOP / "stage-2"
    tokens, minutes = costs([folder / RUN])
    result.rows = (first.rows or 0) + len(read_rows(folder / PAIRS))
    result.tokens, result.data_minutes = first.tokens + tokens, first.data_minutes + minutes
    # The command of the second stage samples and trains
    result.training_minutes = first.training_minutes + stage.units.seconds("loop/second") / 60 - minutes
    result.learning_rate, result.beta = first.learning_rate, first.beta
    return result


def write_report(stage: TrainingStage, methods: Sequence[str], seeds: int) -> str:
    """
    Write the report to the folder `report`.

    Args:
        stage (`TrainingStage`):
            The stage that trained and evaluated the methods.
        methods (`Sequence[str]`):
            Names of the methods.
        seeds (`int`):
            Number of seeds.

    Returns:
        `str`: The tables.
    """
    folder = stage.out / "report"
    folder.mkdir(exist_ok=True)
    facts = {"settings": asdict(stage.settings), "versions": versions()}
    text = write_tables(results_of(stage, methods, seeds), facts, folder)
    if STEP in methods:
        stage.units.do("report/changes", lambda: _write_changes(stage, folder / "changes.html"))
    return text


def _write_changes(stage: TrainingStage, file: Path) -> None:
    final = stage.out / "final"
    before, after = (read_records(final / name / "greedy") for name in (BASE, f"{STEP}/seed-0"))
    rows = find_changes(before, after, user_template(stage.settings))
    if rows:
        model = str(final / STEP / "seed-0" / "model")
        stage.units.call_function("report/changes", write_changes, rows, model, stage.settings, file)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the results depend on."""
    import peft
    import torch
    import transformers
    import trl

    import stepdpo_trl

    return {module.__name__: str(module.__version__) for module in (stepdpo_trl, trl, transformers, peft, torch)}
