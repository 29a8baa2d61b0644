"""Problems to evaluate on: named datasets, or files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.checkers import MATH, Checker
from ..data.messages import did_you_mean
from ..pipeline.records import Problem, problems_of, read_problems, text_digest
from ..quickstart.arithmetic import make_problems, write_solution
from ..runs.run_directory import RunError

NUM_ARITHMETIC_PROBLEMS = 1000  # without a limit, as in the quickstart


def _arithmetic(limit: int | None, checker: Checker) -> list[Problem]:
    drawn = make_problems(limit or NUM_ARITHMETIC_PROBLEMS, "held_out")
    return [
        Problem(text_digest(problem.text), problem.text, problem.answer, write_solution(problem)) for problem in drawn
    ]


def _published(*name: str) -> Callable[[int | None, Checker], list[Problem]]:
    """Return a function that loads the test split of a dataset from the Hub."""

    def load(limit: int | None, checker: Checker) -> list[Problem]:
        from datasets import load_dataset

        try:
            rows: Any = load_dataset(*name, split="test")
        except Exception as error:  # raised by the Hub client, the network or the disk
            raise RunError(
                f"The dataset {name[0]!r} cannot be loaded ({type(error).__name__}: {error}). Without a network, "
                "pass a file: --problems FILE.jsonl with `problem` and `answer`."
            ) from error
        return problems_of(list(rows), name[0], limit, checker)

    return load


PROBLEM_SETS: dict[str, Callable[[int | None, Checker], list[Problem]]] = {
    "gsm8k": _published("openai/gsm8k", "main"),
    "math-500": _published("HuggingFaceH4/MATH-500"),
    "arithmetic": _arithmetic,
}


def load_problems(name: str, limit: int | None = None, checker: Checker = MATH) -> Sequence[Problem]:
    """
    Load a problem set by name, or problems from a file.

    Args:
        name (`str`):
            A name in [`PROBLEM_SETS`], or a file as for [`~stepdpo_trl.pipeline.records.read_problems`].
        limit (`int`, *optional*):
            Number of problems to load, from the first.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.

    Returns:
        `Sequence[Problem]`: The problems.

    Raises:
        RunError: If there is no such problem set or file, or its rows are not valid problems.
    """
    if name in PROBLEM_SETS:
        return PROBLEM_SETS[name](limit, checker)
    if not Path(name).suffix and not Path(name).exists():
        raise RunError(
            f"--problems {name!r} is neither a file nor a known problem set."
            f"{did_you_mean(name.lower(), PROBLEM_SETS)} Pass one of {sorted(PROBLEM_SETS)}, or a file that "
            "ends in .jsonl or .parquet."
        )
    return read_problems(name, limit, checker)
