"""Judge expressions, which combine several judges into one."""

from collections.abc import Mapping
from typing import Any

from ...data.messages import did_you_mean
from ...runs.run_directory import RunError
from ...runs.tasks import Task
from ..records import Solution, Verdict
from .protocol import Judge

JUDGES = ("arithmetic", "human", "llm", "prm", "rollout")


def parse_judges(expression: str) -> list[list[str]]:
    """
    Parse a judge expression.

    Args:
        expression (`str`):
            Names of judges joined by `+` (all have to agree) and `,` (fallback: the next one judges where the previous
            ones abstain). `+` binds more tightly, as in `"arithmetic,rollout+llm"`.

    Returns:
        `list[list[str]]`: Groups of judges that have to agree, in the order in which they are asked.

    Raises:
        RunError: If a name is unknown or occurs twice.
    """
    groups = [[name.strip() for name in group.split("+")] for group in expression.split(",")]
    for name in (name for group in groups for name in group):
        if name not in JUDGES:
            raise RunError(
                f"The judge {name!r} in {expression!r} is not known.{did_you_mean(name, JUDGES)} Use "
                f"{', '.join(JUDGES)}, joined by + (all have to agree) or , (the next one judges where the previous "
                "ones abstain)."
            )
    names = [name for group in groups for name in group]
    if len(set(names)) < len(names):
        raise RunError(f"The judge expression {expression!r} contains a judge twice. Remove one of them.")
    return groups


def canonical(expression: str) -> str:
    """
    Normalize the spelling of a judge expression, as used in settings, file names and reports.

    Args:
        expression (`str`):
            The judge expression.

    Returns:
        `str`: The expression without spaces.

    Raises:
        RunError: If a name is unknown or occurs twice.
    """
    return ",".join("+".join(group) for group in parse_judges(expression))


def combine(groups: list[list[str]], judges: Mapping[str, Judge]) -> Judge:
    """
    Combine several judges into one.

    Args:
        groups (`list[list[str]]`):
            Groups of judges that have to agree, as returned by [`parse_judges`].
        judges (`Mapping[str, Judge]`):
            The judges, by name.

    Returns:
        `Judge`: The combined judge. Its evidence contains the step and the evidence of each judge that was asked, by
            name.
    """

    def judge(solution: Solution) -> Task[Verdict]:
        evidence: dict[str, Any] = {}
        for group in groups:
            steps = set()
            for name in group:
                verdict = yield from judges[name](solution)
                evidence[name] = {"step": verdict.step, **verdict.evidence}
                steps.add(verdict.step)
                if verdict.step is None or len(steps) > 1:  # no agreement is possible anymore
                    break
            if len(steps) == 1 and None not in steps:
                return Verdict(steps.pop(), "+".join(group), evidence)
        return Verdict(None, ",".join("+".join(group) for group in groups), evidence)

    return judge
