"""Judge `human`: a person picks the first wrong step. The page is in `human_page`."""

from dataclasses import dataclass

from ...runs.tasks import Ask, Task
from ..records import Solution, Verdict


@dataclass(frozen=True)
class HumanRequest:
    """
    A solution for a person to judge.

    Args:
        key (`str`):
            Unique name within the run.
        solution (`Solution`):
            The solution.
    """

    key: str
    solution: Solution


def human_judge(solution: Solution) -> Task[Verdict]:
    """
    Judge a solution by the label of a person.

    The judge abstains if the person skips the solution, finds no wrong step, or closes the page before reaching it.

    Args:
        solution (`Solution`):
            The solution.

    Returns:
        `Verdict`: The verdict. If the judge abstains, the evidence gives the reason.
    """
    labels = yield Ask("human", (HumanRequest(solution.key, solution),))
    label = labels[solution.key]
    reason = {} if label.get("step") else {"reason": "no step is wrong" if label.get("no_error") else "skipped"}
    return Verdict(label.get("step"), "human", reason)
