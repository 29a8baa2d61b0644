"""
Step pairs, and solutions whose first wrong step is known, from what others published: PRM800K, Math-Shepherd and
ProcessBench. The files are read as they are, zipped (.gz) or not. Standard library only.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .math_shepherd import math_shepherd_cases, read_math_shepherd
from .prm800k import prm800k_cases, read_prm800k
from .processbench import read_processbench
from .published import LocalizationCase


class Format(NamedTuple):
    """The readers of a format: `pairs` of step pairs, if it has any, and `cases` of [`LocalizationCase`]s."""

    pairs: Callable[[str | Path, Counter[str] | None], Iterator[dict[str, Any]]] | None
    cases: Callable[[str | Path, Counter[str]], Iterator[LocalizationCase]]


FORMATS = {
    "prm800k": Format(read_prm800k, prm800k_cases),
    "math_shepherd": Format(read_math_shepherd, math_shepherd_cases),
    "processbench": Format(None, read_processbench),
}
