"""Build a dataset of step pairs from a run, in the columns of Math-Step-DPO-10K."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import replacing, write_atomically
from ..data.prompts import StepPrompt
from ..data.schema import StepPreference
from ..data.steps import split_steps
from ..runs.run_directory import RunDirectory, RunError
from .collect import read_problems_of, read_settings, read_solutions
from .policy import render_template
from .records import Problem, Solution, read_texts
from .rectify import current_corrections, normalize_step, outdated_corrections, reading_correction

logger = logging.getLogger(__name__)

PairRow = dict[str, Any]
_SHARD = re.compile(r"shard-(\d{1,9})-of-(\d{1,9})")
OUTPUT_SUFFIXES = (".jsonl", ".parquet")


def run_directories(path: str | Path) -> list[Path]:
    """
    Find the folders of a run: the run folder itself, or those of its shards.

    Args:
        path (`str` or `Path`):
            Folder passed as `--output-dir`.

    Returns:
        `list[Path]`: The folders.

    Raises:
        RunError: If shards are missing, or the folder holds several runs.
    """
    path = Path(path)
    named = [(shard, _SHARD.fullmatch(shard.name)) for shard in sorted(path.glob("shard-*-of-*"))]
    matches = [(shard, match) for shard, match in named if match and shard.is_dir()]
    if not matches:
        return [path]
    shards = [shard for shard, _ in matches]
    counts = {int(match[2]) for _, match in matches}
    found = {int(match[1]) for _, match in matches}
    if len(counts) > 1 or (path / "solutions.jsonl").exists():
        raise RunError(
            f"{path} holds runs that do not belong together ({', '.join(s.name for s in shards)}). Move them to "
            "separate folders."
        )
    missing = sorted(set(range(counts.pop())) - found)
    if missing:
        raise RunError(f"{path} lacks shards {missing}. Run them, or copy their folders to {path}, then build.")
    return shards


def make_pairs(run: RunDirectory, corrections: str | None = None) -> Iterator[PairRow]:
    """
    Make the step pairs of a run.

    Args:
        run (`RunDirectory`):
            The run.
        corrections (`str`, *optional*):
            Set of corrections to use, `JUDGE` or `JUDGE.by-MODEL`. Required if the run has several.

    Returns:
        `Iterator[dict]`: The rows, ordered by solution key.

    Raises:
        RunError: If the run has no such corrections, or several and `corrections` is not given.
    """
    records = current_corrections(run)
    if not records:
        raise RunError(f"{run.path} holds no corrections yet. Run `stepdpo rectify` first.")
    if corrections is None and len(records) > 1:
        raise RunError(
            f"{run.path} holds several sets of corrections: {', '.join(records)}. Choose one with --corrections."
        )
    corrections = next(iter(records)) if corrections is None else corrections
    if corrections not in records:
        raise RunError(f"{run.path} holds no corrections {corrections!r}, only {', '.join(records)}.")
    outdated = outdated_corrections(run, corrections)
    if outdated:
        logger.warning(
            f"{len(outdated)} corrections in {run.path} belong to verdicts that `localize` has replaced since, and "
            "are left out. Run `stepdpo rectify` again to correct the steps that are now located."
        )
    settings = read_settings(run)
    prompt = StepPrompt(**settings["prompt"])
    solutions = {solution.key: solution for solution in read_solutions(run)}
    for key, record in sorted(records[corrections].items()):
        if key not in solutions:
            raise RunError(
                f"The solution {key!r}, which has a correction, is not in {run.path / 'solutions.jsonl'}. Run the "
                "same `stepdpo collect` command again, which adds it."
            )
        text = render_template(prompt.user, problem=solutions[key].problem.problem)
        shared = {"dataset": settings["problems"], "prompt": text}
        with reading_correction(run, corrections, key):
            rows = [{**shared, **_pair(solutions[key], record["step"], found)} for found in record["found"]]
        for row in rows:
            yield {**row, "source": f"{corrections}:{row['source']}", "problem_id": solutions[key].problem.id}


def _pair(solution: Solution, step: int, found: Mapping[str, Any]) -> PairRow:
    """Make a step pair of a wrong solution and a continuation that was found for one of its steps."""
    wrong = split_steps(solution.text)
    corrected = split_steps(found["text"], wrong.style)
    if not 1 <= step <= min(len(wrong), len(corrected)):
        raise IndexError(f"step {step} is not in the solution, which has {len(wrong)}, or not in its correction")
    return {
        "initial_reason_steps": wrong.prefix(step),
        "chosen": corrected.step(step),
        "rejected": wrong.step(step),
        "full_chosen": found["text"][corrected.spans[step - 1].begin :],
        "full_rejected": solution.text[wrong.spans[step - 1].begin :],
        "answer": solution.problem.answer,
        "step_index": step,
        "chosen_ends_solution": len(corrected) == step and found["finish"] == "stop",
        "rejected_ends_solution": len(wrong) == step and solution.finish_reason == "stop",
        "source": found["key"],
    }


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
    problems: dict[str, Problem],
    excluded: Iterable[str] = (),
    max_pairs_per_problem: int | None = None,
) -> tuple[list[PairRow], Counter[str]]:
    """
    Drop test problems, duplicates, and pairs above the limit per problem.

    Args:
        rows (`Iterable[dict]`):
            The pairs.
        problems (`dict[str, Problem]`):
            Problems of the pairs, by id.
        excluded (`Iterable[str]`, *optional*):
            Problems of test sets, compared by [`normalize_problem`].
        max_pairs_per_problem (`int`, *optional*):
            Maximum number of pairs per problem. Pairs with different wrong steps are kept first.

    Returns:
        `list[dict]`, `Counter[str]`: The pairs, and the number of dropped ones per reason.
    """
    tests = {normalize_problem(problem) for problem in excluded}
    kept: list[PairRow] = []
    left_out: Counter[str] = Counter()
    seen = set()
    of_problem: Counter[str] = Counter()
    for row in _different_errors_first(rows):
        identity = (row["prompt"], *(normalize_step(row[c]) for c in ("initial_reason_steps", "chosen", "rejected")))
        if normalize_problem(problems[row["problem_id"]].problem) in tests:
            left_out["in a test set"] += 1
        elif identity in seen:
            left_out["duplicate"] += 1
        elif max_pairs_per_problem is not None and of_problem[row["problem_id"]] >= max_pairs_per_problem:
            left_out["above the limit per problem"] += 1
        else:
            seen.add(identity)
            of_problem[row["problem_id"]] += 1
            kept.append(row)
    for number, row in enumerate(kept):
        StepPreference.from_row(row, f"pair {number}")
    return kept, left_out


def _different_errors_first(rows: Iterable[PairRow]) -> list[PairRow]:
    counts: Counter[tuple[str, str, str]] = Counter()
    ranked = []
    for row in rows:
        error = (row["prompt"], row["initial_reason_steps"], row["rejected"])
        ranked.append((counts[error], row))
        counts[error] += 1
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def build(
    paths: Sequence[Path],
    corrections: str | None = None,
    exclude: Sequence[str] = (),
    max_pairs_per_problem: int | None = None,
    score: Callable[[list[PairRow]], None] | None = None,
) -> tuple[list[PairRow], Counter[str]]:
    """
    Make the step pairs of a run and its shards.

    Args:
        paths (`Sequence[Path]`):
            Folders of the run, as returned by [`run_directories`].
        corrections (`str`, *optional*):
            Set of corrections to use. Required if the run has several.
        exclude (`Sequence[str]`, *optional*):
            Files with test problems.
        max_pairs_per_problem (`int`, *optional*):
            Maximum number of pairs per problem.
        score (`Callable`, *optional*):
            Function that adds log-probabilities to the rows.

    Returns:
        `list[dict]`, `Counter[str]`: The pairs, and the number of dropped ones per reason.

    Raises:
        RunError: If there are no pairs, or the folders do not belong to one run.
    """
    rows: list[PairRow] = []
    settings: list[dict[str, Any]] = []
    problems: dict[str, Problem] = {}
    for path in paths:
        with RunDirectory(path) as run:
            settings.append({k: v for k, v in run.settings().get("collect", {}).items() if k != "shard"})
            mine = read_problems_of(run)
            if settings[0] != settings[-1] or mine.keys() & problems.keys():
                raise RunError(
                    f"{path} and {paths[0]} do not belong together: their settings differ or they share problems. "
                    "Collect all shards with the same command, apart from --shard."
                )
            problems.update(mine)
            rows += make_pairs(run, corrections)
    excluded = [problem for file in exclude for problem in read_texts(file)]
    kept, left_out = select_pairs(rows, problems, excluded, max_pairs_per_problem)
    if not kept and rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise RunError(
            f"All {len(rows)} pairs were dropped ({reasons}). Use problems that are not in the --exclude files."
        )
    if not kept:
        raise RunError(
            "No pairs: no wrong step has a right continuation. Increase --num-samples of `collect`, or use easier "
            "problems. The model must solve some of them at least occasionally."
        )
    if score is not None:
        score(kept)
    return kept, left_out


def save(rows: list[PairRow], to: str, card: str) -> str:
    """
    Write a dataset and its card.

    Args:
        rows (`list[dict]`):
            The rows.
        to (`str`):
            File that ends in `.jsonl` or `.parquet`, or `hub:USER/NAME` for a private dataset on the Hub.
        card (`str`):
            Text of the data card.

    Returns:
        `str`: Path or URL of the dataset.

    Raises:
        RunError: If `to` is invalid or cannot be written.
    """
    from datasets import Dataset

    check_target(to)
    data = Dataset.from_list(rows)
    if to.startswith("hub:"):
        from huggingface_hub import DatasetCard

        name = to.removeprefix("hub:")
        data.push_to_hub(name, private=True)
        DatasetCard(card).push_to_hub(name)
        return f"https://huggingface.co/datasets/{name}"
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            if path.suffix == ".parquet":
                data.to_parquet(str(partial))
            else:
                data.to_json(str(partial), force_ascii=False)
        write_atomically(path.with_suffix(".card.md"), card)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}). Fix that and run `stepdpo build` again. The run itself is "
            "complete."
        ) from error
    return str(path)


def check_target(to: str) -> None:
    """
    Check the target of a dataset before any work is done.

    Args:
        to (`str`):
            Target, as for [`save`].

    Raises:
        RunError: If it is neither a file of a known format nor a dataset on the Hub.
    """
    hub = to.startswith("hub:") and re.fullmatch(r"hub:[\w.-]+/[\w.-]+", to)
    if not hub and Path(to).suffix not in OUTPUT_SUFFIXES:
        raise RunError(
            f"--output-file {to!r} is not supported. Use a file that ends in {' or '.join(OUTPUT_SUFFIXES)}, or "
            "hub:USER/NAME."
        )
