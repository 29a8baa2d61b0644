"""Judge `prm`: the first step with a low score by a process reward model. The model is in `prm_model`."""

from dataclasses import dataclass

from ...data.steps import split_steps
from ...runs.tasks import Ask, Task
from ..records import Solution, Verdict, text_digest
from .protocol import Judge


@dataclass(frozen=True)
class PRMRequest:
    """
    Steps for a process reward model to score.

    Args:
        key (`str`):
            Unique name within the run.
        problem (`str`):
            The problem.
        steps (`tuple[str, ...]`):
            The steps.
    """

    key: str
    problem: str
    steps: tuple[str, ...]


def prm_judge(threshold: float = 0.5) -> Judge:
    """
    Create a judge that picks the first step whose score is below a threshold.

    Args:
        threshold (`float`, *optional*, defaults to `0.5`):
            Minimum probability that a step is right.

    Returns:
        `Judge`: The judge. It sends its requests to the service `"prm"`, and its evidence contains all scores. It
            abstains if no score is below the threshold, or if the model cannot score the steps.
    """

    def judge(solution: Solution) -> Task[Verdict]:
        steps = split_steps(solution.text, solution.style).texts()
        key = f"{solution.key}/{text_digest(*steps)}"
        replies = yield Ask("prm", (PRMRequest(key, solution.problem.problem, steps),))
        scores = replies[key]["scores"]
        if scores is None:
            return Verdict(None, "prm", {"reason": "the model cannot score these steps"})
        step = next((number for number, score in enumerate(scores, start=1) if score < threshold), None)
        reason = {} if step else {"reason": f"no step below {threshold}"}
        return Verdict(step, "prm", {**reason, "scores": scores})

    return judge
