"""Problems to evaluate on: known sets by name, or files."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..pipeline.records import Problem, problems_of, read_problems, text_digest
from ..quickstart.arithmetic import make_problems, write_solution
from ..runs.run_directory import RunError

ARITHMETIC = 1000  # problems, as in the quickstart


def _arithmetic(limit: int | None) -> list[Problem]:
    drawn = make_problems(limit or ARITHMETIC, "held_out")
    return [Problem(text_digest(one.text), one.text, one.answer, write_solution(one)) for one in drawn]


def _published(*name: str) -> Callable[[int | None], list[Problem]]:
    """The test split of a data set of the hub."""

    def load(limit: int | None) -> list[Problem]:
        from datasets import load_dataset

        try:
            rows: Any = load_dataset(*name, split="test")
        except Exception as error:  # of the hub's client, of what it connects through, of the disk
            raise RunError(
                f"The data set {name[0]!r} cannot be loaded ({type(error).__name__}: {error}). Without a network give "
                "a file instead: --problems FILE.jsonl with `problem` and `answer`."
            ) from error
        return problems_of(list(rows), name[0], limit)

    return load


PROBLEM_SETS: dict[str, Callable[[int | None], list[Problem]]] = {
    "gsm8k": _published("openai/gsm8k", "main"),
    "math-500": _published("HuggingFaceH4/MATH-500"),
    "arithmetic": _arithmetic,
}


def load_problems(name: str, limit: int | None = None) -> list[Problem]:
    """
    Load problems.

    Args:
        name (`str`):
            A name in [`PROBLEM_SETS`], or a file as for [`~stepdpo_trl.pipeline.records.read_problems`].
        limit (`int`, *optional*):
            Take the first so many.

    Returns:
        `list[Problem]`: The problems.

    Raises:
        RunError: If there are none of that name, or they cannot be used.
    """
    if name in PROBLEM_SETS:
        return PROBLEM_SETS[name](limit)
    if not Path(name).suffix and not Path(name).exists():
        near = get_close_matches(name.lower(), PROBLEM_SETS, n=1, cutoff=0)[0]
        raise RunError(
            f"--problems {name!r} is neither a file nor a known set. Did you mean {near!r}? Known: "
            f"{sorted(PROBLEM_SETS)}; files end in .jsonl or .parquet."
        )
    return read_problems(name, limit)
