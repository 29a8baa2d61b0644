"""Data file formats, and atomic writes of files and folders. Standard library only."""

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

# Suffixes of data files, and the name of their builder in `datasets`
DATA_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# At most this many chunks of a file are hashed, since hashing all of it would take as long as loading the model
CHUNK, CHUNKS = 2**16, 64


def file_pattern(path: str) -> str:
    """Return a path for `load_dataset`, which takes `pairs[1].jsonl` for a pattern. An existing file is that file."""
    return glob.escape(path) if Path(path).exists() else path


def hash_files(files: Iterable[Path]) -> str:
    """
    Hash the names, the sizes and samples of the content of files.

    Args:
        files (`Iterable[Path]`):
            The files.

    Returns:
        `str`: The hash.
    """
    digest = sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(CHUNK, size // CHUNKS)):
                content.seek(start)
                digest.update(content.read(CHUNK))
    return digest.hexdigest()[:16]


def partial_path(path: Path) -> Path:
    """Return the name under which a file or folder is written, to be renamed when it is complete."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Write a file atomically: readers see the old content or all of the new content, even after a kill.

    Args:
        path (`str` or `Path`):
            The file. Its folder must exist.

    Yields:
        `Path`: File to write to. It replaces `path` at the end of the context, and is removed after an error.
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """
    Write content to a file atomically, see [`replacing`].

    Args:
        path (`str` or `Path`):
            The file. Its folder must exist.
        content (`str` or `bytes`):
            The content. Text is encoded as UTF-8.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
