"""The folder of a run: keyed records, appended as they arrive, that survive a kill. Standard library only."""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class RunError(Exception):
    """What a user can mend: the message says what happened and what to do."""


class Log(Mapping[str, dict[str, Any]]):
    """
    An append-only file of keyed records, one a line. The last record of a key counts.

    Args:
        path (`Path`):
            The file, made with the first record. A last line that was cut short by a kill is removed, and said so.

    Raises:
        RunError: If a line other than the last is not a record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning(
                f"{self.path} ends in the middle of a record, as it does when a process is killed while it writes. "
                f"The last {len(content) - whole} bytes are removed; what they held is done again."
            )
            with self.path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise RunError(
                    f"Line {number} of {self.path} is not a record of this program ({line[:80]!r}). Restore the file, "
                    "or remove the line: what it held is done again."
                ) from error

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """Append one record; it is on the disk when this returns."""
        self.extend([(key, record)])

    def extend(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """
        Append records in one write; they are on the disk when this returns.

        Raises:
            RunError: If the disk is full or cannot be written to. The file is then as it was before.
        """
        kept = [(key, dict(record)) for key, record in records]
        lines = "".join(json.dumps({"key": key, **record}, ensure_ascii=False) + "\n" for key, record in kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _append(self.path, lines.encode())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "The disk is full" if full else f"The file cannot be written ({error.strerror})"
            raise RunError(
                f"{what}: {len(kept)} records for {self.path} were not kept. All before them are safe. "
                f"{'Make room' if full else 'Mend that'} and give the same command again: it goes on from there."
            ) from error
        self._records.update(kept)


def _append(path: Path, content: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            written = 0
            while written < len(content):
                written += file.write(content[written:])
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # what remains is a torn line, which the next reader repairs
                file.truncate(before)
            raise


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"The folder {folder} cannot be made ({error.strerror}). Name another.") from error


class RunDirectory:
    """
    The folder of a run, for one process at a time.

    Args:
        path (`str` or `Path`):
            The folder.
        create (`bool`, *optional*, defaults to `False`):
            Whether to make it where it is missing.
        inherited (`bool`, *optional*, defaults to `False`):
            Whether processes that this one starts with `close_fds=False` are in the folder as well: if this one is
            killed, the next waits for them.

    Raises:
        RunError: If it is missing, or another process works on it.
    """

    def __init__(self, path: str | Path, create: bool = False, inherited: bool = False) -> None:
        self.path = Path(path)
        if create:
            _make(self.path)
        if not self.path.is_dir():
            raise RunError(
                f"{self.path} is not the folder of a run. Begin one: stepdpo collect --output-dir {self.path} ..."
            )
        self._lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise RunError(
                f"Another process ({owner}) works on {self.path}. Wait for it or stop it; for a second run beside it, "
                "give another folder."
            ) from error
        os.set_inheritable(self._lock.fileno(), inherited)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()}{', or what it started,' * inherited} on {os.uname().nodename}")
        self._lock.flush()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.truncate(0)
        self._lock.close()

    def log(self, name: str) -> Log:
        """Open the records in `name`.jsonl."""
        return Log(self.path / f"{name}.jsonl")

    def logs(self, kind: str) -> dict[str, Log]:
        """Open all records of a kind that has one file for each way it was done, `kind`.WAY.jsonl, by way."""
        paths = sorted(self.path.glob(f"{kind}.*.jsonl"))
        return {path.name[len(kind) + 1 : -len(".jsonl")]: Log(path) for path in paths}

    def settings(self) -> Log:
        """What each stage was run with."""
        return self.log("settings")

    def keep_settings(self, stage: str, settings: Mapping[str, Any], may_change: Container[str] = ()) -> None:
        """
        Write down what a stage is run with, or check that it is the same where it goes on.

        Args:
            stage (`str`):
                Name of the stage.
            settings (`Mapping[str, Any]`):
                Its settings.
            may_change (`Container[str]`, *optional*):
                Those that may change: the parts belong together all the same.

        Raises:
            RunError: If it was begun with others.
        """
        log = self.settings()
        settings = json.loads(json.dumps(settings))
        before = log.get(stage, settings)
        names = [*before, *(name for name in settings if name not in before)]
        changed = [name for name in names if name not in may_change and before.get(name) != settings.get(name)]
        if changed:
            named = ", ".join(f"{name}={before.get(name)!r} (now {settings.get(name)!r})" for name in changed)
            raise RunError(
                f"`{stage}` in {self.path} was begun with {named}. Give the same settings to go on, or another folder "
                "to begin anew."
            )
        if log.get(stage) != settings:
            log.append(stage, settings)
