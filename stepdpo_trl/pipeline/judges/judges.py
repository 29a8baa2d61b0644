"""Who finds the first wrong step, and how verdicts are combined."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ...data.prompts import JUDGE_PROMPTS
from ...data.steps import Steps, split_steps
from ...generation import Completion, Request
from ...runs.run_directory import RunError
from ...runs.tasks import Ask, Task, seed_of
from ..policy import Policy, render_template
from ..records import RIGHT, Solution, Verdict, digest
from .arithmetic import false_equations

# A judge is a task: it may ask models, and returns a verdict
Judge = Callable[[Solution], Task[Verdict]]

JUDGES = ("arithmetic", "human", "llm", "prm", "rollout")


def arithmetic_judge(solution: Solution) -> Task[Verdict]:
    """
    The first step with a false equation in it. Free; right where it speaks, silent where all equations hold.

    Args:
        solution (`Solution`):
            The solution.

    Returns:
        `Verdict`: Its evidence is the equation.
    """
    steps = split_steps(solution.text, solution.style)
    for number, false in enumerate(false_equations(solution.problem.problem, steps), start=1):
        if false:
            return Verdict(number, "arithmetic", {"equation": false})
    return Verdict(None, "arithmetic", {"reason": "every equation that can be read holds"})
    yield  # a task that asks nothing


def rollout_judge(policy: Policy, k: int = 8) -> Judge:
    """
    The first step behind which the policy itself no longer reaches the answer (Monte-Carlo estimation).

    A prefix is lost if none of `k` continuations is right. It is looked for by binary search between the beginning,
    which must not be lost, and the end, which is: about log2 M prefixes of M. Of each, 1, 1, 2, 4 ... continuations
    are sampled until one is right.

    Args:
        policy (`Policy`):
            The model that wrote the solutions.
        k (`int`, *optional*, defaults to `8`):
            Continuations of a prefix at most.

    Returns:
        `Judge`: The judge. Its evidence are the prefixes looked at, by number of steps: continuations, right ones.
    """

    def reached(solution: Solution, steps: Steps, length: int, seen: dict[str, list[int]]) -> Task[bool]:
        prefix = steps.prefix(length + 1)
        tried, right = 0, 0
        while tried < k and not right:
            numbers = range(tried, min(k, max(1, 2 * tried)))
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


_BOXED_STEP = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}[\s.$*)]*$")
UNDECIDED = ("the votes are even", "no reply could be read")


def check_judge_prompt(template: str) -> None:
    """
    Check a template for the judge.

    Raises:
        RunError: If it cannot be filled, or leaves the problem or the steps out.
    """
    problem, step = "PROBLEM\u2063TEXT", "STEP\u2063TEXT"
    text = render_template(template, problem=problem, answer="", solution="", steps=[step])
    for what, name, probe in (("the problem", "problem", problem), ("the steps", "steps", step)):
        if probe not in text:
            raise RunError(f"The judge's template {template[:60]!r} leaves {what} out: use `{name}` in it.")


def llm_judge(
    whom: str, seed: int, votes: int = 1, gold: bool = True, prompt: str | None = None, retry: bool = True
) -> Judge:
    r"""
    What a language model says, by majority.

    A reply counts if it ends in the number of a step, or -1, in `\boxed{}`. For others more are asked, as many again
    as votes are wanted, if the judge is sampled.

    Args:
        whom (`str`):
            Name of the service.
        seed (`int`):
            Seed of the run.
        votes (`int`, *optional*, defaults to `1`):
            Replies that count.
        gold (`bool`, *optional*, defaults to `True`):
            Whether the judge sees answer and solution of the data set.
        prompt (`str`, *optional*):
            Jinja template, defaults to [`~stepdpo_trl.data.prompts.JUDGE_PROMPTS`].
        retry (`bool`, *optional*, defaults to `True`):
            Whether to ask again where a reply cannot be read. A greedy judge would say the same.

    Returns:
        `Judge`: The judge. Its evidence are the votes, the unreadable replies and a reply of the majority.
    """
    template = prompt or JUDGE_PROMPTS["gold" if gold else "no-gold"]

    def judge(solution: Solution) -> Task[Verdict]:
        steps = split_steps(solution.text, solution.style).texts()
        problem = solution.problem
        shown = {"answer": problem.answer, "solution": problem.solution} if gold else {"answer": "", "solution": ""}
        text = render_template(template, problem=problem.problem, steps=steps, **shown)
        said: list[tuple[int, str]] = []
        asked = 0
        most = 2 * votes if retry else votes
        while len(said) < votes and asked < most:
            keys = [f"{solution.key}/{digest(text)}/{asked + i}" for i in range(votes - len(said))]
            keys = keys[: most - asked]
            messages = ({"role": "user", "content": text},)
            requests = tuple(Request(key, messages, seed_of(seed, f"{whom}/{key}")) for key in keys)
            replies: Mapping[str, Completion] = yield Ask(whom, requests)
            asked += len(keys)
            for key in keys:
                whole = replies[key].finish_reason == "stop"
                number = read_step(replies[key].text, len(steps)) if whole else None
                if number is not None:
                    said.append((number, replies[key].text))
        evidence: dict[str, Any] = {"votes": dict(Counter(str(number) for number, _ in said))}
        evidence["unreadable"] = asked - len(said)
        ranked = Counter(number for number, _ in said).most_common(2)
        if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
            reason = UNDECIDED[0] if ranked else UNDECIDED[1]
            return Verdict(None, "llm", {"reason": reason, **evidence})
        winner = ranked[0][0]
        evidence["reply"] = next(reply for number, reply in said if number == winner)
        if winner == -1:
            return Verdict(None, "llm", {"reason": "no step is wrong", **evidence})
        return Verdict(winner, "llm", evidence)

    return judge


def read_step(reply: str, steps: int) -> int | None:
    r"""
    Read the reply of a judge.

    Args:
        reply (`str`):
            The reply.
        steps (`int`):
            Number of steps.

    Returns:
        `int` or `None`: The number in the `\boxed{}` that ends it: of a step, or -1 for none. `None` where it is
        neither.
    """
    found = _BOXED_STEP.search(reply)
    number = int(found[1]) if found else 0
    return number if number == -1 or 1 <= number <= steps else None


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
        key = f"{solution.key}/{digest(*steps)}"
        replies = yield Ask("prm", (PRMRequest(key, solution.problem.problem, steps),))
        scores = replies[key]["scores"]
        step = next((number for number, score in enumerate(scores, start=1) if score < threshold), None)
        reason = {} if step else {"reason": f"no step below {threshold}"}
        return Verdict(step, "prm", {**reason, "scores": scores})

    return judge


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


def parse_judges(expression: str) -> list[list[str]]:
    """
    Read an expression of judges.

    Args:
        expression (`str`):
            Names, joined by `+` (what all agree on) and `>` (the next is asked where those before are silent); `+`
            binds closer: `"arithmetic>rollout+llm"`.

    Returns:
        `list[list[str]]`: In the order in which they are asked, the judges that have to agree.

    Raises:
        RunError: If a name is not known.
    """
    groups = [[name.strip() for name in group.split("+")] for group in expression.split(">")]
    for name in (name for group in groups for name in group):
        if name not in JUDGES:
            near = get_close_matches(name, JUDGES, n=1, cutoff=0)[0]
            raise RunError(
                f"Judge {name!r} in {expression!r} is not known. Did you mean {near!r}? Known: {', '.join(JUDGES)}, "
                "joined by + (agree) and > (ask the next where the first is silent)."
            )
    names = [name for group in groups for name in group]
    if len(set(names)) < len(names):
        raise RunError(f"A judge stands twice in {expression!r}. Name each once.")
    return groups


def undecided(verdict: Verdict) -> bool:
    """Whether a language model was asked and nothing came of it: that is not "no step is wrong"."""
    return any(isinstance(e, dict) and e.get("reason") in UNDECIDED for e in verdict.evidence.values())


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
        return Verdict(None, ">".join("+".join(group) for group in groups), evidence)

    return judge
