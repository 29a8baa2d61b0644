"""Append-only logs of keyed records, which survive a killed process and need little memory."""

import contextlib
import errno
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from .log_index import KeyIndex, digest
from .log_view import StreamedMapping

BATCH = 4096  # records per write
RECENT = 50_000  # appended records whose keys are kept in memory, about 10 MB
SAVED_BYTES = 32 * 2**20  # the index is stored each time that this much has been added to the log
_BUFFER = 2**20
_TAIL = 4096
_START = re.compile(rb'\{"key": "([^"\\]*)"[,}]')  # of lines as this class writes them

logger = logging.getLogger(__name__)


class RunError(Exception):
    """Error that the user can fix. The message says what failed and how to fix it."""


class Log(StreamedMapping[dict[str, Any]]):
    """
    Append-only file of keyed records, one JSON object per line. The last record of a key counts.

    Records stay on disk: lookups read one line, and iteration reads the file in the order in which the keys were first
    appended. In memory is only an index, see [`~stepdpo_trl.runs.log_index.KeyIndex`]. That of a large file is stored
    next to it, with the suffix `.index`. It is optional: if it is missing or does not fit the file, the file is
    scanned.

    Args:
        path (`Path`):
            The file. It is created with the first record. If its last line is incomplete because a process was killed
            while writing, the line is removed with a warning.

    Raises:
        RunError: If a complete line is not a record. Opening checks the beginning and the end of the lines. The rest
            is checked when a record is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = KeyIndex(self._key_at)
        self._recent: dict[str, int] = {}  # positions of the keys that are not indexed yet
        self._reader: Any = None
        self._lock = threading.Lock()  # for the position of the reader
        self._saved = 0  # bytes that the stored index covers
        if path.exists():
            self._open()

    def _open(self) -> None:
        size = self.path.stat().st_size
        end = self._saved = self._index.load(self._index_path, size, self._tail_digest)
        digests, offsets = bytearray(), self._index.offsets
        with self.path.open("rb", buffering=_BUFFER) as file:
            file.seek(end)
            match = _START.match  # this loop is most of the time of opening
            for line in file:
                start = match(line)
                if start and line.endswith(b"}\n"):
                    key = start[1]
                elif line.endswith(b"\n"):
                    key = self._parse_key(line, end)
                else:
                    self._remove_end(end, len(line))
                    break
                digests += digest(key)
                offsets.append(end)
                end += len(line)
        self._index.add(digests)
        self._save_index(end)

    def _remove_end(self, size: int, removed: int) -> None:
        logger.warning(
            f"{self.path} ends in the middle of a record, probably because a process was killed while writing. The "
            f"last {removed} bytes are removed, and their record will be computed again."
        )
        with self.path.open("r+b") as file:
            file.truncate(size)

    @property
    def _index_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.index")

    def _save_index(self, size: int) -> None:
        if size - self._saved >= SAVED_BYTES:
            self._index.save(self._index_path, size, self._tail_digest(size))
            self._saved = size

    def _tail_digest(self, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(max(0, size - _TAIL))
            return blake2b(file.read(min(size, _TAIL)), digest_size=16).digest()

    def _parse_key(self, line: bytes, offset: int) -> bytes:
        """Return the key of a line in UTF-8. Checks the beginning and the end of the line."""
        start = _START.match(line)
        if start and line.endswith(b"}\n"):
            return start[1]
        return self._parse(line, offset)[0].encode()

    def _key(self, line: bytes, offset: int) -> str:
        try:
            return self._parse_key(line, offset).decode()
        except UnicodeDecodeError:
            return self._parse(line, offset)[0]  # explains the error

    def _parse(self, line: bytes, offset: int) -> tuple[str, dict[str, Any]]:
        try:
            record = json.loads(line.decode())
            key = record.pop("key")
            key.encode()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise RunError(
                f"Line {self._line_number(offset)} of {self.path} is not a record of this package ({line[:80]!r}). "
                "Restore the file, or remove the line to compute its record again."
            ) from error
        return key, record

    def _line_number(self, offset: int) -> int:
        number = 1
        with self.path.open("rb") as file:
            while offset > 0 and (block := file.read(min(offset, _BUFFER))):
                number += block.count(b"\n")
                offset -= len(block)
        return number

    def _line_at(self, offset: int) -> bytes:
        with self._lock:
            if self._reader is None:
                self._reader = self.path.open("rb")
                weakref.finalize(self, self._reader.close)
            self._reader.seek(offset)
            return bytes(self._reader.readline())

    def _key_at(self, offset: int) -> str:
        return self._key(self._line_at(offset), offset)

    def _find(self, key: str) -> int | None:
        position = self._recent.get(key)
        return self._index.find(key) if position is None else position

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the offsets and lines of all keys, in the order in which the keys were first appended."""
        if not self._index.offsets:
            return
        with self.path.open("rb", buffering=_BUFFER) as file:
            end = 0
            for offset in self._index.offsets:
                if offset != end:
                    file.seek(offset)
                line = file.readline()
                end = offset + len(line)
                yield offset, line

    def __getitem__(self, key: str) -> dict[str, Any]:
        position = self._find(key)
        if position is None:
            raise KeyError(key)
        offset = self._index.offsets[position]
        return self._parse(self._line_at(offset), offset)[1]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    def __iter__(self) -> Iterator[str]:
        for offset, line in self._lines():
            yield self._key(line, offset)

    def __len__(self) -> int:
        return len(self._index.offsets)

    def stream(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield all keys and records."""
        return (self._parse(line, offset) for offset, line in self._lines())

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """
        Append one record. It is on disk when this returns.

        Args:
            key (`str`):
                Key of the record.
            record (`Mapping[str, Any]`):
                The record.

        Raises:
            RunError: If the record cannot be written.
        """
        self.extend([(key, record)])

    def extend(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """
        Append several records, in writes of at most 4,096. They are on disk when this returns.

        Args:
            records (`Iterable[tuple[str, Mapping[str, Any]]]`):
                Keys and records.

        Raises:
            RunError: If the disk is full or the file cannot be written. The records of earlier writes are kept, and
                nothing of the failed one.
        """
        lines = ((key, _encode(key, record)) for key, record in records)
        self._write(list(islice(lines, BATCH)))
        while batch := list(islice(lines, BATCH)):
            self._write(batch)

    def _write(self, lines: list[tuple[str, bytes]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            offset = _append(self.path, b"".join(line for _, line in lines))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cause = "The disk is full" if full else f"The file cannot be written ({error.strerror})"
            raise RunError(
                f"{cause}: {len(lines)} records of {self.path} were not saved. All earlier records are safe. "
                f"{'Free disk space' if full else 'Fix this'} and rerun the same command to resume."
            ) from error
        for key, line in lines:
            position = self._find(key)
            if position is None:
                self._recent[key] = len(self._index.offsets)
                self._index.offsets.append(offset)
            else:
                self._index.offsets[position] = offset
            offset += len(line)
        if len(self._recent) >= RECENT:
            self._index.add(b"".join(digest(key.encode()) for key in self._recent))
            self._recent.clear()
            self._save_index(offset)


def _encode(key: str, record: Mapping[str, Any]) -> bytes:
    return f"{json.dumps({'key': key, **record}, ensure_ascii=False)}\n".encode()


def _append(path: Path, content: bytes) -> int:
    """Append to a file, all or nothing. Return its previous size."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            written = 0
            while written < len(content):
                written += file.write(content[written:])
            os.fsync(file.fileno())
        except BaseException:  # includes Ctrl-C, after which more records may follow
            with contextlib.suppress(OSError):  # an incomplete line would be removed by the next reader
                file.truncate(before)
            raise
        return before
