"""Build a dataset of step pairs from a run."""

import json
import re
import tempfile
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.files import replacing, write_atomically
from ..runs.run_directory import RunDirectory, RunError
from .collect import read_problems_of
from .pairs import SelectedPairs, make_pairs, select_pairs
from .records import Problem, read_texts

_SHARD = re.compile(r"shard-(\d{1,9})-of-(\d{1,9})")
OUTPUT_SUFFIXES = (".jsonl", ".parquet")
_ROWS_PER_GROUP = 2_000  # of a Parquet file, in memory at the same time


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


def build(
    paths: Sequence[Path],
    corrections: str | None = None,
    exclude: Sequence[str] = (),
    max_pairs_per_problem: int | None = None,
) -> tuple[SelectedPairs, Counter[str]]:
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

    Returns:
        [`SelectedPairs`], `Counter[str]`: The pairs, and the number of dropped ones per reason.

    Raises:
        RunError: If there are no pairs, or the folders do not belong to one run.
    """
    pairs, settings = [], []
    problems: list[Any] = []
    ids: set[str] = set()
    for path in paths:
        with RunDirectory(path) as run:
            settings.append({k: v for k, v in run.settings().get("collect", {}).items() if k != "shard"})
            problems.append(read_problems_of(run))
            if settings[0] != settings[-1] or _share(problems[-1], ids, last=path == paths[-1]):
                raise RunError(
                    f"{path} and {paths[0]} do not belong together: their settings differ or they share problems. "
                    "Collect all shards with the same command, apart from --shard."
                )
            pairs.append(make_pairs(run, corrections))
    excluded = (problem for file in exclude for problem in read_texts(file))
    rows = (row for of_run in pairs for row in of_run)
    kept, left_out = select_pairs(rows, ChainMap(*problems), excluded, max_pairs_per_problem)
    if not kept and any(pairs):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise RunError(
            f"All {sum(map(len, pairs))} pairs were dropped ({reasons}). Use problems that are not in the --exclude "
            "files."
        )
    if not kept:
        raise RunError(
            "No pairs: no wrong step has a right continuation. Increase --num-samples of `collect`, or use easier "
            "problems. The model must solve some of them at least occasionally."
        )
    return SelectedPairs(pairs, kept), left_out


def _share(problems: Mapping[str, Problem], ids: set[str], last: bool) -> bool:
    """Return whether any of the problems is among the ids of earlier runs, and add its ids to them."""
    if ids and not ids.isdisjoint(problems):
        return True
    if not last:
        ids.update(problems)
    return False


def save(rows: Iterable[dict[str, Any]], to: str, card: str) -> str:
    """
    Write a dataset and its card.

    Args:
        rows (`Iterable[dict]`):
            The rows. They all have the same columns.
        to (`str`):
            File that ends in `.jsonl` or `.parquet`, or `hub:USER/NAME` for a private dataset on the Hub.
        card (`str`):
            Text of the data card.

    Returns:
        `str`: Path or URL of the dataset.

    Raises:
        RunError: If `to` is invalid or cannot be written.
    """
    check_target(to)
    if to.startswith("hub:"):
        return _push(rows, to.removeprefix("hub:"), card)
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            (_write_parquet if path.suffix == ".parquet" else _write_json_lines)(rows, partial)
        write_atomically(path.with_suffix(".card.md"), card)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}). Fix that and run `stepdpo build` again. The run itself is "
            "complete."
        ) from error
    return str(path)


def _push(rows: Iterable[dict[str, Any]], name: str, card: str) -> str:
    from datasets import Dataset
    from huggingface_hub import DatasetCard

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.parquet"
        _write_parquet(rows, file)
        Dataset.from_parquet(str(file), cache_dir=folder).push_to_hub(name, private=True)
    DatasetCard(card).push_to_hub(name)
    return f"https://huggingface.co/datasets/{name}"


def _write_json_lines(rows: Iterable[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    rows = iter(rows)
    table = pyarrow.Table.from_pylist(list(islice(rows, _ROWS_PER_GROUP)))
    with ParquetWriter(path, table.schema) as writer:
        while len(table):
            writer.write_table(table)
            table = pyarrow.Table.from_pylist(list(islice(rows, _ROWS_PER_GROUP)), table.schema)


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
