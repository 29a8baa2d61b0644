"""
Help of the commands, compared with the files in `help/`.

After an intended change, regenerate the files: `python -m tests.cli.test_help --write`.
"""

import dataclasses
import inspect
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stepdpo_trl.cli.main import GROUPS, make_parser
from stepdpo_trl.cli.train_help import COMMON, FILE, LAUNCH, REQUIRED, own_options

HELP = Path(__file__).parent / "help"
COMMANDS = ["stepdpo", *(name for names in GROUPS.values() for name in names)]
ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "trl", "datasets", "numpy"}


def show_help(command):
    """Return the help of a command in 80 columns, and the heavy modules that it imports."""
    argv = [*([command] if command != "stepdpo" else []), "--help"]
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(*({HEAVY} & set(sys.modules)), file=sys.stderr))\n"
        f"from stepdpo_trl.cli.main import main\nmain({argv})"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    return done.stdout, set(done.stderr.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text, imported = show_help(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert text == (HELP / f"{command}.txt").read_text(), (
        "If the change is intended, run python -m tests.cli.test_help --write"
    )
    assert imported == set()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # not wall time: the CPU is shared
    assert max(map(len, text.splitlines())) <= 80
    assert "default: None" not in text
    assert all(entry.count("(default") <= 1 for entry in re.split(r"\n  (?=--)", text))


def test_every_command_is_listed_and_has_an_example():
    assert {path.stem for path in HELP.glob("*.txt")} == set(COMMANDS)
    assert set(make_parser().commands.choices) == set(COMMANDS) - {"stepdpo"}
    for command in COMMANDS[1:]:
        assert re.search(rf"^Example.*\n  stepdpo {command}\b", (HELP / f"{command}.txt").read_text(), re.M)


def test_numeric_defaults_are_shown():
    for command, parser in make_parser().commands.choices.items():
        for action in parser._actions:
            if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
                text = " ".join((HELP / f"{command}.txt").read_text().split())
                assert re.search(rf"{action.option_strings[0]} [^-]*\(default: {action.default}\)", text), action


def test_own_options_are_those_of_the_dataclasses():
    """The short help of `train` reads the options from the source, without importing TRL."""
    from stepdpo_trl import StepDPOConfig
    from stepdpo_trl.cli.sdpo import SDPOArguments

    groups = iter(own_options().values())
    for config in (StepDPOConfig, SDPOArguments):
        expected = [field for field in dataclasses.fields(config) if field.name in inspect.get_annotations(config)]
        found = {option.name: (option.default, option.help) for option in next(groups)}
        assert found == {field.name: (field.default, field.metadata["help"]) for field in expected}


def test_options_of_trl_in_the_short_help_exist():
    from stepdpo_trl.cli.train import launcher_options
    from stepdpo_trl.cli.train import make_parser as make_train_parser

    known = {*make_train_parser()._option_string_actions, *launcher_options(), "--config"}
    assert {f"--{name}" for name in (REQUIRED | FILE | COMMON | LAUNCH)} <= known


def test_full_help_of_train_begins_with_the_projects_options(capsys):
    from stepdpo_trl.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(["train", "--help", "all"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    own, _, others = out.partition("Options of TRL and transformers:")
    names = re.findall(r"^  (--\w+)", own, re.M)
    assert set(names) == {f"--{option.name}" for options in own_options().values() for option in options}
    assert "--learning_rate" in others
    assert "default: None" not in out


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    HELP.mkdir(exist_ok=True)
    for file in HELP.glob("*.txt"):
        file.unlink()
    for name in COMMANDS:
        (HELP / f"{name}.txt").write_text(show_help(name)[0])
