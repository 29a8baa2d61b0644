"""Execution of a pipeline stage: its run folder, its services and its progress bar."""

import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .progress import count_stored, progress_bar
from .run_directory import RunDirectory
from .tasks import Service, Task, run_tasks
from .workers import StreamingService

T = TypeVar("T")
_SECONDS_BETWEEN_REDRAWS = 1.0


@dataclass(frozen=True)
class TaskRunner:
    """
    Runner of the tasks of a pipeline stage.

    Args:
        run (`RunDirectory`):
            The run folder.
        name (`str`):
            Name of the pipeline stage, unique within the run (such as `"localize arithmetic"`).
        services (`dict[str, Service]`):
            The services that tasks can send requests to, by name.
    """

    run: RunDirectory
    name: str
    services: dict[str, Service | StreamingService] = field(default_factory=dict)

    def results(
        self, tasks: Iterable[Task[T]], total: int, unit: str, counts: Mapping[str, Any]
    ) -> Generator[T, None, None]:
        """
        Run tasks with a progress bar.

        Args:
            tasks (`Iterable[Task]`):
                The tasks.
            total (`int`):
                Number of tasks.
            unit (`str`):
                Unit of the progress bar, such as `"solutions"`.
            counts (`Mapping[str, Any]`):
                Counts to show in the progress bar. The caller updates them.

        Yields:
            `Any`: The results of the tasks, see [`~stepdpo_trl.runs.tasks.run_tasks`]. Use them within
                `contextlib.closing`, so that an error of the caller does not lose answers in flight.
        """
        with progress_bar(total=total, desc=self.name, unit=f" {unit}", position=0) as bar:
            started = redrawn = time.monotonic()

            def progress(ended: int, stored: bool) -> None:
                nonlocal started, redrawn
                now = time.monotonic()
                if stored:
                    count_stored(bar, ended)
                    started = now
                elif ended:
                    bar.update(ended)
                if now - redrawn >= _SECONDS_BETWEEN_REDRAWS:
                    redrawn = now
                    tokens = sum(getattr(service, "tokens", 0) for service in self.services.values())
                    speed = {"tokens/s": round(tokens / (now - started))} if tokens else {}
                    bar.set_postfix({**counts, **speed})

            yield from run_tasks(tasks, self.services, progress)
            bar.set_postfix(dict(counts))
        for service in self.services.values():
            if isinstance(service, StreamingService):
                service.report()
