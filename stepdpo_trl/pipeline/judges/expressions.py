"""Judge expressions: several judges combined into one."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ...runs.run_directory import RunError
from ...runs.tasks import Task
from ..records import Solution, Verdict
from .protocol import Judge

JUDGES = ("arithmetic", "human", "llm", "prm", "rollout")


def parse_judges(expression: str) -> list[list[str]]:
    """
    Read an expression of judges.

    Args:
        expression (`str`):
            Names, joined by `+` (what all agree on) and `,` (the next is asked where those before abstain); `+`
            binds closer: `"arithmetic,rollout+llm"`.

    Returns:
        `list[list[str]]`: In the order in which they are asked, the judges that have to agree.

    Raises:
        RunError: If a name is not known.
    """
    groups = [[name.strip() for name in group.split("+")] for group in expression.split(",")]
    for name in (name for group in groups for name in group):
        if name not in JUDGES:
            near = get_close_matches(name, JUDGES, n=1, cutoff=0)[0]
            raise RunError(
                f"Judge {name!r} in {expression!r} is not known. Did you mean {near!r}? Known: {', '.join(JUDGES)}, "
                "joined by + (agree) and , (ask the next where the first abstains)."
            )
    names = [name for group in groups for name in group]
    if len(set(names)) < len(names):
        raise RunError(f"A judge stands twice in {expression!r}. Name each once.")
    return groups


def canonical(expression: str) -> str:
    """Spell a judge expression without spaces, as in settings, file names and reports."""
    return ",".join("+".join(group) for group in parse_judges(expression))


def combine(groups: list[list[str]], judges: Mapping[str, Judge]) -> Judge:
    """
    Make one judge of several.

    Args:
        groups (`list[list[str]]`):
            As from [`parse_judges`].
        judges (`Mapping[str, Judge]`):
            The judges by name.

    Returns:
        `Judge`: The judge. Its evidence is that of each judge that was asked, by name.
    """

    def judge(solution: Solution) -> Task[Verdict]:
        evidence: dict[str, Any] = {}
        for group in groups:
            steps = set()
            for name in group:
                verdict = yield from judges[name](solution)
                evidence[name] = {"step": verdict.step, **verdict.evidence}
                steps.add(verdict.step)
                if verdict.step is None or len(steps) > 1:  # nothing to agree on any more
                    break
            if len(steps) == 1 and None not in steps:
                return Verdict(steps.pop(), "+".join(group), evidence)
        return Verdict(None, ",".join("+".join(group) for group in groups), evidence)

    return judge
