"""A page with the first step in which the solutions before and after training differ."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiment_parts import write_rows
from plan import Settings

from stepdpo_trl.data.answers import RIGHT
from stepdpo_trl.data.files import write_atomically
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.pipeline.policy import render_template, resolve_step_prompt

SHOWN = 10  # problems in each direction


def first_difference(before: str, after: str) -> tuple[int, str, str, str] | None:
    """
    Find the first step in which two solutions of a problem differ.

    Args:
        before (`str`), after (`str`):
            The solutions.

    Returns:
        `tuple[int, str, str, str]` or `None`: Number of the step, common text before it, and both steps. `None` if one
        of the solutions is the beginning of the other.
    """
    one, two = split_steps(before, "label"), split_steps(after, "label")
    for number in range(1, min(len(one), len(two)) + 1):
        if one.prefix(number) != two.prefix(number):  # the labels differ: they belong to the steps then
            common = one.text[: one.spans[number - 2].end] if number > 1 else ""
        elif one.step(number) != two.step(number):
            common = one.prefix(number)
        else:
            continue
        old, new = (steps.text[len(common) : steps.spans[number - 1].end] for steps in (one, two))
        return number, common, old, new
    return None


def find_changes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], user: str) -> list[dict[str, Any]]:
    """
    Select problems that only one of two evaluations solves, and their first different step.

    Args:
        before (`Sequence[dict]`), after (`Sequence[dict]`):
            Records of both evaluations, as returned by [`~scores.read_records`].
        user (`str`):
            Template of the user message.

    Returns:
        `list[dict]`: Step pairs with the right solution's step as `chosen`: up to ten that were wrong and are right
        now, then up to ten that were right.
    """
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for old, new in zip(before, after, strict=True):
        gained = new["outcome"] == RIGHT
        if gained == (old["outcome"] == RIGHT) or len(found[gained]) == SHOWN:
            continue
        changed = first_difference(old["text"], new["text"])
        if changed is None:
            continue
        number, common, *steps = changed
        found[gained].append(
            {
                "prompt": render_template(user, problem=old["problem"]),
                "initial_reason_steps": common,
                "chosen": steps[gained],
                "rejected": steps[not gained],
                "step_index": number,
                "gained": gained,
                "gold": old["gold"],
                "answers": f"{old['answer']} before, {new['answer']} after",
            }
        )
    return found[True] + found[False]


def write_changes(rows: list[dict[str, Any]], model: str, settings: Settings, file: Path) -> None:
    """
    Write a page with the tokens of the steps and their log-ratios, as `stepdpo inspect` does.

    Args:
        rows (`list[dict]`):
            Step pairs, as returned by [`find_changes`].
        model (`str`):
            Trained model or adapter.
        settings (`Settings`):
            The settings.
        file (`Path`):
            The page.
    """
    from stepdpo_trl import StepDPOConfig
    from stepdpo_trl.inspection.example import Scoring
    from stepdpo_trl.inspection.page import write_page
    from stepdpo_trl.inspection.scores import RowEncoder, load_processing_class, score
    from stepdpo_trl.inspection.sources import read_pairs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "changes.jsonl"
        write_rows(source, rows)
        examples = read_pairs(str(source), "train", range(len(rows)))
    encode = RowEncoder(load_processing_class(settings.model), StepDPOConfig("unused", bf16=False, report_to="none"))
    named = []
    for number, (row, example) in enumerate(zip(rows, examples, strict=True), start=1):
        name = f"{number}: {'wrong before, right after' if row['gained'] else 'right before, wrong after'} training"
        titles = ("step after training", "step before training")
        titles = titles if row["gained"] else (titles[1], titles[0])
        parts = [replace(part, title=title) for part, title in zip(example.parts, titles, strict=True)]
        facts = (*example.facts, ("final answers", row["answers"]), ("gold answer", row["gold"]))
        named.append(encode(replace(example, name=name, where=name, facts=facts, parts=tuple(parts))))
    for scored, role in ((settings.model, "reference"), (model, "policy")):
        named = score(named, scored, role, "float32")
    write_atomically(file, write_page(named, Scoring(model, settings.model)))


def user_template(settings: Settings) -> str:
    """Return the template of the user message."""
    return resolve_step_prompt(settings.prompt).user
