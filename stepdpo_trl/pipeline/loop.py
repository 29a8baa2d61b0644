"""
The two papers joined: stages as in sDPO, each on step pairs sampled anew from the model that the last one made.

Stage t asks M_{t-1} for pairs (its mistakes, in its words) and trains M_{t-1} on them, which is the reference too.

    stage-1/run/ ...        the data pipeline's folder
    stage-1/pairs.jsonl     its pairs
    stage-1/training/ ...   checkpoints
    stage-1/model/ ...      the model after the stage
    settings.jsonl          what was asked for
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..runs.run_directory import RunDirectory

PAIRS, RUN, TRAINING, MODEL = "pairs.jsonl", "run", "training", "model"  # in the folder of a stage

# What a stage does. Each takes number of the stage, model of the stage before, and folder of the stage.
Work = Callable[[int, str, Path], None]


def run_loop(out: Path, model: str, stages: int, make_pairs: Work, train: Work, settings: Mapping[str, Any]) -> None:
    """
    Make pairs and train on them, stage after stage. What is there already is not done again.

    Args:
        out (`Path`):
            Folder of the loop.
        model (`str`):
            The model to begin with, M_0.
        stages (`int`):
            How many stages to end with.
        make_pairs (`Work`):
            Writes `pairs.jsonl`, once it is whole.
        train (`Work`):
            Trains on it, and leaves the model in `model/`, once it is whole.
        settings (`Mapping`):
            What holds for all stages. More stages may be asked for later.

    Raises:
        RunError: If the folder holds another loop, or another process works on it.
    """
    with RunDirectory(out, create=True, inherited=True) as run:
        for number in range(1, stages + 1):
            folder = out / f"stage-{number}"
            folder.mkdir(exist_ok=True)
            if not (folder / PAIRS).exists() and not (folder / MODEL).exists():
                make_pairs(number, model, folder)
            run.keep_settings("loop", settings)  # nothing rests on them before there are pairs
            if not (folder / MODEL).exists():
                train(number, model, folder)
            model = str(folder / MODEL)
