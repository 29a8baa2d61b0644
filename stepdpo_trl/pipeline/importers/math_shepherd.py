"""
Math-Shepherd (https://huggingface.co/datasets/peiyi9979/Math-Shepherd): step pairs and localization cases.

Its labels are automatic: + means that some continuation of the step reached the right answer.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from .published import LocalizationCase, PublishedStep, matched, pair, rows

_LABEL_LINE = re.compile(r"\n[^\S\n]*[Ss]tep \d+:")


class _Solution(NamedTuple):
    id: str
    source: str
    task: str
    steps: list[tuple[str, str]]  # "Step k:" with what separates it from the step before, and the step's text
    labels: str


def read_math_shepherd(path: str | Path, counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """
    Read step pairs from Math-Shepherd.

    The rejected step of a pair is the first step labeled - of a solution. The preferred step is a step labeled + of
    another solution of the same problem, after the same previous steps, all labeled +. Each such rejected step is in
    one pair, and the possible preferred steps take turns. A step that occurs with both labels is in no pair.

    If the last step of a solution is labeled +, its answer is right and becomes the `answer` of all pairs of the
    problem. The whole file is kept in memory.

    Args:
        path (`str` or `Path`):
            The file.
        counts (`Counter`, *optional*):
            Updated with the number of rows, of rows with pairs, and of other rows by reason.

    Yields:
        `dict`: Columns as in [`~stepdpo_trl.pipeline.importers.prm800k.read_prm800k`]. `dataset` is the file's `task`.

    Raises:
        ValueError: If the file is not in this format. The message contains the line.
    """
    counts = Counter() if counts is None else counts
    for problem, solutions in _math_shepherd(path, counts).items():
        steps_after: dict[str, tuple[int, dict[str, PublishedStep], dict[str, PublishedStep]]] = {}
        first_wrong: dict[str, tuple[str, str]] = {}
        for solution in solutions:
            prefix = ""
            for index, (head, text) in enumerate(solution.steps):
                prefix += head
                rest = "".join(h + t for h, t in solution.steps[index + 1 :])
                step = PublishedStep(text, text + rest, not rest, solution.source)
                _, right, wrong = steps_after.setdefault(prefix, (index, {}, {}))
                if solution.labels[index] == "-":
                    wrong.setdefault(text, step)
                    first_wrong[solution.source] = (prefix, text)
                    break
                right.setdefault(text, step)
                prefix += text
        answer, sources, paired = _answer(solutions), set(), set()
        for prefix, (index, right, wrong) in steps_after.items():
            for chosen, rejected in matched(right, wrong):
                sources |= {chosen.source, rejected.source}
                paired.add((prefix, rejected.text))
                yield pair(solutions[0].task, problem, prefix, chosen, rejected, answer, index)
        for source in (solution.source for solution in solutions):
            if source in sources:
                counts["rows with pairs"] += 1
            elif source not in first_wrong:
                counts["no wrong step to pair with"] += 1
            elif first_wrong[source] in paired:
                counts["wrong step already in a pair of another row"] += 1
            else:
                counts["no right step to pair with the wrong step"] += 1


def math_shepherd_cases(path: str | Path, counts: Counter[str]) -> Iterator[LocalizationCase]:
    """
    Read the solutions without a step labeled + after one labeled -, grouped by problem.

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
    for problem, solutions in _math_shepherd(path, counts).items():
        answer = _answer(solutions)
        for solution in solutions:
            counts["cases"] += 1
            steps = tuple(text.strip() for _, text in solution.steps)
            first_wrong = solution.labels.find("-") + 1 or None
            yield LocalizationCase(solution.id, problem, steps, first_wrong, solution.source, answer)


def _math_shepherd(path: str | Path, counts: Counter[str]) -> dict[str, list[_Solution]]:
    solutions: dict[str, list[_Solution]] = {}
    for row in rows(path, "math_shepherd"):
        *parts, tail = row.get("input", str).split("ки")
        marked, task = row.get("label", str), row.get("task", str)
        # `label` is `input` with + or - (one character) instead of ки (two characters)
        labels = "".join(marked[end + k : end + k + 1] for k, end in enumerate(accumulate(map(len, parts))))
        if not parts:
            row.refuse("`input` (without ки)", row.data["input"])
        if len(labels) < len(parts) or not set(labels) <= {"+", "-"}:
            row.refuse("`label` (without + or - where `input` has ки)", marked)
        counts["rows"] += 1
        problem, *first = re.split(r"([Ss]tep 1:)", parts[0])
        heads = [re.match(r"\s*[Ss]tep \d+:", part) for part in parts[1:]]
        steps = [("".join(first[:1]), "".join(first[1:]))]
        steps += [(head[0], part[head.end() :]) for head, part in zip(heads, parts[1:], strict=True) if head]
        texts = [text.removesuffix(" ") for _, text in steps]
        if tail.strip() or len(first) != 2 or not all(heads) or any(map(_LABEL_LINE.search, texts)):
            counts["steps and ки do not match"] += 1
        elif not all(map(str.strip, (problem, *texts))):
            counts["empty problem or step"] += 1
        elif "-" in labels and "+" in labels[labels.index("-") :]:
            counts["step labeled + after one labeled -"] += 1
        else:
            numbered = [(head, text) for (head, _), text in zip(steps, texts, strict=True)]
            solutions.setdefault(problem.strip(), []).append(_Solution(row.id, row.source, task, numbered, labels))
    return solutions


def _answer(solutions: Iterable[_Solution]) -> str:
    right = (solution.steps[-1][1] for solution in solutions if solution.labels[-1] == "+")
    return next((text.rpartition("The answer is:")[2].strip() for text in right if "The answer is:" in text), "")
