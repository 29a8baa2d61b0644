"""Options of the judges, and their checks."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..data.checkers import MATH, Checker
from ..generation import ModelSpec, Sampling
from ..runs.run_directory import RunError
from .judges.expressions import parse_judges
from .judges.llm import check_judge_prompt

DEFAULT_CHECK = "default"  # see `default_check`

# Command-line option and judge of each field
_OPTIONS = {
    "num_rollouts": ("--num-rollouts", "rollout"),
    "model": ("--judge-model", "llm"),
    "votes": ("--votes", "llm"),
    "gold": ("--no-gold", "llm"),
    "prompt": ("--judge-prompt", "llm"),
    "prm": ("--prm", "prm"),
    "threshold": ("--threshold", "prm"),
    "trust_remote_code": ("--trust-remote-code", "prm"),
    "port": ("--port", "human"),
}


@dataclass(frozen=True)
class JudgeOptions:
    """
    Options of the judges. Each judge reads only its own.

    Args:
        num_rollouts (`int`, *optional*, defaults to `8`):
            Maximum number of rollouts per prefix (`rollout`).
        model (`ModelSpec`, *optional*):
            Judge model (`llm`).
        votes (`int`, *optional*, defaults to `1`):
            Number of readable replies that vote on a solution (`llm`).
        gold (`bool`, *optional*, defaults to `True`):
            Whether the judge model sees the gold answer and solution (`llm`).
        prompt (`str`, *optional*):
            Jinja template of the judge's prompt (`llm`).
        sampling (`Sampling`, *optional*):
            Sampling parameters of the judge model (`llm`). Defaults to greedy decoding for one vote and to temperature
            0.7 for several.
        prm (`str`, *optional*):
            Model id or path of the process reward model (`prm`).
        threshold (`float`, *optional*, defaults to `0.5`):
            Probability below which a step counts as wrong (`prm`).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run the code that comes with the process reward model (`prm`).
        port (`int`, *optional*):
            Port of the labeling page (`human`). Defaults to a free port.
    """

    num_rollouts: int = 8
    model: ModelSpec | None = None
    votes: int = 1
    gold: bool = True
    prompt: str | None = None
    sampling: Sampling | None = None
    prm: str | None = None
    threshold: float = 0.5
    trust_remote_code: bool = False
    port: int | None = None

    def check(self, names: Sequence[str], checker: Checker = MATH) -> None:
        """
        Check that the options are complete for the given judges, and that the judges fit the checker of the solutions.

        Raises:
            RunError: If a judge lacks an option, an option is out of range, or a judge is for mathematics only.
        """
        if "arithmetic" in names and checker != MATH:
            raise RunError(
                f"The judge 'arithmetic' looks for false equations in mathematics, but --checker is {checker.name!r}. "
                "Use another judge, such as rollout (for --check: none)."
            )
        if "llm" in names and checker != MATH and self.prompt is None:
            raise RunError(
                f"The built-in prompt of the judge 'llm' is about mathematics, but --checker is {checker.name!r}. "
                "Pass --judge-prompt with a template for these problems."
            )
        if "llm" in names and self.model is None:
            raise RunError(
                "Judge 'llm' needs a model. Pass --judge-model NAME, with --judge-base-url URL if it is on a server."
            )
        if "llm" in names and self.prompt is not None:
            check_judge_prompt(self.prompt)
        if "prm" in names and self.prm is None:
            raise RunError(
                "Judge 'prm' needs a process reward model. Pass --prm with a model id or a folder, such as "
                "--prm Qwen/Qwen2.5-Math-PRM-7B."
            )
        if "prm" in names and not 0 < self.threshold < 1:
            raise RunError(f"threshold={self.threshold} is a probability. Use a value between 0 and 1, such as 0.5.")
        if self.num_rollouts < 1 or self.votes < 1:
            raise RunError(f"num_rollouts={self.num_rollouts} and votes={self.votes} must be at least 1.")

    def check_used(self, names: Collection[str]) -> None:
        """
        Check that no option was set for a judge that is not used.

        Args:
            names (`Collection[str]`):
                Names of all judges that are used.

        Raises:
            RunError: If an option has no effect.
        """
        for option in fields(self):
            if option.name in _OPTIONS and getattr(self, option.name) != option.default:
                flag, judge = _OPTIONS[option.name]
                if judge not in names:
                    raise RunError(
                        f"{flag} has no effect: {judge!r} is not one of the judges. Remove {flag}, or add the judge "
                        "to --judge or --check."
                    )

    def settings(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the options that the verdicts of the given judges depend on."""
        settings: dict[str, Any] = {"num_rollouts": self.num_rollouts} if "rollout" in names else {}
        if "llm" in names and self.model is not None:
            settings |= {"judge_model": self.model.model, "votes": self.votes, "gold": self.gold}
            settings |= {"judge_prompt": self.prompt, "judge_sampling": asdict(self.judge_sampling)}
        if "prm" in names:
            settings |= {"prm": self.prm, "threshold": self.threshold}
        return settings

    @property
    def judge_sampling(self) -> Sampling:
        """Sampling parameters of the judge model."""
        return self.sampling or Sampling(0.0 if self.votes == 1 else 0.7, 0.95, max_new_tokens=1024)


def default_check(checker: Checker) -> str | None:
    """Return the judge that checks preferred steps by default: `arithmetic` for mathematics, otherwise none."""
    return "arithmetic" if checker == MATH else None


def check_rectify(
    check: str | None, options: JudgeOptions, num_corrections: int, max_attempts: int, checker: Checker = MATH
) -> list[list[str]]:
    """
    Check the options of `rectify`.

    Args:
        check (`str`, *optional*):
            Judge expression for the preferred steps.
        options ([`JudgeOptions`]):
            Options of these judges.
        num_corrections (`int`):
            Preferred steps per wrong solution.
        max_attempts (`int`):
            Maximum number of samples per wrong solution.
        checker (`Checker`, *optional*, defaults to `MATH`):
            Checker of the solutions.

    Returns:
        `list[list[str]]`: The judges of the preferred steps, as returned by
        [`~stepdpo_trl.pipeline.judges.expressions.parse_judges`].

    Raises:
        RunError: If an option cannot be used.
    """
    groups = parse_judges(check) if check and check != DEFAULT_CHECK else []
    names = [name for group in groups for name in group]
    if set(names) & {"rollout", "human"}:
        raise RunError(
            f"--check {check!r} contains a judge of wrong solutions only. Use arithmetic, llm, prm, or a "
            "combination of them."
        )
    options.check(names, checker)
    if num_corrections < 1 or max_attempts < num_corrections:
        raise RunError(
            f"num_corrections={num_corrections} must be at least 1 and at most max_attempts={max_attempts}."
        )
    return groups
