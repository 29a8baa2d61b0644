"""A person as a judge."""

from dataclasses import dataclass

from ...runs.tasks import Ask, Task
from ..records import Solution, Verdict


@dataclass(frozen=True)
class HumanRequest:
    """A solution for a person to look at."""

    key: str
    solution: Solution


def human_judge(solution: Solution) -> Task[Verdict]:
    """
    What a person says. Silent on what is skipped, and on what is not reached before the page is closed.

    Args:
        solution (`Solution`):
            The solution.

    Returns:
        `Verdict`: Its evidence says why there is none.
    """
    labels = yield Ask("human", (HumanRequest(solution.key, solution),))
    label = labels[solution.key]
    reason = {} if label.get("step") else {"reason": "no step is wrong" if label.get("no_error") else "skipped"}
    return Verdict(label.get("step"), "human", reason)
