"""Data file formats and atomic writes. Standard library only."""

import os
from pathlib import Path

# Suffixes of data files, and the name of their builder in `datasets`
DATA_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """
    Write a file atomically: readers see the old content or all of the new content, even after a kill.

    Args:
        path (`str` or `Path`):
            The file. Its folder must exist.
        content (`str` or `bytes`):
            The content. Text is encoded as UTF-8.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
