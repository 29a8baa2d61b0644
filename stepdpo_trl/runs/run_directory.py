"""The folder of a run: its logs, its settings, and a lock for one process."""

import json
import os
import platform
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout

from ..data.files import write_atomically
from .log import Log as Log  # also imported from here
from .log import RunError as RunError


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
        self._logs: dict[str, Log] = {}
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
        """Return the log `{name}.jsonl`, which is opened once."""
        if name not in self._logs:
            self._logs[name] = self._open_log(self.path / f"{name}.jsonl")
        return self._logs[name]

    def _open_log(self, path: Path) -> Log:
        return Log(path)

    def logs(self, kind: str) -> dict[str, Log]:
        """
        Return all logs of a kind.

        Args:
            kind (`str`):
                First part of the file names, such as `"verdicts"` for `verdicts.arithmetic.jsonl`.

        Returns:
            `dict[str, Log]`: The logs, by the rest of the name (such as `"arithmetic"`).
        """
        names = [path.name.removesuffix(".jsonl") for path in sorted(self.path.glob(f"{kind}.*.jsonl"))]
        return {name[len(kind) + 1 :]: self.log(name) for name in names}

    def settings(self) -> Log:
        """Return the log of the settings, with one record per pipeline stage."""
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
