"""
Run a `stepdpo` command with the checker of this folder, which executes code that a model has written.

    python examples/code_steps/execute.py --allow-code-execution data --model MODEL --output-dir run \\
        --output-file pairs.jsonl

Options of `stepdpo` that are not passed are those of the example: its problems, prompt, checker and steps.
"""

import os
import sys
from pathlib import Path

from stepdpo_trl.cli.main import main

HERE = Path(__file__).resolve().parent
ALLOW = "--allow-code-execution"
OPTIONS = {
    "--problems": str(HERE / "problems.jsonl"),
    "--prompt": str(HERE / "prompt.jinja"),
    "--response-prefix": "```python\n",
    "--checker": f"{HERE / 'checker.py'}:passes",
    # Lines of code. Blank lines, brackets and the marks of the code block belong to the step before
    "--steps": r"^(?!```)(?=.*\w)",
}
TAKE_OPTIONS = {"collect": OPTIONS, "data": OPTIONS, "loop": OPTIONS, "eval": OPTIONS}


def complete(words: list[str]) -> list[str]:
    """
    Add the options of the example to a command.

    Args:
        words (`list[str]`):
            The command line after `stepdpo`.

    Returns:
        `list[str]`: The command line with the options that were missing.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    options = TAKE_OPTIONS.get(words[0], {}) if words else {}
    added = [f"{name}={value}" for name, value in options.items() if name not in given]
    return [*words[:1], *added, *words[1:]]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if ALLOW not in arguments:
        sys.exit(
            f"execute.py: error: the checker runs code that a model has written. Read {HERE / 'README.md'}, then pass "
            f"{ALLOW}."
        )
    os.environ["ALLOW_CODE_EXECUTION"] = "1"
    sys.exit(main(complete([word for word in arguments if word != ALLOW])))
