"""Progress bars on a terminal, otherwise one line per minute."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as std_tqdm

INTERVAL = 60.0  # seconds between two lines


class ProgressLines(std_tqdm):
    """Progress as plain lines, for log files and pipes. Accepts the arguments of `tqdm`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._printed_at = time.monotonic()
        super().__init__(*args, **{**kwargs, "mininterval": INTERVAL, "miniters": 1})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line, at most once per minute."""
        if time.monotonic() - self._printed_at >= INTERVAL:
            self._printed_at = time.monotonic()
            print(self._line(), file=self.fp, flush=True)
        return True

    def close(self) -> None:
        """Close without printing, unlike tqdm."""
        if not self.disable:
            self.disable: bool = True
            self._decr_instances(self)

    def _line(self) -> str:
        elapsed, own = self.format_dict["elapsed"], self.n - self.initial
        done = f"{self.n}/{self.total}" if self.total else f"{self.n}"
        parts = [f"{self.desc.strip().rstrip(':')}: {done} {self.unit.strip()}", _duration(elapsed)]
        if own and elapsed:
            rate = 60 * own / elapsed
            parts.append(f"{rate:,.0f}/min" if rate >= 10 else f"{rate:.1f}/min")
        if self.total and own:
            parts.append(f"{_duration(elapsed / own * (self.total - self.n))} left")
        return ", ".join([*parts, *([self.postfix.replace("=", " ")] if self.postfix else [])])


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """
    Create a progress bar, or [`ProgressLines`] without a terminal.

    Args:
        *args, **kwargs:
            Arguments of `tqdm`.

    Returns:
        `tqdm`: A bar on a terminal or in a notebook, otherwise [`ProgressLines`].
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(*args, **kwargs)
    return ProgressLines(*args, **kwargs)


def count_stored(bar: Any, number: int) -> None:
    """
    Count work that an earlier process has done. It and its time do not count for the rate and the time left.

    Args:
        bar (`tqdm`):
            The progress bar.
        number (`int`):
            How much work.
    """
    if not bar.disable:  # a disabled bar has no clock
        bar.n += number
        bar.initial = bar.last_print_n = bar.n
        bar.unpause()
