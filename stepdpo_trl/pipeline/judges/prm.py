"""A process reward model as a judge."""

from dataclasses import dataclass

from ...data.steps import split_steps
from ...runs.tasks import Ask, Task
from ..records import Solution, Verdict, text_digest
from .protocol import Judge


@dataclass(frozen=True)
class PRMRequest:
    """Steps for a process reward model to score."""

    key: str
    problem: str
    steps: tuple[str, ...]


def prm_judge(threshold: float = 0.5) -> Judge:
    """
    The first step that a process reward model scores below a threshold.

    Args:
        threshold (`float`, *optional*, defaults to `0.5`):
            Least probability of a right step.

    Returns:
        `Judge`: The judge. Its evidence are the scores.
    """

    def judge(solution: Solution) -> Task[Verdict]:
        steps = split_steps(solution.text, solution.style).texts()
        key = f"{solution.key}/{text_digest(*steps)}"
        replies = yield Ask("prm", (PRMRequest(key, solution.problem.problem, steps),))
        scores = replies[key]["scores"]
        step = next((number for number, score in enumerate(scores, start=1) if score < threshold), None)
        reason = {} if step else {"reason": f"no step below {threshold}"}
        return Verdict(step, "prm", {**reason, "scores": scores})

    return judge
