"""The folder of a run: append-only logs of records that survive a killed process, and a lock for one process."""

import contextlib
import errno
import json
import logging
import os
import platform
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout

from ..data.files import write_atomically

logger = logging.getLogger(__name__)


class RunError(Exception):
    """Error that the user can fix. The message says what failed and how to fix it."""


class Log(Mapping[str, dict[str, Any]]):
    """
    Append-only file of keyed records, one JSON object per line. The last record of a key counts.

    Args:
        path (`Path`):
            The file. It is created with the first record. If its last line is incomplete because a process was killed
            while writing, the line is removed with a warning.

    Raises:
        RunError: If a complete line is not a record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            logger.warning(
                f"{self.path} ends in the middle of a record, probably because a process was killed while writing. "
                f"The last {len(content) - complete} bytes are removed, and their record will be computed again."
            )
            with self.path.open("r+b") as file:
                file.truncate(complete)
        for number, line in enumerate(content[:complete].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise RunError(
                    f"Line {number} of {self.path} is not a record of this package ({line[:80]!r}). Restore the file, "
                    "or remove the line to compute its record again."
                ) from error

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

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
        Append several records in one write. They are on disk when this returns.

        Args:
            records (`Iterable[tuple[str, Mapping[str, Any]]]`):
                Keys and records.

        Raises:
            RunError: If the disk is full or the file cannot be written. The file then keeps its previous content.
        """
        added = [(key, dict(record)) for key, record in records]
        lines = "".join(json.dumps({"key": key, **record}, ensure_ascii=False) + "\n" for key, record in added)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _append(self.path, lines.encode())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cause = "The disk is full" if full else f"The file cannot be written ({error.strerror})"
            raise RunError(
                f"{cause}: {len(added)} records of {self.path} were not saved. All earlier records are safe. "
                f"{'Free disk space' if full else 'Fix this'} and rerun the same command to resume."
            ) from error
        self._records.update(added)


def _append(path: Path, content: bytes) -> None:
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


class RunDirectory:
    """
    The folder of a run. Only one process at a time can open it.

    The process that holds the lock (the file `lock`) writes its id and host to the file `owner`.

    Args:
        path (`str` or `Path`):
            The folder.
        create (`bool`, *optional*, defaults to `False`):
            Whether to create a missing folder.
        inherited (`bool`, *optional*, defaults to `False`):
            Whether child processes started with `close_fds=False` hold the lock as well, so that the folder stays
            locked if this process is killed while they work. Has no effect on Windows.

    Raises:
        RunError: If the folder is missing or cannot be created or locked, or if another process holds the lock.
    """

    def __init__(self, path: str | Path, create: bool = False, inherited: bool = False) -> None:
        self.path = Path(path)
        if create:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(
                    f"The folder {self.path} cannot be created ({error.strerror}). Use another folder."
                ) from error
        if not self.path.is_dir():
            raise RunError(
                f"{self.path} is not the folder of a run. Start a run with `stepdpo collect --output-dir {self.path} "
                "...`."
            )
        self._owner = self.path / "owner"
        inherited = inherited and os.name == "posix"
        self._lock = self._acquire(inherited)
        children = " or its children" if inherited else ""
        write_atomically(self._owner, f"process {os.getpid()}{children} on {platform.node()}")

    def _acquire(self, inherited: bool) -> FileLock | IO[str]:
        path = self.path / "lock"
        try:
            if inherited:
                return _lock_with_children(path)
            lock = FileLock(path, thread_local=False)
            lock.acquire(timeout=0)
            return lock
        except (BlockingIOError, Timeout) as error:
            owner = self._owner.read_text(encoding="utf-8") if self._owner.exists() else "unknown"
            raise RunError(
                f"Another process ({owner}) is using {self.path}. Wait until it has finished, stop it, or use another "
                "folder."
            ) from error
        except OSError as error:
            raise RunError(
                f"The folder {self.path} cannot be locked ({error.strerror}). Use a folder that you can write to."
            ) from error

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.unlink(missing_ok=True)
        if isinstance(self._lock, FileLock):
            self._lock.release()
        else:
            self._lock.close()

    def log(self, name: str) -> Log:
        """Open the log `{name}.jsonl`."""
        return Log(self.path / f"{name}.jsonl")

    def logs(self, kind: str) -> dict[str, Log]:
        """
        Open all logs of a kind.

        Args:
            kind (`str`):
                First part of the file names, such as `"verdicts"` for `verdicts.arithmetic.jsonl`.

        Returns:
            `dict[str, Log]`: The logs, by the rest of the name (such as `"arithmetic"`).
        """
        paths = sorted(self.path.glob(f"{kind}.*.jsonl"))
        return {path.name[len(kind) + 1 : -len(".jsonl")]: Log(path) for path in paths}

    def settings(self) -> Log:
        """Open the log of the settings, with one record per pipeline stage."""
        return self.log("settings")

    def keep_settings(self, stage: str, settings: Mapping[str, Any], may_change: Container[str] = ()) -> None:
        """
        Store the settings of a pipeline stage, or check that a resumed stage has the stored settings.

        Args:
            stage (`str`):
                Name of the pipeline stage.
            settings (`Mapping[str, Any]`):
                Its settings.
            may_change (`Container[str]`, *optional*):
                Names of settings that may differ from the stored ones.

        Raises:
            RunError: If another setting differs. The message has one line per difference.
        """
        log = self.settings()
        settings = json.loads(json.dumps(settings))
        stored = log.get(stage, settings)
        before, now = (
            {
                path: value
                for name, setting in record.items()
                if name not in may_change
                for path, value in _flatten(setting, name)
            }
            for record in (stored, settings)
        )
        # Runs of earlier releases lack options that were added later. These are off by default.
        changed = [path for path in {**before, **now} if (before.get(path) or None) != (now.get(path) or None)]
        if changed:
            differences = "\n".join(
                f"  {path}: {_show(path, before)} in this run, {_show(path, now)} now" for path in changed
            )
            raise RunError(
                f"`{stage}` in {self.path} was started with other settings:\n{differences}\nUse the settings of this "
                "run to resume it, or another folder to start a new run."
            )
        if log.get(stage) != settings:
            log.append(stage, settings)


def _lock_with_children(path: Path) -> IO[str]:
    # Children have to inherit the open file, which filelock does not expose, and keep the lock when this process
    # releases it. It is the same kind of lock as filelock's, so that both exclude each other.
    import fcntl

    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    os.set_inheritable(lock.fileno(), True)
    return lock


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield nested settings as paths and values, such as `sampling.top_p` and `models[0].dtype`."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{path}.{name}")
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{path}[{index}]")
    else:
        yield path, value


def _show(path: str, settings: Mapping[str, Any]) -> str:
    shown = repr(settings[path]) if path in settings else "not set"
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
