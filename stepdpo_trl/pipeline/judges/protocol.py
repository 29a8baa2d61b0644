"""The type of a judge."""

from collections.abc import Callable

from ...runs.tasks import Task
from ..records import Solution, Verdict

# A judge is a task, so it can send requests to models. If it abstains, the step of its verdict is `None`.
Judge = Callable[[Solution], Task[Verdict]]
