"""
Published formats, from which step pairs and solutions with a known first wrong step are read.

The supported datasets are PRM800K, Math-Shepherd and ProcessBench. Their files are read as published, optionally
compressed with gzip. All importers use the standard library only.
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
    """
    Readers of a published format.

    Args:
        pairs (`Callable`, *optional*):
            Reads step pairs, or `None` if the format has none.
        cases (`Callable`):
            Reads [`LocalizationCase`]s.
    """

    pairs: Callable[[str | Path, Counter[str] | None], Iterator[dict[str, Any]]] | None
    cases: Callable[[str | Path, Counter[str]], Iterator[LocalizationCase]]


FORMATS = {
    "prm800k": Format(read_prm800k, prm800k_cases),
    "math_shepherd": Format(read_math_shepherd, math_shepherd_cases),
    "processbench": Format(None, read_processbench),
}
