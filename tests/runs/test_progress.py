import io
import sys

import pytest
from tqdm.auto import tqdm

from stepdpo_trl.runs import progress
from stepdpo_trl.runs.progress import ProgressLines, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Clock that only advances when a test sets it."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_one_line_per_minute(clock):
    out = io.StringIO()
    counts = {}
    with ProgressLines(total=400, desc="collect 2", unit=" problems", file=out, disable=False) as bar:
        for number in range(1, 13):  # ten seconds each
            clock[0] += 10
            counts = {"right": 7 * number, "wrong": 3 * number}
            bar.update(10)
            bar.set_postfix(counts)
    assert out.getvalue().splitlines() == [
        "collect 2: 60/400 problems, 1 min, 60/min, 5 min left, right 35, wrong 15",
        "collect 2: 120/400 problems, 2 min, 60/min, 4 min left, right 77, wrong 33",
    ]
    assert "\r" not in out.getvalue()


def test_short_work_prints_nothing(clock):
    out = io.StringIO()
    with ProgressLines(total=2, desc="collect", unit=" problems", file=out, disable=False) as bar:
        bar.update(2)
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_on_a_terminal_only(monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress_bar(total=1, disable=True) as bar:
        assert isinstance(bar, ProgressLines) != terminal
        assert isinstance(bar, tqdm) == terminal


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (60, "1 min"), (3599, "59 min"), (3720, "1 h 02 min")])
def test_durations(seconds, text):
    assert progress._duration(seconds) == text
