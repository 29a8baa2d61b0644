r"""A small model that makes mistakes and step pairs built from them, to try Step-DPO on a CPU in a minute.

- `MODEL_PATH`: Folder of a language model with 0.8 million parameters and its tokenizer. The model evaluates
  expressions such as 7 + 3 * 4 - 5 step by step and gets about a quarter of them wrong with greedy decoding.
- `PAIRS_PATH`: JSON Lines file of step pairs sampled from this model, with the columns of `xinlai/Math-Step-DPO-10K`.
- [`make_problems`], [`first_wrong_step`] and others: Problems of the same kind and exact checks of their steps.
- [`count_correct`]: Number of problems that a model solves.

The model and the step pairs were created with `examples/make_quickstart_model.py`.
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
    split_labeled_steps,
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
    "split_labeled_steps",
    "write_solution",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: generation needs torch, the problems do not.
    if name in ("count_correct", "generate_solutions"):
        return getattr(import_module(".evaluate", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
