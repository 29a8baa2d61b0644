"""Judge `llm`: a language model reads the solution and names the first wrong step."""

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

# Stored reasons of verdicts
EVEN_VOTES = "the votes are even"
NO_READABLE_REPLY = "no reply could be read"
NO_WRONG_STEP = "no step is wrong"

_BOXED_STEP = re.compile(r"\\boxed\{\s*(-?\d{1,9})\s*\}[\s.$*)]*$")


def check_judge_prompt(template: str) -> None:
    """
    Check a prompt template for the judge.

    Args:
        template (`str`):
            Jinja template.

    Raises:
        RunError: If the template cannot be rendered, or does not contain the problem or the steps.
    """
    problem, step = "PROBLEM\u2063TEXT", "STEP\u2063TEXT"
    text = render_template(template, problem=problem, answer="", solution="", steps=[step])
    for name, probe in (("problem", problem), ("steps", step)):
        if probe not in text:
            raise RunError(
                f"The judge's template {template[:60]!r} does not contain the {name}. Use the variable `{name}` in it."
            )


def llm_judge(
    service: str, seed: int, votes: int = 1, gold: bool = True, prompt: str | None = None, retry: bool = True
) -> Judge:
    r"""
    Create a judge that takes the majority vote of replies of a language model.

    A reply is readable if it ends with `\boxed{}` around the number of a step, or around -1 for no wrong step. If some
    replies are unreadable, up to `votes` further ones are requested.

    Args:
        service (`str`):
            Name of the service of the language model.
        seed (`int`):
            Seed of the run.
        votes (`int`, *optional*, defaults to `1`):
            Number of readable replies to collect.
        gold (`bool`, *optional*, defaults to `True`):
            Whether the prompt contains the gold answer and solution.
        prompt (`str`, *optional*):
            Jinja template. Defaults to an entry of [`~stepdpo_trl.data.prompts.JUDGE_PROMPTS`].
        retry (`bool`, *optional*, defaults to `True`):
            Whether to replace unreadable replies. Pass `False` for greedy decoding, which would repeat them.

    Returns:
        `Judge`: The judge. Its evidence contains the votes, the number of unreadable replies, and one reply of the
            majority. It abstains if the votes are even, no reply is readable, or no step is wrong.
    """
    template = prompt or JUDGE_PROMPTS["gold" if gold else "no-gold"]

    def judge(solution: Solution) -> Task[Verdict]:
        steps = split_steps(solution.text, solution.style).texts()
        problem = solution.problem
        shown = {"answer": problem.answer, "solution": problem.solution} if gold else {"answer": "", "solution": ""}
        text = render_template(template, problem=problem.problem, steps=steps, **shown)
        messages = ({"role": "user", "content": text},)
        readable: list[tuple[int, str]] = []
        asked = 0
        max_replies = 2 * votes if retry else votes
        while len(readable) < votes and asked < max_replies:
            count = min(votes - len(readable), max_replies - asked)
            keys = [f"{solution.key}/{text_digest(text)}/{number}" for number in range(asked, asked + count)]
            requests = tuple(Request(key, messages, seed_of(seed, f"{service}/{key}")) for key in keys)
            replies: Mapping[str, Completion] = yield Ask(service, requests)
            asked += count
            for key in keys:
                complete = replies[key].finish_reason == "stop"
                number = read_step(replies[key].text, len(steps)) if complete else None
                if number is not None:
                    readable.append((number, replies[key].text))
        evidence: dict[str, Any] = {"votes": dict(Counter(str(number) for number, _ in readable))}
        evidence["unreadable"] = asked - len(readable)
        ranked = Counter(number for number, _ in readable).most_common(2)
        if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
            return Verdict(None, "llm", {"reason": EVEN_VOTES if ranked else NO_READABLE_REPLY, **evidence})
        winner = ranked[0][0]
        evidence["reply"] = next(reply for number, reply in readable if number == winner)
        if winner == -1:
            return Verdict(None, "llm", {"reason": NO_WRONG_STEP, **evidence})
        return Verdict(winner, "llm", evidence)

    return judge


def read_step(reply: str, steps: int) -> int | None:
    r"""
    Read the number of the first wrong step from a reply of the language model.

    Args:
        reply (`str`):
            The reply.
        steps (`int`):
            Number of steps in the solution.

    Returns:
        `int` or `None`: The number in the final `\boxed{}` if it is the number of a step or -1, else `None`.
    """
    found = _BOXED_STEP.search(reply)
    number = int(found[1]) if found else 0
    return number if number == -1 or 1 <= number <= steps else None


def undecided(verdict: Verdict) -> bool:
    """
    Return whether a language model abstained without deciding, as opposed to finding no wrong step.

    Args:
        verdict (`Verdict`):
            Verdict of a combined judge.

    Returns:
        `bool`: Whether the votes of a language model were even, or none of its replies was readable.
    """
    return any(
        isinstance(evidence, dict) and evidence.get("reason") in (EVEN_VOTES, NO_READABLE_REPLY)
        for evidence in verdict.evidence.values()
    )
