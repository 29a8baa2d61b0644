"""Which part may import which: the trainer knows nothing of the data pipeline, the pipeline nothing of TRL."""

import ast
from pathlib import Path

import stepdpo_trl

PACKAGE = Path(stepdpo_trl.__file__).parent
DATA = ("pipeline", "evaluation", "generation", "steps", "answers", "answer_rules")
DATA += ("cli_data", "cli_eval", "cli_options")
BOTH = ("cli", "cli_loop", "loop", "cli_inspect", "inspection", "quickstart")  # run, show or bundle both sides


def imported(file):
    """Modules that a file imports; those of the package by their path in it, with a dot in front."""
    folder = file.parent.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{'.' * bool(node.level)}{module}{'.' if module else ''}{name.name}" for name in node.names)


def test_arrows():
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        names = list(imported(file))
        if part in DATA:
            assert not [name for name in names if name.split(".")[0] == "trl"], file
            assert not [name for name in names if "trainer" in name or "tokenization" in name], file
        elif part not in BOTH:
            inner = [name.lstrip(".").split(".")[0] for name in names if name.startswith(".")]
            assert not set(inner) & set(DATA), file
        if part not in ("cli_inspect", "inspection"):
            assert not [name for name in names if name.startswith(".inspection")], file
        if part != "cli":
            assert not [name for name in names if name.startswith(".") and "cli" in name.split(".")], file
