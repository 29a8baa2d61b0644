"""
Step-DPO and sDPO combined: stages as in sDPO, each on step pairs sampled from the model of the previous stage.

Stage t makes step pairs from the mistakes of M_{t-1} and trains M_{t-1} on them, with M_{t-1} as the reference model.

    stage-1/run/ ...        run folder of the data pipeline
    stage-1/pairs.jsonl     step pairs
    stage-1/training/ ...   checkpoints
    stage-1/model/ ...      model after the stage
    settings.jsonl          settings of the loop
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..runs.run_directory import RunDirectory

PAIRS, RUN, TRAINING, MODEL = "pairs.jsonl", "run", "training", "model"  # in the folder of a stage

# Part of a stage, called with the number of the stage, the model of the previous stage, and the folder of the stage
StagePart = Callable[[int, str, Path], None]


def run_loop(
    out: Path, model: str, stages: int, make_pairs: StagePart, train: StagePart, settings: Mapping[str, Any]
) -> None:
    """
    Make step pairs and train on them, stage after stage. Parts that are already complete are skipped.

    Args:
        out (`Path`):
            Folder of the loop.
        model (`str`):
            Model id or path of the initial model M_0.
        stages (`int`):
            Total number of stages.
        make_pairs (`StagePart`):
            Function that writes `pairs.jsonl`. The file must only appear when it is complete.
        train (`StagePart`):
            Function that trains on the pairs and writes `model/`. The folder must only appear when it is complete.
        settings (`Mapping[str, Any]`):
            Settings that must be the same in all stages.

    Raises:
        RunError: If the folder holds a loop with other settings, or another process works in it.
    """
    with RunDirectory(out, create=True, inherited=True) as run:
        for number in range(1, stages + 1):
            folder = out / f"stage-{number}"
            folder.mkdir(exist_ok=True)
            if not (folder / PAIRS).exists() and not (folder / MODEL).exists():
                make_pairs(number, model, folder)
            run.keep_settings("loop", settings)  # after the pairs, so that a failed first command can be corrected
            if not (folder / MODEL).exists():
                train(number, model, folder)
            model = str(folder / MODEL)
