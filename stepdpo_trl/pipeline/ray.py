"""Run pipeline stages with Ray Data: each worker processes a shard, in a folder on a shared disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..generation import GenerationError
from ..runs.run_directory import RunError
from .records import count_line

ShardWork = Callable[[Any, Path, tuple[int, int]], Any]


def run_on_ray(
    work: ShardWork, folders: Sequence[tuple[Path, tuple[int, int]]], num_gpus: float = 0, stage: str = "work"
) -> list[dict[str, Any]]:
    """
    Run a pipeline stage in several folders in parallel.

    Args:
        work (`Callable`):
            Function that is called with a [`~stepdpo_trl.pipeline.session.Session`], a folder and its shard (index and
            number of shards), and returns counts.
        folders (`Sequence[tuple[Path, tuple[int, int]]]`):
            Folders and their shards.
        num_gpus (`float`, *optional*, defaults to `0`):
            Number of GPUs per folder.
        stage (`str`, *optional*, defaults to `"work"`):
            Name of the pipeline stage, for the printed counts.

    Returns:
        `list[dict]`: Folder and counts of each shard.

    Raises:
        GenerationError: If Ray is not installed.
        RunError: If a shard fails, with its error message. The other shards are completed first.
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
        except (RunError, GenerationError, ValueError, OSError) as error:  # Ray would wrap it in its own traceback
            return {"folder": row["folder"], "counts": {}, "error": str(error)}
        return {"folder": row["folder"], "counts": dict(counts), "error": ""}

    rows = [{"folder": str(folder.absolute()), "index": index, "count": count} for folder, (index, count) in folders]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = data.map(shard, num_gpus=num_gpus or None).take_all()
    for row in done:
        if not row["error"]:
            print(count_line(stage, row["folder"], row["counts"]))
    errors = list(dict.fromkeys(row["error"] for row in done if row["error"]))  # often the same in all shards
    if errors:
        raise RunError("\n".join(errors))
    return done
