"""
What a run in stages keeps in `output_dir`, and how it tells what was written to the end.

    stage-1/ ...                  the model after each stage, with `sdpo_stage.json`
    sdpo/stage-1-train.npz ...    log-probabilities under each stage's reference
    checkpoint-100/ ...           the Trainer's, which say in `trainer_state.json` what the stages were
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger

logger = get_logger(__name__)

STAGE_FILE = "sdpo_stage.json"


def stage_folder(output_dir: str | Path, number: int) -> Path:
    """Where the model after a stage is."""
    return Path(output_dir) / f"stage-{number}"


def is_whole(folder: Path, id: str) -> bool:
    """Whether a stage's model was saved to the end, and is the one that the next stage started with."""
    file = folder / STAGE_FILE
    return file.is_file() and json.loads(file.read_text())["id"] == id


def seal(partial: Path, folder: Path, record: dict[str, Any]) -> None:
    """Give the folder that a stage's model was written to its name."""
    shutil.rmtree(partial / "ref", ignore_errors=True)  # the reference's adapter, which PEFT saves too
    (partial / STAGE_FILE).write_text(json.dumps(record, indent=2))
    if folder.exists():  # of an earlier run
        shutil.rmtree(folder)
    os.replace(partial, folder)


def scores_file(output_dir: str | Path, number: int, name: str) -> Path:
    """Where the log-probabilities under a stage's reference are, of shape `(2, rows)`: chosen, rejected."""
    return Path(output_dir) / "sdpo" / f"stage-{number}-{name}.npz"


def write_scores(file: Path, scores: np.ndarray, id: str) -> None:
    """Write the scores of a stage's start and data; the file appears when all of it is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, scores=scores, id=id)
    os.replace(partial, file)


def read_scores(file: Path, id: str) -> np.ndarray | None:
    """Read the scores, if they are of this start and data."""
    if not file.is_file():
        return None
    with np.load(file) as content:
        return content["scores"] if content["id"].item() == id else None


def trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """The Trainer's state, which it writes last into a checkpoint; `None` where it did not come so far."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def find_checkpoint(output_dir: str | Path, given: str | bool) -> tuple[Path, dict[str, Any]]:
    """
    The checkpoint to resume from, and its state: the one given, or the last one that was written to the end.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        state = trainer_state(path)
        if state is None:
            raise ValueError(f"{path} is no whole checkpoint: its trainer_state.json is missing or cut off.")
        return path, state
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        state = trainer_state(path)
        if state is not None:
            return path, state
        logger.warning(f"{path} was not written to the end and is passed over.")
    raise ValueError(f"No valid checkpoint found in output directory ({output_dir})")


def check_record(checkpoint: Path, state: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """
    What a checkpoint says of its run, if its stages are those of now.

    Raises:
        ValueError: If they are not, with what differs.
    """
    callback = state.get("stateful_callbacks", {}).get("SDPOCallback")
    if not callback:
        raise ValueError(f"{checkpoint} is from a run without SDPOCallback: it says nothing of stages. Train anew.")
    then = (callback[-1] if isinstance(callback, list) else callback)["attributes"]["record"]
    differences = [
        f"{name}: {then[name]!r} then, {now[name]!r} now"
        for name in ("schedule", "reference")
        if then[name] != now[name]
    ]
    if len(then["stages"]) != len(now["stages"]):
        differences.append(f"{len(then['stages'])} stages then, {len(now['stages'])} now")
    else:
        differences += [
            f"{name} of stage {number}: {old[name]!r} then, {value!r} now"
            for number, (old, new) in enumerate(zip(then["stages"], now["stages"], strict=True), start=1)
            for name, value in new.items()
            if old[name] != value
        ]
    if differences:
        raise ValueError(
            f"{checkpoint} is from other stages than the ones given now: {'; '.join(differences)}. Resume with the "
            "data and options of then (digest is a hash of the tokens), or train anew."
        )
    return then
