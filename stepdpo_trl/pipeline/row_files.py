"""Rows of JSON Lines and Parquet files, which stay on disk."""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ..data.files import file_pattern
from ..data.messages import similar_file
from ..runs.run_directory import RunError


def open_rows(path: Path) -> Sequence[Any]:
    """
    Open a file of rows. They are read when they are used.

    Args:
        path (`Path`):
            JSON Lines, or Parquet if it ends in `.parquet`.

    Returns:
        `Sequence`: The rows.

    Raises:
        RunError: If the file does not exist or cannot be read.
    """
    if not path.is_file():
        raise RunError(f"There is no file {path}.{similar_file(path)}")
    if path.suffix != ".parquet":
        return JsonLines(path)
    from datasets import Dataset

    try:
        # In a cache of its own: the shared one knows files by path and time, and returns old rows after some edits
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            rows: Sequence[Any] = Dataset.from_parquet(file_pattern(str(path)), cache_dir=cache)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as Parquet: {error}") from error
    return rows


def describe_source(path: str | Path) -> dict[str, str]:
    """
    Describe a file of problems for the data card.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `dict[str, str]`: `path`, and `sha256` of the content if the file exists.
    """
    if not Path(path).is_file():
        return {"path": str(path)}
    with Path(path).open("rb") as file:
        return {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class JsonLines(Sequence[Any]):
    """
    Lines of a JSON Lines file, without blank ones.

    Args:
        path (`Path`):
            The file. It must not change as long as it is in use.

    Raises:
        RunError: If the file has changed, or a line is not JSON. Lines are checked when they are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._state = self._stat()
        self._offsets = array("q")
        offset = 0
        for line in self._file:
            if line.strip():
                self._offsets.append(offset)
            offset += len(line)

    def _stat(self) -> tuple[int, ...]:
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return ()
        return state.st_ino, state.st_size, state.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._stat() != self._state:
            raise RunError(f"{self.path} was changed while the command was running. Rerun the command.")

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        self._check_unchanged()
        self._file.seek(self._offsets[index])
        return self._parse(self._file.readline(), self._offsets[index])

    def __iter__(self) -> Iterator[Any]:
        self._check_unchanged()
        with self.path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    yield self._parse(line, offset)
                offset += len(line)

    def _parse(self, line: bytes, offset: int) -> Any:
        try:
            text = line.decode("utf-8" if offset else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise RunError(
                f"{self.path} is not UTF-8 (line {self._number(offset)}: {error}). Save it as UTF-8."
            ) from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"Line {self._number(offset)} of {self.path} is not JSON ({error}): {text.rstrip()[:60]!r}. Problems "
                "are read from JSON Lines, with one object per line, or from .parquet."
            ) from error

    def _number(self, offset: int) -> int:
        with self.path.open("rb") as file:
            return next(number for number, line in enumerate(file, start=1) if (offset := offset - len(line)) < 0)
