"""Problems to make step pairs from: files, or training sets by name."""

from collections.abc import Sequence
from pathlib import Path

from ..data.checkers import MATH, Checker
from ..evaluation.problems import NUM_ARITHMETIC_PROBLEMS, PROBLEM_SETS
from ..pipeline.records import Problem, problems_of, read_problems, text_digest
from ..quickstart.arithmetic import make_problems, write_solution
from ..runs.run_directory import RunError

TRAINING_SETS = ("gsm8k", "arithmetic")


def load_training_problems(name: str, limit: int | None = None, checker: Checker = MATH) -> Sequence[Problem]:
    """
    Load problems to make step pairs from.

    A name selects the training split, while `eval` uses the test split. So a model is never evaluated on problems
    that it was trained on.

    Args:
        name (`str`):
            A name in `TRAINING_SETS`, or a file as for [`~stepdpo_trl.pipeline.records.read_problems`].
        limit (`int`, *optional*):
            Number of problems to load, from the first.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.

    Returns:
        `Sequence[Problem]`: The problems.

    Raises:
        RunError: If the problems do not exist or cannot be used.
    """
    if name == "arithmetic":
        drawn = make_problems(limit or NUM_ARITHMETIC_PROBLEMS, "pairs")
        return [Problem(text_digest(one.text), one.text, one.answer, write_solution(one)) for one in drawn]
    if name == "gsm8k":
        from datasets import load_dataset

        try:
            rows = list(load_dataset("openai/gsm8k", "main", split="train"))
        except Exception as error:  # raised by the Hub client, the network or the disk
            raise RunError(
                f"The dataset 'openai/gsm8k' cannot be loaded ({type(error).__name__}: {error}). Without a network, "
                "pass a file: --problems FILE.jsonl with `problem` and `answer`."
            ) from error
        return problems_of(rows, name, limit, checker)
    if name in PROBLEM_SETS:
        raise RunError(
            f"--problems {name} is a test set: a model trained on its problems cannot be evaluated on it. Use one of "
            f"{', '.join(TRAINING_SETS)}, or a .jsonl or .parquet file."
        )
    if not Path(name).suffix and not Path(name).exists():
        raise RunError(
            f"--problems {name!r} is neither a file nor a known dataset. Use one of {', '.join(TRAINING_SETS)}, or a "
            ".jsonl or .parquet file."
        )
    return read_problems(name, limit, checker)
