"""The stages under Ray Data: shards are worked on anywhere in the cluster, in folders that all machines see."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..generation import GenerationError
from ..runs.run_directory import RunError

Work = Callable[[Any, Path, tuple[int, int]], Any]


def run_on_ray(
    work: Work, folders: Sequence[tuple[Path, tuple[int, int]]], num_gpus: float = 0
) -> list[dict[str, Any]]:
    """
    Do a stage in several folders, side by side.

    Args:
        work (`Callable`):
            What to do with a session, a folder and the shard it holds; returns counts.
        folders (`Sequence[tuple[Path, tuple[int, int]]]`):
            Folders and shards.
        num_gpus (`float`, *optional*, defaults to `0`):
            GPUs for each.

    Returns:
        `list[dict]`: Folder and counts of each.

    Raises:
        GenerationError: If Ray is missing.
        RunError: If a folder could not be worked on, with what was said there; the others are worked on to their ends.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise GenerationError(
            "--engine ray needs the package ray. Install it: pip install 'stepdpo_trl[ray]'"
        ) from error

    def shard(row: dict[str, Any]) -> dict[str, Any]:
        from .session import Session

        try:
            with Session() as session:
                counts = work(session, Path(row["folder"]), (int(row["index"]), int(row["count"])))
        except (RunError, GenerationError, ValueError, OSError) as error:  # Ray would bury it under its own frames
            return {"folder": row["folder"], "counts": {}, "error": str(error)}
        return {"folder": row["folder"], "counts": dict(counts), "error": ""}

    rows = [{"folder": str(folder.absolute()), "index": index, "count": count} for folder, (index, count) in folders]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = data.map(shard, num_gpus=num_gpus or None).take_all()
    for row in done:
        if not row["error"]:
            print(f"{row['folder']}: {', '.join(f'{count} {what}' for what, count in row['counts'].items())}")
    errors = list(dict.fromkeys(row["error"] for row in done if row["error"]))  # often the same for all
    if errors:
        raise RunError("\n".join(errors))
    return done
