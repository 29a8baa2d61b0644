"""Run the commands of the documentation with the quickstart model, and check its links, options and Python blocks."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from stepdpo_trl.cli import main as cli
from stepdpo_trl.cli.loop import make_parser as loop_parser
from stepdpo_trl.cli.train import launcher_options, make_parser, parse_arguments
from stepdpo_trl.generation.vllm_arguments import OPERATIONAL
from stepdpo_trl.quickstart import MODEL_PATH, make_problems

from .evaluation.test_harness import stand_in_harness

ROOT = Path(__file__).parents[1]
README, RECIPES = ROOT / "README.md", ROOT / "recipes" / "README.md"
GUIDES = sorted((ROOT / "stepdpo_trl").glob("*/README.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", RECIPES, *GUIDES, *(ROOT / "examples").glob("*/README.md")]
MODELS = re.compile(r"^Qwen/[\w.-]+$")
# The small model needs the prompt of its pretraining. Its answers are short, so fewer tokens save time
ASKING = ("--prompt", "plain", "--max-new-tokens", "96")
# Options of `vllm serve`, which the guides mention as parts of --vllm-args
VLLM = {f"--{name}" for name in ("quantization", "generation-config", "enable-lora", "lora-modules")} | {*OPERATIONAL}
SAMPLED = (*ASKING, "--temperature", "1", "--top-p", "1", "--num-samples", "3")
QUICK = {"collect": SAMPLED, "data": SAMPLED, "eval": ASKING}
CPU = ["--use_cpu", "true", "--bf16", "false"]


def name_of(file):
    return str(file.relative_to(ROOT)).removesuffix("/README.md")


def commands(file):
    """Return the commands in the blocks marked `bash`."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", file.read_text(), re.S | re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def fill(folder):
    """Create the files that the commands read."""
    for name, split in (("problems.jsonl", "pairs"), ("test.jsonl", "held_out")):
        lines = [{"problem": problem.text, "answer": problem.answer} for problem in make_problems(24, split)]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(MODEL_PATH, folder / "outputs" / "step-dpo")  # stands in for a trained model
    for name in ("recipes", "examples", "constraints.txt", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)


def run_stepdpo(words, monkeypatch):
    """Run a command with the small model."""
    command, words = words[0], [str(MODEL_PATH) if MODELS.match(word) else word for word in words[1:]]
    if command == "train":
        check_training(words, monkeypatch)
    elif command == "loop":
        place = words.index("--")
        monkeypatch.setattr("stepdpo_trl.cli.loop.run_loop", lambda *args: None)  # test_loop runs it
        assert cli.main([command, *words[:place], "--", *words[place + 1 :], *CPU]) == 0
    else:
        assert cli.main([command, *words, *(QUICK.get(command, ()) if "--tasks" not in words else ())]) == 0


def check_training(words, monkeypatch):
    """Check that the options are valid, without training. test_cli and test_recipes train."""
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    cli.main(["train", *words, *CPU])
    assert launched[0].training_script == "stepdpo_trl.cli.train"


def run(words, monkeypatch):
    """Run a `stepdpo` command, or check that the files and options of another command exist."""
    if words[0] == "stepdpo":
        run_stepdpo(words[1:], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        script = next(word for word in words if word.endswith(".py"))
        assert Path(script).is_file()  # test_recipes runs them all
        if "--config" in words:
            parse_arguments([*words[words.index(script) + 1 :], *CPU])
        if "--config_file" in words:
            assert Path(words[words.index("--config_file") + 1]).is_file()
    elif words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "python":
        assert Path(words[1]).is_file()  # test_examples, test_quickstart and test_paper_in_miniature run them
    else:
        assert words[:2] == ["pip", "install"], words
        assert Path("constraints.txt").is_file()


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory):
    """A folder in which the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_all(README, folder, monkeypatch)
    return folder


def run_all(document, folder, monkeypatch):
    if not (folder / "problems.jsonl").exists():
        fill(folder)
    monkeypatch.chdir(folder)
    stand_in_harness(monkeypatch)
    for words in commands(document):
        run(words, monkeypatch)


@pytest.mark.slow
def test_commands_of_the_readme(after_readme):
    found = commands(README)
    assert {words[1] for words in found if words[0] == "stepdpo"} >= {"train", "data", "eval", "inspect"}
    assert (after_readme / "pairs.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=name_of)
def test_commands_of_the_guides(guide, after_readme, tmp_path, monkeypatch):
    if guide.parent.name != "pipeline":  # the pipeline guide creates its own runs and pairs
        shutil.copytree(after_readme, tmp_path, symlinks=True, dirs_exist_ok=True)
    run_all(guide, tmp_path, monkeypatch)


def test_the_guides_are_complete():
    assert {guide.parent.name for guide in GUIDES} == {
        "evaluation",
        "inspection",
        "pipeline",
        "sdpo",
        "shared_prefix",
        "step_dpo",
    }
    assert len(README.read_text().splitlines()) <= 200
    for guide in GUIDES:
        assert name_of(guide) in README.read_text()


def test_commands_of_the_recipes(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(RECIPES)
    assert len(found) > 5
    for words in found:
        if words[0] != "stepdpo":
            run(words, monkeypatch)
            continue
        parser = cli.make_parser()
        parser.parse_args(words[1:])


@pytest.mark.parametrize("file", [README, RECIPES, *GUIDES], ids=name_of)
def test_options_in_the_text_exist(file):
    """Options in the running text are those of the commands, of training or of `accelerate launch`."""
    commands_of_cli = cli.make_parser()._subparsers._group_actions[0].choices.values()
    known = {name for command in commands_of_cli for name in command._option_string_actions}
    known |= {
        *make_parser()._option_string_actions,
        *loop_parser()._option_string_actions,
        *launcher_options(),
        "--config",
        *VLLM,
    }
    text = re.sub(r"^ *```.*?^ *```", "", file.read_text(), flags=re.S | re.M)
    named = {name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert named - known == set()


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_python_is_valid(file):
    for block in re.findall(r"^```python\n(.*?)^```", file.read_text(), re.S | re.M):
        compile(block, str(file), "exec")
        for module, names in re.findall(r"^from (stepdpo_trl\S*) import (.+)$", block, re.M):
            imported = __import__(module, fromlist=["x"])
            assert all(hasattr(imported, name.strip()) for name in names.split(","))


def anchors_of(file):
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", file.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", file.read_text()):
        path, _, anchor = "".join(target).partition("#")
        linked = file.parent / path if path else file
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def test_files_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:stepdpo_trl|tests)/[\w/.]+)`", text):
        assert (ROOT / path.replace("NAME", "openai")).exists() or "NAME" in path, path


def test_names_in_contributing_exist():
    """Classes, constants and methods named in the text are in the code."""
    code = "\n".join(path.read_text() for folder in ("stepdpo_trl", "tests") for path in (ROOT / folder).rglob("*.py"))
    named = re.findall(r"`(?:DPOTrainer\.|Session\.)?(_?[A-Za-z]+[A-Z_]\w*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not re.search(rf"\b{name}\b", code)] == []
