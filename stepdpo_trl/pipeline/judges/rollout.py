"""Judge `rollout`: the first step after which the policy no longer reaches the gold answer."""

from ...data.answers import RIGHT
from ...data.steps import Steps, split_steps
from ...runs.tasks import Task
from ..policy import Policy
from ..records import Solution, Verdict
from .protocol import Judge


def rollout_judge(policy: Policy, num_rollouts: int = 8) -> Judge:
    """
    Create a judge that locates the first wrong step by Monte Carlo estimation.

    A prefix is lost if none of `num_rollouts` sampled continuations is right. The shortest lost prefix ends with the
    first wrong step. It is found by binary search, which looks at about log2(M) of the M prefixes. For each of them 1,
    1, 2, 4, ... continuations are sampled until one is right.

    Args:
        policy (`Policy`):
            The model that wrote the solutions.
        num_rollouts (`int`, *optional*, defaults to `8`):
            Maximum number of continuations per prefix.

    Returns:
        `Judge`: The judge. Its evidence contains `[continuations, right continuations]` of each prefix, by the number
            of steps in the prefix. It abstains if no rollout from the beginning is right.
    """

    def reached(solution: Solution, steps: Steps, length: int, seen: dict[str, list[int]]) -> Task[bool]:
        prefix = steps.prefix(length + 1)
        tried, right = 0, 0
        while tried < num_rollouts and not right:
            numbers = range(tried, min(num_rollouts, max(1, 2 * tried)))
            sampled = yield from policy.sample(solution.problem, prefix, numbers)
            tried += len(sampled)
            right += sum(continuation.check.outcome == RIGHT for continuation in sampled)
        seen[str(length)] = [tried, right]
        return right > 0

    def judge(solution: Solution) -> Task[Verdict]:
        steps = split_steps(solution.text, solution.style)
        seen: dict[str, list[int]] = {}
        if not (yield from reached(solution, steps, 0, seen)):
            return Verdict(None, "rollout", {"reason": "no right solution from the beginning", "rollouts": seen})
        alive, lost = 0, len(steps)
        while lost - alive > 1:
            middle = (alive + lost) // 2
            if (yield from reached(solution, steps, middle, seen)):
                alive = middle
            else:
                lost = middle
        return Verdict(lost, "rollout", {"rollouts": seen})

    return judge
