"""A language model as a judge."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...data.prompts import JUDGE_PROMPTS
from ...data.steps import split_steps
from ...generation import Completion, Request
from ...runs.run_directory import RunError
from ...runs.tasks import Ask, Task, seed_of
from ..policy import render_template
from ..records import Solution, Verdict, text_digest
from .protocol import Judge

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
    service: str, seed: int, votes: int = 1, gold: bool = True, prompt: str | None = None, retry: bool = True
) -> Judge:
    r"""
    What a language model says, by majority.

    A reply counts if it ends in the number of a step, or -1, in `\boxed{}`. For others more are asked, as many again
    as votes are wanted, if the judge is sampled.

    Args:
        service (`str`):
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
            keys = [f"{solution.key}/{text_digest(text)}/{asked + i}" for i in range(votes - len(said))]
            keys = keys[: most - asked]
            messages = ({"role": "user", "content": text},)
            requests = tuple(Request(key, messages, seed_of(seed, f"{service}/{key}")) for key in keys)
            replies: Mapping[str, Completion] = yield Ask(service, requests)
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


def undecided(verdict: Verdict) -> bool:
    """Whether a language model was asked and nothing came of it: that is not "no step is wrong"."""
    return any(isinstance(e, dict) and e.get("reason") in UNDECIDED for e in verdict.evidence.values())
