"""Parts that several experiments share: files of rows, a control judge, tables and bars."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stepdpo_trl.data.files import write_atomically
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.pipeline.records import Solution, Verdict
from stepdpo_trl.runs.tasks import Task

GREY, BLUE, ORANGE, GREEN = "#8a8f98", "#2563eb", "#d97706", "#16803c"
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a JSON Lines file, which only appears when it is complete."""
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def random_judge(solution: Solution) -> Task[Verdict]:
    """Name a random step, as a control."""
    step = random.Random(solution.key).randint(1, len(split_steps(solution.text, solution.style)))
    return Verdict(step, "random", {})
    yield  # makes this function a generator, as tasks must be


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def compact(value: Any) -> Any:
    """Shorten results: join lists of 0 and 1 to strings, and round floats to five significant digits."""
    if isinstance(value, dict):
        return {name: compact(part) for name, part in value.items()}
    if isinstance(value, list):
        return "".join(map(str, value)) if set(map(str, value)) <= {"0", "1"} else list(map(compact, value))
    return float(f"{value:.5g}") if isinstance(value, float) else value


def draw_bars(axis: Any, bars: Sequence[tuple[str, float, tuple[float, float]]], highlighted: str) -> None:
    """
    Draw horizontal bars with intervals and values, the first one at the top.

    Args:
        axis (`matplotlib.axes.Axes`):
            Axes to draw on.
        bars (`Sequence[tuple[str, float, tuple[float, float]]]`):
            Name, value, and lower and upper bound of each bar, in percent.
        highlighted (`str`):
            Name of the bar in another color.
    """
    for place, (name, value, (low, high)) in enumerate(reversed(bars)):
        color = BLUE if name == highlighted else GREY
        errors = [[value - low], [high - value]]
        axis.barh(place, value, color=color, height=0.62, xerr=errors, error_kw={"ecolor": "#222", "capsize": 3})
        axis.text(high + 0.8, place, f"{value:.1f}", va="center", color=color, fontweight="bold")
    axis.set_yticks(range(len(bars)), [name for name, *_ in reversed(bars)])
