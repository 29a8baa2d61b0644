"""The wheel and the source distribution, as users get them: away from the checkout."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from stepdpo_trl.quickstart import MODEL_PATH, PAIRS_PATH, make_problems

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs the package build (`make dist`)"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the source distribution, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "build", "-o", folder, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Folder into which the wheel is installed without its dependencies."""
    site = tmp_path_factory.mktemp("site")
    wheel = next(built.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(command, check=True)
    return site


def run(installed, cwd, *command):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


STEPDPO = ("-m", "stepdpo_trl.cli.main")


def test_content(built):
    """Everything under version control is in the source distribution, and the package alone in the wheel."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked if not name.startswith(".")} <= names
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        folders = {name.split("/")[0] for name in wheel.namelist()}
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
    assert {name for name in folders if not name.endswith(".dist-info")} == {"stepdpo_trl"}
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python:" in metadata


def test_help_is_fast_and_does_not_import_torch(installed, tmp_path):
    code = "import sys, stepdpo_trl.cli.main as m; m.main(['--help'])"
    check = f"import atexit; atexit.register(lambda: print('torch' in __import__('sys').modules)); {code}"
    started = time.perf_counter()
    output = run(installed, tmp_path, "-c", check)
    assert time.perf_counter() - started < 2
    assert output.endswith("False\n")
    assert "collect" in output


def test_commands(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import stepdpo_trl; print(stepdpo_trl.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    rows = [{"problem": problem.text, "answer": problem.answer} for problem in make_problems(24, "pairs", (6, 8))]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = installed / MODEL_PATH.relative_to(ROOT)
    pairs = installed / PAIRS_PATH.relative_to(ROOT)
    common = ("--model", model, "--problems", "problems.jsonl", "--prompt", "plain")
    made = ("--output-dir", "run", "--output-file", "pairs.jsonl", "--judge", "arithmetic", "--temperature", 1)
    run(installed, tmp_path, *STEPDPO, "data", *common, *made)
    assert (tmp_path / "pairs.jsonl").read_text()
    train = ("--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", "trained", "--max_steps", 1)
    run(installed, tmp_path, *STEPDPO, "train", *train, "--use_cpu")
    assert (tmp_path / "trained" / "model.safetensors").exists()
    run(installed, tmp_path, *STEPDPO, "eval", *common, "--limit", 4, "--output-dir", "eval")
    assert (tmp_path / "eval").is_dir()
