"""Asking the policy to solve a problem, from any point of a solution, and whether it did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..data.answers import UNREADABLE, Check
from ..data.prompts import STEP_PROMPTS, StepPrompt, resolve_text
from ..generation import Completion, Request
from ..runs.run_directory import RunError
from ..runs.tasks import Ask, CheckRequest, Task, seed_of
from .records import Problem, text_digest

_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)


def render_template(template: str, **values: Any) -> str:
    """
    Fill a Jinja template.

    Raises:
        RunError: If the template cannot be filled.
    """
    try:
        return _JINJA.from_string(template).render(**values)
    except TemplateError as error:
        raise RunError(
            f"The template {template[:60]!r} cannot be filled: {error}. It may use {sorted(values)}."
        ) from error


def resolve_step_prompt(user: str, response_prefix: str | None = None) -> StepPrompt:
    """
    Return the step prompt that is meant.

    Args:
        user (`str`):
            Name in [`~stepdpo_trl.data.prompts.STEP_PROMPTS`], or a Jinja template.
        response_prefix (`str`, *optional*):
            How the answer begins, defaults to that of the named prompt, and to nothing for a template.

    Returns:
        `StepPrompt`: The prompt.

    Raises:
        RunError: If the name is not known, or the template leaves the problem out.
    """
    try:
        template = resolve_text(user, {name: prompt.user for name, prompt in STEP_PROMPTS.items()}, "prompt")
    except ValueError as error:
        raise RunError(str(error)) from error
    known = STEP_PROMPTS.get(user)
    prompt = StepPrompt(
        template, response_prefix if response_prefix is not None else known.response_prefix if known else ""
    )
    probe = "PROBLEM\u2063TEXT"
    if probe not in render_template(template, problem=probe):
        raise RunError(f"The template {template[:60]!r} does not contain the problem. Put {{{{ problem }}}} into it.")
    return prompt


@dataclass(frozen=True)
class Continuation:
    """
    A sampled solution that goes on from a prefix.

    Args:
        key (`str`):
            Its name in the run.
        text (`str`):
            The whole solution, prefix and all.
        finish_reason (`str`):
            `"stop"`, or `"length"` where it was cut.
        check (`Check`):
            What its final answer is worth.
    """

    key: str
    text: str
    finish_reason: str
    check: Check


@dataclass(frozen=True)
class Policy:
    """
    A model that solves problems, as tasks see it.

    The i-th sample from a prefix of a problem has the same name in all stages. So the samples of `collect` are the
    first rollouts from the beginning, and rollouts from the last right step are the first samples of `rectify`.

    Args:
        service (`str`):
            Name of its service.
        prompt (`StepPrompt`):
            How it is asked.
        render (`Callable[[str, str], str]`):
            The generator's `render`.
        seed (`int`):
            Seed of the run.
    """

    service: str
    prompt: StepPrompt
    render: Any
    seed: int

    def sample(self, problem: Problem, prefix: str, numbers: Sequence[int]) -> Task[list[Continuation]]:
        """Sample the continuations of these numbers, and check their answers."""
        text = self.render(render_template(self.prompt.user, problem=problem.problem), prefix)
        keys = [f"{problem.id}/{text_digest(prefix)}/{number}" for number in numbers]
        requests = tuple(Request(key, text, seed_of(self.seed, f"{self.service}/{key}")) for key in keys)
        completions: Mapping[str, Completion] = yield Ask(self.service, requests)
        solutions = {key: prefix + completions[key].text for key in keys}
        checks: Mapping[str, Check] = yield Ask(
            "check", tuple(CheckRequest(f"{self.service}/{key}", problem.answer, solutions[key]) for key in keys)
        )
        return [
            Continuation(key, solutions[key], completions[key].finish_reason, self._check(checks, key, completions))
            for key in keys
        ]

    def _check(self, checks: Mapping[str, Check], key: str, completions: Mapping[str, Completion]) -> Check:
        check = checks[f"{self.service}/{key}"]
        reason = why_no_answer(completions[key].finish_reason, completions[key].text)
        return check if reason is None else Check(UNREADABLE, None, reason)


def why_no_answer(finish_reason: str, text: str) -> str | None:
    """Why a solution has no final answer, whatever could be read in its text, if there is a reason."""
    if finish_reason == "refused":
        return "refused by the server"
    return "cut at max_new_tokens" if finish_reason == "length" and "\\boxed" not in text else None
