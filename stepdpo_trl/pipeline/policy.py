"""The policy as tasks see it: it continues a solution from any prefix, and its answers are checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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


_compile = lru_cache(_JINJA.from_string)  # rendered once per prefix, by the thread that feeds the servers


def render_template(template: str, **values: Any) -> str:
    """
    Render a Jinja template.

    Args:
        template (`str`):
            The template.
        values (`Any`):
            Variables that the template may use.

    Returns:
        `str`: The text.

    Raises:
        RunError: If the template is invalid, uses another variable or fails.
    """
    try:
        return _compile(template).render(**values)
    except Exception as error:  # code in a template can raise anything
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise RunError(
            f"The template {template[:60]!r} cannot be filled: {reason}. The available variables are {sorted(values)}."
        ) from error


def resolve_step_prompt(user: str, response_prefix: str | None = None) -> StepPrompt:
    """
    Return a step prompt, given its name or a template.

    Args:
        user (`str`):
            Name in [`~stepdpo_trl.data.prompts.STEP_PROMPTS`], or Jinja template of the user's message.
        response_prefix (`str`, *optional*):
            Beginning of each answer. Defaults to that of the named prompt, and to `""` for a template.

    Returns:
        `StepPrompt`: The prompt.

    Raises:
        RunError: If the name is unknown, or the template does not contain the problem.
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
        raise RunError(f"The template {template[:60]!r} does not contain the problem. Add {{{{ problem }}}} to it.")
    return prompt


@dataclass(frozen=True)
class Continuation:
    """
    Sampled solution that continues a prefix.

    Args:
        key (`str`):
            Key of the sample in the run.
        text (`str`):
            Text of the whole solution, including the prefix.
        finish_reason (`str`):
            `"stop"`, or `"length"` if the solution was truncated.
        check (`Check`):
            Result of checking the final answer.
    """

    key: str
    text: str
    finish_reason: str
    check: Check


@dataclass(frozen=True)
class Policy:
    """
    Model that solves problems, as tasks see it.

    The i-th sample from a prefix of a problem has the same key in all pipeline stages, and is sampled once. The
    samples of `collect` are the first rollouts from the beginning, and the rollouts from the last right step are
    the first samples of `rectify`.

    Args:
        service (`str`):
            Name of the service that answers for the model.
        prompt (`StepPrompt`):
            Prompt of the model.
        render (`Callable[[str, str], str]`):
            Function that renders a user message and the beginning of the answer, `render` of the generator.
        seed (`int`):
            Seed of the run.
    """

    service: str
    prompt: StepPrompt
    render: Any
    seed: int

    def sample(self, problem: Problem, prefix: str, numbers: Sequence[int]) -> Task[list[Continuation]]:
        """
        Sample continuations of a prefix and check their answers.

        Args:
            problem (`Problem`):
                The problem.
            prefix (`str`):
                Beginning of the solution.
            numbers (`Sequence[int]`):
                Numbers of the samples.

        Returns:
            `list[Continuation]`: The continuations, in the order of `numbers`.
        """
        text = self.render(render_template(self.prompt.user, problem=problem.problem), prefix)
        keys = [f"{problem.id}/{text_digest(prefix)}/{number}" for number in numbers]
        requests = tuple(Request(key, text, seed_of(self.seed, f"{self.service}/{key}")) for key in keys)
        completions: Mapping[str, Completion] = yield Ask(self.service, requests)
        solutions = {key: prefix + completions[key].text for key in keys}
        checks: Mapping[str, Check] = yield Ask(
            "check", tuple(CheckRequest(f"{self.service}/{key}", problem.as_row(), solutions[key]) for key in keys)
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
    """
    Return why a solution has no final answer, if the reason is that it was refused or truncated.

    Args:
        finish_reason (`str`):
            Finish reason of the completion.
        text (`str`):
            Text of the completion.

    Returns:
        `str` or `None`: The reason. `None` if the text may contain a final answer.
    """
    if finish_reason == "refused":
        return "refused by the server"
    return "cut at max_new_tokens" if finish_reason == "length" and "\\boxed" not in text else None
