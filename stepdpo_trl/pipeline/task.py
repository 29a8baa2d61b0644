"""The task of a run: the checker of its solutions, and their steps."""

from typing import Any

from ..data.checkers import MATH, Checker, resolve_checker
from ..runs.run_directory import RunDirectory, RunError


def task_settings(checker: Checker, steps: str | None = None) -> dict[str, Any]:
    """Return the settings of a run that are not those of mathematics. Runs of earlier releases have none."""
    named = {} if checker == MATH else {"checker": checker.name}
    return {**named, "steps": steps} if steps else named


def checker_of(run: RunDirectory) -> Checker:
    """
    Return the checker of a run.

    Args:
        run (`RunDirectory`):
            The run.

    Returns:
        `Checker`: The checker that `collect` used.

    Raises:
        RunError: If its code has changed since.
        CheckerError: If it does not exist anymore.
    """
    settings = run.settings()
    name = settings.get("collect", {}).get("checker", MATH.name)
    if "checker" not in settings:
        return resolve_checker(name)
    used = Checker(**settings["checker"])
    checker = resolve_checker(used.spelling)
    if checker.digest != used.digest:
        raise RunError(
            f"The code of the checker {name!r} has changed since the solutions in {run.path} were checked. Run "
            f"`stepdpo collect` again with --checker {used.spelling}: it checks the stored solutions again, without "
            "sampling."
        )
    return checker
