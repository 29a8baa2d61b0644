"""Step pairs of a run, in the columns of Math-Step-DPO-10K. They are made from the records when they are used."""

import logging
import re
import unicodedata
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from typing import Any, overload

from ..data.answers import WRONG
from ..data.prompts import StepPrompt
from ..data.schema import StepPreference
from ..data.steps import Steps, split_steps
from ..runs.run_directory import RunDirectory, RunError
from .collect import read_settings, solutions_by_key
from .policy import render_template
from .records import Problem, Solution, is_of
from .rectify import count_outdated, current_corrections, normalize_step, reading_correction

logger = logging.getLogger(__name__)

PairRow = dict[str, Any]


class RunPairs(Sequence[PairRow]):
    """
    Step pairs of a run, ordered by solution key.

    Args:
        run (`RunDirectory`):
            The run.
        corrections (`str`):
            Set of corrections to use.
    """

    def __init__(self, run: RunDirectory, corrections: str) -> None:
        self._corrections, self._log = corrections, run.log(f"corrections.{corrections}")
        self._solutions = solutions_by_key(run)
        self._settings, self._run = read_settings(run), run
        self._prompt = StepPrompt(**self._settings["prompt"])
        keys, counts = list[str](), array("L")
        self.replaced = 0  # corrections of solutions that have been replaced since
        for key, record in current_corrections(run, corrections):
            if key not in self._solutions:
                raise RunError(
                    f"The solution {key!r}, which has a correction, is not in {run.path / 'solutions.jsonl'}. Run the "
                    "same `stepdpo collect` command again, which adds it."
                )
            solution = self._solutions[key]
            if solution.outcome == WRONG and is_of(solution, record.get("solution")):
                if record["found"]:
                    keys.append(key)
                    counts.append(len(record["found"]))
            else:
                self.replaced += 1
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._ends = array("L", accumulate(counts[place] for place in order))  # of the pairs of each key
        self._keys = b"".join(keys[place].encode() for place in order)  # a list would take twice the memory
        self._key_ends = array("L", accumulate(len(keys[place].encode()) for place in order))
        self._latest = lru_cache(maxsize=4)(self._read)  # the pairs of a solution follow each other

    def _key(self, place: int) -> str:
        return self._keys[self._key_ends[place - 1] if place else 0 : self._key_ends[place]].decode()

    def _read(self, key: str) -> tuple[Solution, Steps, dict[str, Any]]:
        solution = self._solutions[key]
        return solution, split_steps(solution.text, solution.style), self._log[key]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> PairRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PairRow]: ...
    def __getitem__(self, index: int | slice) -> PairRow | Sequence[PairRow]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        place = bisect_right(self._ends, index)
        solution, wrong, record = self._latest(self._key(place))
        found = record["found"][index - self._ends[place]]  # counted from the end
        with reading_correction(self._run, self._corrections, solution.key):
            return self._row(solution, wrong, record["step"], found)

    def _row(self, solution: Solution, wrong: Steps, step: int, found: Mapping[str, Any]) -> PairRow:
        corrected = split_steps(found["text"], wrong.style)
        if not 1 <= step <= min(len(wrong), len(corrected)):
            raise IndexError(f"step {step} is not in the solution, which has {len(wrong)}, or not in its correction")
        return {
            "dataset": self._settings["problems"],
            "prompt": render_template(self._prompt.user, problem=solution.problem.problem),
            "initial_reason_steps": wrong.prefix(step),
            "chosen": corrected.step(step),
            "rejected": wrong.step(step),
            "full_chosen": found["text"][corrected.spans[step - 1].begin :],
            "full_rejected": solution.text[wrong.spans[step - 1].begin :],
            "answer": solution.problem.answer,
            "step_index": step,
            "chosen_ends_solution": len(corrected) == step and found["finish"] == "stop",
            "rejected_ends_solution": len(wrong) == step and solution.finish_reason == "stop",
            "source": f"{self._corrections}:{found['key']}",
            "problem_id": solution.problem.id,
        }


class SelectedPairs(Sequence[PairRow]):
    """
    Selected pairs of several runs.

    Args:
        runs (`Sequence[Sequence[dict]]`):
            The pairs of each run.
        selected (`Sequence[int]`):
            Numbers of the selected pairs, counted over all runs.
    """

    def __init__(self, runs: Sequence[Sequence[PairRow]], selected: Sequence[int]) -> None:
        self._runs, self._selected = runs, selected
        self._ends = list(accumulate(map(len, runs)))

    def __len__(self) -> int:
        return len(self._selected)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    @overload
    def __getitem__(self, index: int) -> PairRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PairRow]: ...
    def __getitem__(self, index: int | slice) -> PairRow | Sequence[PairRow]:
        if isinstance(index, slice):
            return SelectedPairs(self._runs, self._selected[index])
        number = self._selected[index]
        run = bisect_right(self._ends, number)
        row = self._runs[run][number - self._ends[run]]  # counted from the end
        StepPreference.from_row(row, f"pair {index}")
        return row


def make_pairs(run: RunDirectory, corrections: str | None = None) -> RunPairs:
    """
    Make the step pairs of a run.

    Args:
        run (`RunDirectory`):
            The run.
        corrections (`str`, *optional*):
            Set of corrections to use, `JUDGE` or `JUDGE.by-MODEL`. Required if the run has several.

    Returns:
        [`RunPairs`]: The pairs.

    Raises:
        RunError: If the run has no such corrections, or several and `corrections` is not given.
    """
    names = list(run.logs("corrections"))
    if not names:
        raise RunError(f"{run.path} holds no corrections yet. Run `stepdpo rectify` first.")
    if corrections is None and len(names) > 1:
        raise RunError(
            f"{run.path} holds several sets of corrections: {', '.join(names)}. Choose one with --corrections."
        )
    corrections = names[0] if corrections is None else corrections
    if corrections not in names:
        raise RunError(f"{run.path} holds no corrections {corrections!r}, only {', '.join(names)}.")
    outdated = count_outdated(run, corrections)
    if outdated:
        logger.warning(
            f"{outdated} corrections in {run.path} belong to verdicts that `localize` has replaced since, and are "
            "left out. Run `stepdpo rectify` again to correct the steps that are now located."
        )
    pairs = RunPairs(run, corrections)
    if pairs.replaced:
        logger.warning(
            f"{pairs.replaced} corrections in {run.path} belong to solutions that `collect` has replaced since, "
            "and are left out. Run `stepdpo localize` and `stepdpo rectify` again."
        )
    return pairs


# Spellings of the same operator, after NFKC
_OPERATORS = (
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[cdt]frac(?![a-zA-Z])"), r"\\frac"),
    (
        re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])|[\u00d7\u00b7\u2217\u2219\u22c5]|(?<=[\d)])\s*[xX]\s*(?=[\d(])"),
        "*",
    ),
    (re.compile(r"\\div(?![a-zA-Z])|[\u00f7\u2044\u2215]"), "/"),
    (re.compile(r"[\u2010-\u2015\u2212]"), "-"),
    (re.compile(r"\\leq?(?![a-zA-Z])|\u2264"), "<="),
    (re.compile(r"\\geq?(?![a-zA-Z])|\u2265"), ">="),
)


def normalize_problem(text: str) -> str:
    r"""
    Normalize a problem for comparison: keep letters, digits and operators only.

    Typographic variants are the same: full-width and composed characters (NFKC), spellings of operators such as
    `\times`, the sign for it and "3 x 4", dashes, and superscripts.

    Args:
        text (`str`):
            The problem.

    Returns:
        `str`: The comparison key.
    """
    text = re.sub("[\u00b2\u00b3\u00b9\u2070-\u2079]+", r"^\g<0>", text)  # NFKC turns 5\u00b2 into 52
    text = unicodedata.normalize("NFKC", text)
    for spelling, operator in _OPERATORS:
        text = spelling.sub(operator, text)
    return unicodedata.normalize("NFKC", re.sub(r"[^\w+\-*/^=<>.]|\.(?!\d)", "", text).casefold())


def select_pairs(
    rows: Iterable[PairRow],
    problems: Mapping[str, Problem],
    excluded: Iterable[str] = (),
    max_pairs_per_problem: int | None = None,
) -> tuple[Sequence[int], Counter[str]]:
    """
    Drop test problems, duplicates, and pairs above the limit per problem.

    Args:
        rows (`Iterable[dict]`):
            The pairs.
        problems (`Mapping[str, Problem]`):
            Problems of the pairs, by id.
        excluded (`Iterable[str]`, *optional*):
            Problems of test sets, compared by [`normalize_problem`].
        max_pairs_per_problem (`int`, *optional*):
            Maximum number of pairs per problem. Pairs with different wrong steps are kept first.

    Returns:
        `Sequence[int]`, `Counter[str]`: Numbers of the pairs that are kept, in their order, and the number of dropped
            ones per reason.
    """
    import numpy as np

    tests = {_digest(normalize_problem(problem)) for problem in excluded}
    in_tests = lru_cache(maxsize=64)(lambda name: _digest(normalize_problem(problems[name].problem)) in tests)
    left_out: Counter[str] = Counter()
    # Digests instead of texts, which might not fit into memory
    numbers, errors, identities, owners = (array("Q") for _ in range(4))
    for number, row in enumerate(rows):
        if tests and in_tests(row["problem_id"]):
            left_out["in a test set"] += 1
            continue
        numbers.append(number)
        errors.append(_digest(row["prompt"], row["initial_reason_steps"], row["rejected"]))
        steps = (normalize_step(row[column]) for column in ("initial_reason_steps", "chosen", "rejected"))
        identities.append(_digest(row["prompt"], *steps))
        owners.append(_digest(row["problem_id"]))
    repeated = set(np.frombuffer(identities, np.uint64)[_times_before(identities) > 0].tolist())
    kept = array("Q")
    seen: set[int] = set()
    of_problem: Counter[int] = Counter()
    for place in map(int, np.argsort(_times_before(errors), kind="stable")):  # different errors first
        identity, owner = identities[place], owners[place]
        if identity in seen:
            left_out["duplicate"] += 1
            continue
        if max_pairs_per_problem is not None:
            if of_problem[owner] >= max_pairs_per_problem:
                left_out["above the limit per problem"] += 1
                continue
            of_problem[owner] += 1
        if identity in repeated:
            seen.add(identity)
        kept.append(numbers[place])
    return kept, left_out


def _times_before(values: "array[int]") -> Any:
    """Return for each value how often it occurs before, as an array."""
    import numpy as np

    if not values:
        return np.zeros(0, int)
    found = np.frombuffer(values, np.uint64)
    order = np.argsort(found, kind="stable")
    first = np.concatenate([[True], np.diff(found[order]) != 0])  # of equal values
    places = np.arange(len(found))
    times = np.empty_like(places)
    times[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return times


def _digest(*texts: str) -> int:
    digest = blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
