"""What a judge is."""

from collections.abc import Callable

from ...runs.tasks import Task
from ..records import Solution, Verdict

# A judge is a task: it may ask models, and returns a verdict
Judge = Callable[[Solution], Task[Verdict]]
