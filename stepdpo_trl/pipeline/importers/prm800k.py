"""PRM800K (`phase*_train.jsonl` of https://github.com/openai/prm800k): step pairs and localization cases."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .published import LocalizationCase, PublishedStep, Row, matched, pair, rows

Rated = list[tuple[str, int | None]]  # texts and ratings of the completions of a step, the chosen one first


class _Labeled(NamedTuple):
    row: Row
    problem: str
    answer: str
    generated: list[str]
    steps: list[Rated]
    taken: list[str]  # the chosen completions, up to the first step without one


def read_prm800k(path: str | Path, counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """
    Read step pairs from PRM800K.

    The prefix of a pair consists of the chosen completions of the previous steps. The preferred step is a completion
    rated +1, the rejected step one rated -1. Each completion rated -1 is in one pair. The completions rated +1 take
    turns, starting with the one that the labeler chose. Completions written by the labeler count as +1.

    Rows for quality control and screening are skipped, and so are those that the labeler gave up or found broken.
    Steps after a chosen completion that is rated -1, flagged or not rated are skipped as well.

    Args:
        path (`str` or `Path`):
            The file.
        counts (`Counter`, *optional*):
            Updated with the number of rows, of rows with pairs, and of other rows by reason.

    Yields:
        `dict`: The columns of Math-Step-DPO-10K, and `step_index` (from 1), `chosen_ends_solution`,
            `rejected_ends_solution` and `source`. `full_chosen` and `full_rejected` contain all following steps in the
            file.

    Raises:
        ValueError: If the file is not in this format. The message contains the line.
    """
    counts = Counter() if counts is None else counts
    for row, problem, answer, generated, steps, taken in _labeled(path, counts):
        reason = "no step with both a +1 and a -1"
        for index, step in enumerate(steps):
            before = taken[:index]
            rated: dict[int, dict[str, PublishedStep]] = {1: {}, -1: {}}
            for text, rating in step:
                if rating in rated and text.strip():
                    continued = (whole for whole in (taken, generated) if whole[: index + 1] == [*before, text])
                    full = "\n".join(next(continued, [*before, text])[index:])
                    ends = re.search("^# Answer$", text, re.MULTILINE) is not None
                    rated[rating].setdefault(text, PublishedStep(text, full, ends, row.source))
            for chosen, rejected in matched(rated[1], rated[-1]):
                reason = "rows with pairs"
                prefix = "".join(f"{text}\n" for text in before)
                yield pair("prm800k", problem, prefix, chosen, rejected, answer, index)
            if index >= len(taken) or step[0][1] not in (0, 1):
                break
        counts[reason] += 1


def prm800k_cases(path: str | Path, counts: Counter[str]) -> Iterator[LocalizationCase]:
    """
    Read complete solutions that are rated up to the first -1 or to their end.

    Args:
        path (`str` or `Path`):
            The file.
        counts (`Counter`):
            Updated with the number of rows, of cases, and of other rows by reason.

    Yields:
        `LocalizationCase`: The solutions.

    Raises:
        ValueError: If the file is not in this format. The message contains the line.
    """
    for row, problem, answer, generated, steps, taken in _labeled(path, counts):
        solution = generated or taken
        ratings = [dict(step).get(text) for step, text in zip(steps, solution, strict=False)]
        first_wrong = ratings.index(-1) + 1 if -1 in ratings else None
        complete = len(steps) == len(solution) and row.get("label.finish_reason", str) == "solution"
        if None in ratings[:first_wrong] or not (first_wrong or complete):
            counts["not rated up to a -1 or to the end"] += 1
            continue
        counts["cases"] += 1
        yield LocalizationCase(row.id, problem, tuple(solution), first_wrong, row.source, answer)


def _labeled(path: str | Path, counts: Counter[str]) -> Iterator[_Labeled]:
    for row in rows(path, "prm800k"):
        problem, finish = row.get("question.problem", str), row.get("label.finish_reason", str)
        answer = row.get("question.ground_truth_answer", str, type(None)) or ""
        generated = row.get("question.pre_generated_steps", list, type(None)) or []
        if not all(isinstance(step, str) for step in generated):
            row.refuse("`question.pre_generated_steps`", generated)
        steps: list[Rated] = []
        taken: list[str] = []
        for k, data in enumerate(row.get("label.steps", list), 1):
            completions, is_chosen = _completions(row.inner(data, f"step {k}"))
            if is_chosen and len(taken) == len(steps):
                taken.append(completions[0][0])
            steps.append(completions)
        counts["rows"] += 1
        if row.data.get("is_quality_control_question") or row.data.get("is_initial_screening_question"):
            counts["quality control or screening"] += 1
        elif finish in ("bad_problem", "give_up"):
            counts[finish] += 1
        else:
            yield _Labeled(row, problem, answer, generated, steps, taken)


def _completions(step: Row) -> tuple[Rated, bool]:
    """Return the completions of a step, and whether the first of them is the chosen one."""
    chosen = step.get("chosen_completion", int, type(None))
    found = [
        _rated(step.inner(completion, f"completion {k}"), "rating", None)
        for k, completion in enumerate(step.get("completions", list, type(None)) or [], 1)
    ]
    if step.get("human_completion", dict, type(None)) is not None:
        # `rating` is always null here, but some have a `corrected_rating`
        found.append(_rated(step.inner(step.data["human_completion"], "the human completion"), "corrected_rating", 1))
        chosen = len(found) - 1 if chosen is None else chosen
    if chosen is None:
        return found, False
    if not 0 <= chosen < len(found):
        step.refuse(f"`chosen_completion` (completions: {len(found)})", chosen)
    return [found.pop(chosen), *found], True


def _rated(completion: Row, field: str, unrated: int | None) -> tuple[str, int | None]:
    text, rating = completion.get("text", str), completion.get(field, int, type(None))
    if rating not in (-1, 0, 1, None):
        completion.refuse(f"`{field}`", rating)
    if completion.get("flagged", bool, type(None)):  # the labeler did not know how to rate it
        return text, None
    return text, unrated if rating is None else rating
