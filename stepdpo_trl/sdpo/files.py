"""
Files of an sDPO run in `output_dir`.

    stage-1/ ...                  model at the end of each stage, with `sdpo_stage.json`
    sdpo/stage-1-train.npz ...    log-probabilities under the reference of each stage
    checkpoint-100/ ...           checkpoints of the Trainer, with the record of the stages in `trainer_state.json`

Folders and files are written under a name that ends in `.partial` and renamed when they are complete.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
from accelerate.logging import get_logger
from safetensors import SafetensorError

from ..data.files import hash_files, partial_path, replacing, write_atomically

logger = get_logger(__name__)

STAGE_FILE = "sdpo_stage.json"


def stage_folder(output_dir: str | Path, number: int) -> Path:
    """Return the folder of the model at the end of a stage."""
    return Path(output_dir) / f"stage-{number}"


def is_complete(folder: Path, record: dict[str, Any]) -> bool:
    """
    Return whether a folder holds the complete model of a stage.

    Args:
        folder (`Path`):
            The folder.
        record (`dict[str, Any]`):
            Id and properties of the stage, as passed to [`publish_stage_folder`].
    """
    try:
        saved = json.loads((folder / STAGE_FILE).read_text())
        weights = saved.get("weights")  # missing in folders of earlier releases
        is_stage = {**saved, **record} == saved
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return is_stage and weights in (None, _hash_weights(folder))


def _hash_weights(folder: Path) -> str:
    return hash_files(sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")))


def publish_stage_folder(folder: Path, record: dict[str, Any]) -> None:
    """
    Write `sdpo_stage.json` next to a saved model and rename its folder.

    Args:
        folder (`Path`):
            Final name of the folder. The model must be in `partial_path(folder)`.
        record (`dict[str, Any]`):
            Content of `sdpo_stage.json`, to which a hash of the weights is added.
    """
    partial = partial_path(folder)
    shutil.rmtree(partial / "ref", ignore_errors=True)  # PEFT saves the reference adapter as well
    write_atomically(partial / STAGE_FILE, json.dumps({**record, "weights": _hash_weights(partial)}, indent=2))
    if folder.exists():  # from an earlier run
        shutil.rmtree(folder)
    os.replace(partial, folder)


def scores_file(output_dir: str | Path, number: int, name: str) -> Path:
    """Return the file with the log-probabilities of a dataset under the reference of a stage."""
    return Path(output_dir) / "sdpo" / f"stage-{number}-{name}.npz"


def write_scores(file: Path, scores: np.ndarray, scores_id: str) -> None:
    """
    Write the log-probabilities of a dataset.

    Args:
        file (`Path`):
            Target, from [`scores_file`].
        scores (`np.ndarray`):
            Log-probabilities of chosen and rejected, of shape `(2, rows)`, in nats.
        scores_id (`str`):
            Id of the stage start and the rows.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Given a name, `np.savez` would append ".npz" to it
    with replacing(file) as partial, partial.open("wb") as stream:
        np.savez(stream, scores=scores, id=scores_id)


def read_scores(file: Path, scores_id: str) -> np.ndarray | None:
    """Read log-probabilities of shape `(2, rows)`, or return `None` if the file is missing, broken or another one."""
    try:
        with np.load(file) as content:
            return content["scores"] if content["id"].item() == scores_id else None
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error):
        return None


@contextmanager
def reading_checkpoint(checkpoint: str | Path) -> Iterator[None]:
    """
    Raise a `ValueError` if a file of a checkpoint cannot be read in the context.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.

    Raises:
        ValueError: If a file is missing or truncated.
    """
    try:
        yield
    except (SafetensorError, OSError, EOFError, UnpicklingError, json.JSONDecodeError, RuntimeError) as error:
        if type(error) is RuntimeError and "PytorchStreamReader" not in str(error):  # of torch.load
            raise
        raise ValueError(
            f"Cannot resume from {checkpoint}: one of its files is missing, truncated or damaged "
            f"({type(error).__name__}: {error}). Remove this checkpoint to resume from an earlier one, or start a new "
            "run."
        ) from error


def read_trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """Read `trainer_state.json`, which the Trainer writes last, or return `None` if the checkpoint is incomplete."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("global_step"), int) else None


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | bool) -> tuple[Path, dict[str, Any]]:
    """
    Find the checkpoint to resume from.

    Args:
        output_dir (`str` or `Path`):
            Output folder of the run.
        resume_from_checkpoint (`str` or `bool`):
            Folder of a checkpoint, or `True` for the last complete checkpoint in `output_dir`.

    Returns:
        `tuple[Path, dict[str, Any]]`: The folder and the content of its `trainer_state.json`.

    Raises:
        ValueError: If there is no checkpoint, or if the given one is incomplete.
    """
    if isinstance(resume_from_checkpoint, (str, os.PathLike)):
        path = Path(resume_from_checkpoint)
        state = read_trainer_state(path)
        if state is None:
            raise ValueError(
                f"Cannot resume from {path}, which is not a complete checkpoint: its trainer_state.json is missing or "
                "truncated. Pass another checkpoint, or `resume_from_checkpoint=True` for the last complete one."
            )
        return path, state
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        state = read_trainer_state(path)
        if state is not None:
            return path, state
        logger.warning(f"Skipping {path}, which is not a complete checkpoint.")
    raise ValueError(f"No valid checkpoint found in output directory ({output_dir})")  # as transformers words it


def check_record(checkpoint: Path, state: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """
    Check that a checkpoint was saved by a run with the same stages.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint, for the error messages.
        state (`dict[str, Any]`):
            Content of its `trainer_state.json`.
        current (`dict[str, Any]`):
            Schedule, kind of reference and stages of the current run.

    Returns:
        `dict[str, Any]`: The record of the stages in the checkpoint.

    Raises:
        ValueError: If the checkpoint has no record or if the stages differ. The message lists the differences.
    """
    callback = state.get("stateful_callbacks", {}).get("SDPOCallback")
    if not callback:
        raise ValueError(
            f"Cannot resume from {checkpoint}: it was saved by a run without SDPOCallback, so it has no record of "
            "stages. Start a new run."
        )
    saved = (callback[-1] if isinstance(callback, list) else callback).get("attributes", {}).get("record", {})
    if not {"ids", *current} <= saved.keys():
        raise ValueError(
            f"Cannot resume from {checkpoint}: the record of its stages is incomplete. Pass another checkpoint, or "
            "start a new run."
        )
    differences = [
        f"{name}: {saved[name]!r} in the checkpoint, {current[name]!r} now"
        for name in ("schedule", "reference")
        if saved[name] != current[name]
    ]
    if len(saved["stages"]) != len(current["stages"]):
        differences.append(f"stages: {len(saved['stages'])} in the checkpoint, {len(current['stages'])} now")
    else:
        differences += [
            f"{name} of stage {number}: {old.get(name)!r} in the checkpoint, {value!r} now"
            for number, (old, new) in enumerate(zip(saved["stages"], current["stages"], strict=True), start=1)
            for name, value in new.items()
            if old.get(name) != value
        ]
    if differences:
        raise ValueError(
            f"Cannot resume from {checkpoint}, because the stages have changed: {'; '.join(differences)}. Use the "
            "data and options of the checkpoint (digest is a hash of the tokens), or start a new run."
        )
    return saved
