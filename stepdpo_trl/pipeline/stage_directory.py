"""The run folder as a pipeline stage uses it: settings are written with the first record, and time is counted."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..data.files import write_atomically
from ..generation.vllm_server import stop_orphans
from ..runs.log import BATCH, Log, RunError
from ..runs.run_directory import RunDirectory
from .reading import reading

TIMES = "time.json"
_SECONDS_BETWEEN_SAVES = 10.0
_SECONDS_BETWEEN_WRITES = 1.0


class _AnnouncedLog(Log):
    """Log that calls a function before it writes, and another one afterwards."""

    def __init__(self, path: Path, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__(path)
        self._before, self._after = before, after

    def extend(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Append records; see [`~stepdpo_trl.runs.run_directory.Log`]."""
        self._before()
        super().extend(records)
        self._after()


class StageDirectory(RunDirectory):
    """
    Run folder in which one pipeline stage works.

    The settings of the stage are checked when it starts and written with its first record. A command that fails
    before that (an unknown model, an unreachable server) leaves no settings, so the corrected command can use the same
    folder. The time from the start of the stage to its latest record is added up in `time.json` over all resumes.
    """

    _stage = ""
    _settings: Mapping[str, Any] | None = None  # not written yet
    _growing: Sequence[str] = ()
    _on_first_record: Callable[[], None] | None = None

    def start_stage(
        self,
        stage: str,
        settings: Mapping[str, Any],
        growing: Sequence[str] = (),
        on_first_record: Callable[[], None] | None = None,
    ) -> None:
        """
        Check the settings of a stage, and write them with its first record.

        vLLM servers that a killed command has left running in the folder are stopped, whatever this command uses.

        Args:
            stage (`str`):
                Name of the stage.
            settings (`Mapping[str, Any]`):
                Settings of the stage.
            growing (`Sequence[str]`, *optional*):
                Names of the settings that a later command may increase.
            on_first_record (`Callable`, *optional*):
                Function to call right after the settings are written.

        Raises:
            RunError: As for [`check_stage`].
        """
        self.check_stage(stage, settings, growing)
        stop_orphans(self.path)
        self._stage, self._settings, self._growing = stage, settings, growing
        self._on_first_record = on_first_record
        self._started, self._saved = time.monotonic(), 0.0
        self._seconds, self._seconds_before = 0.0, read_times(self.path).get(stage, 0.0)

    def check_stage(self, stage: str, settings: Mapping[str, Any], growing: Sequence[str] = ()) -> None:
        """
        Check the settings of a stage, if it has been started in this run.

        Args:
            stage (`str`):
                Name of the stage.
            settings (`Mapping[str, Any]`):
                Settings of the stage.
            growing (`Sequence[str]`, *optional*):
                Names of the settings that may be larger than in the run.

        Raises:
            RunError: If the run has other settings, or larger values of the growing ones. The message has one line
                per difference.
        """
        before = self.settings().get(stage)
        if before is None:
            return
        self.keep_settings(stage, {**settings, **{name: before[name] for name in growing if name in before}})
        with reading(f"The record {stage!r}", self.path / "settings.jsonl", "Restore the line."):
            less = [name for name in growing if name in before and settings[name] < before[name]]
        if less:
            differences = "\n".join(f"  {name}: {before[name]} in this run, {settings[name]} now" for name in less)
            raise RunError(
                f"`{stage}` in {self.path} has larger values:\n{differences}\nThey can grow but not shrink. Pass at "
                "least the values of this run, or use another folder."
            )

    def _open_log(self, path: Path) -> Log:
        return _AnnouncedLog(path, self.write_settings, self._count_time)

    def write_settings(self) -> None:
        """Write the settings of the stage, if they are not written yet."""
        if self._settings is None:
            return
        settings, self._settings = self._settings, None  # first, as this writes a record too
        self.keep_settings(self._stage, settings, may_change=self._growing)
        if self._on_first_record is not None:
            self._on_first_record()

    def __enter__(self) -> "StageDirectory":
        return self

    def _count_time(self) -> None:
        if not self._stage:
            return
        self._seconds = time.monotonic() - self._started
        if self._seconds - self._saved >= _SECONDS_BETWEEN_SAVES:
            self._save_time()

    def _save_time(self) -> None:
        self._saved = self._seconds
        times = {**read_times(self.path), self._stage: round(self._seconds_before + self._seconds, 1)}
        write_atomically(self.path / TIMES, json.dumps(times, indent=2) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._stage and self._seconds > self._saved:
                self._save_time()
        finally:
            super().__exit__(kind, error, trace)


def read_times(path: Path) -> dict[str, float]:
    """Read the seconds that each stage of a run has taken."""
    try:
        text = (path / TIMES).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    with reading("The content", path / TIMES, "Remove it; only the times are lost."):
        return {stage: float(seconds) for stage, seconds in json.loads(text).items()}


class ResultWriter:
    """
    Writer of the results of a stage, as a context manager.

    It writes at most once per second, as each write waits for the disk. Results that a kill loses are computed again
    from stored replies. An error or Ctrl-C loses none.

    Args:
        log (`Log`):
            Log for the results.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: list[tuple[str, Mapping[str, Any]]] = []
        self._written_at = 0.0

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """
        Add a result, unless it is in the log already. The last record of a key counts.

        Args:
            key (`str`):
                Key of the record, which must not be added twice.
            record (`Mapping[str, Any]`):
                The record.
        """
        before = self._log.get(key)
        if before is not None and before == _as_json(record):
            return
        self._waiting.append((key, record))
        if len(self._waiting) >= BATCH or time.monotonic() - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._log.extend(self._waiting)
            self._waiting = []
        self._written_at = time.monotonic()


def _as_json(record: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(record))
