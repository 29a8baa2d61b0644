"""What every stage runs on: the folder, the services, a progress bar."""

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
    The surroundings of a stage.

    Args:
        run (`RunDirectory`):
            The folder.
        name (`str`):
            Name of the stage, with what tells it from others of its kind.
        services (`dict[str, Service]`):
            Whom tasks can ask.
    """

    run: RunDirectory
    name: str
    services: dict[str, Service] = field(default_factory=dict)

    def results(self, tasks: Iterable[Task[T]], total: int, unit: str, counts: Mapping[str, Any]) -> Iterator[T]:
        """Run tasks, with a progress bar that shows `counts`: the yield so far."""
        with progress_bar(total=total, desc=self.name, unit=f" {unit}", position=0) as bar:
            for result in run_tasks(tasks, self.services):
                yield result
                bar.update(1)
                bar.set_postfix(dict(counts), refresh=False)
