"""Names of models and of sets of corrections in the files of a run."""

import re
from pathlib import Path

from ..generation import ModelSpec
from .judges.expressions import canonical
from .records import text_digest


def model_file_name(model: str, *more: object) -> str:
    """
    Return the name of a model in file names.

    Args:
        model (`str`):
            Model id or path.
        more (`object`):
            Other values that distinguish the model.

    Returns:
        `str`: The last part of the id or path, and a hash of all arguments.
    """
    return f"{re.sub(r'[^A-Za-z0-9-]+', '_', Path(model).name) or 'model'}-{text_digest(model, *more)[:6]}"


def corrections_name(judge_name: str, rectifier: ModelSpec | None) -> str:
    """
    Return the name of a set of corrections, `JUDGE` or `JUDGE.by-MODEL`.

    Args:
        judge_name (`str`):
            Judge expression.
        rectifier (`ModelSpec`, *optional*):
            Model that writes the preferred steps, if it is not the one that wrote the solutions.

    Returns:
        `str`: The name.
    """
    found_in = canonical(judge_name)
    return f"{found_in}.by-{model_file_name(rectifier.model)}" if rectifier else found_in
