"""Execution of a pipeline stage: its run folder, its services and its progress bar."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .progress import progress_bar
from .run_directory import RunDirectory
from .tasks import Service, Task, run_tasks

T = TypeVar("T")


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
    services: dict[str, Service] = field(default_factory=dict)

    def results(self, tasks: Iterable[Task[T]], total: int, unit: str, counts: Mapping[str, Any]) -> Iterator[T]:
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
            `Any`: The results of the tasks, see [`~stepdpo_trl.runs.tasks.run_tasks`].
        """
        with progress_bar(total=total, desc=self.name, unit=f" {unit}", position=0) as bar:
            for result in run_tasks(tasks, self.services):
                yield result
                bar.update(1)
                bar.set_postfix(dict(counts), refresh=False)
