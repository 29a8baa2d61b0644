r"""A small model that makes mistakes, and step pairs made from them: Step-DPO to try in a minute, on a CPU.

- `MODEL_PATH`: folder of a language model of 0.8 million parameters, with its tokenizer. It works out expressions such
  as 7 + 3 * 4 - 5 step by step, and gets a third of them wrong.
- `PAIRS_PATH`: JSON lines with step pairs sampled from that model, in the columns of `xinlai/Math-Step-DPO-10K`.
- [`make_problems`], [`first_wrong_step`], ...: problems of the same kind, and the truth about each step.
- [`count_correct`]: the number of such problems that a model solves.

Both were made by `examples/make_quickstart_model.py`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arithmetic import (
    ArithmeticProblem,
    first_lost_step,
    first_wrong_step,
    is_right_step,
    make_problems,
    read_result,
    split_labelled_steps,
    write_solution,
)

if TYPE_CHECKING:
    from .evaluate import count_correct, generate_solutions

MODEL_PATH = Path(__file__).parent / "model"
PAIRS_PATH = Path(__file__).parent / "step_pairs.jsonl"

__all__ = [
    "MODEL_PATH",
    "PAIRS_PATH",
    "ArithmeticProblem",
    "count_correct",
    "first_lost_step",
    "first_wrong_step",
    "generate_solutions",
    "is_right_step",
    "make_problems",
    "read_result",
    "split_labelled_steps",
    "write_solution",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: generation needs torch, the problems do not.
    if name in ("count_correct", "generate_solutions"):
        return getattr(import_module(".evaluate", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
