import json
import os
import resource
import subprocess
import sys

import pytest

from stepdpo_trl.runs.run_directory import Log, RunDirectory, RunError


def test_records_come_back(tmp_path):
    log = Log(tmp_path / "a.jsonl")
    log.extend([("x", {"text": "a\u2028b\nc\r"}), ("y", {"n": 1})])
    log.append("x", {"text": "later"})
    again = Log(tmp_path / "a.jsonl")
    assert dict(again) == dict(log) == {"x": {"text": "later"}, "y": {"n": 1}}


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_torn_last_line_is_repaired_and_said(tmp_path, caplog, cut):
    path = tmp_path / "a.jsonl"
    Log(path).extend([("x", {"n": 1}), ("y", {"n": 2})])
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    log = Log(path)
    assert dict(log) == {"x": {"n": 1}}
    assert "ends in the middle of a record" in caplog.text
    log.append("y", {"n": 2})
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"n": 1}', '{"key": ["x"]}'])
def test_a_line_of_somebody_else(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{line}\n{{"key": "x"}}\n')
    with pytest.raises(RunError, match=r"Line 1 of .*a.jsonl is not a record"):
        Log(path)


def test_a_full_disk(tmp_path):
    """/dev/full takes nothing."""
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    log = Log.__new__(Log)
    log.path, log._records = tmp_path / "a.jsonl", {}
    with pytest.raises(RunError, match=r"The disk is full: 1 records .* Make room and give the same command again"):
        log.append("x", {"n": 1})
    assert dict(log) == {}


def test_a_write_that_breaks_off_leaves_the_file_as_it_was(tmp_path):
    """A limit on the size of files stops a write in the middle of a record."""
    path = tmp_path / "a.jsonl"
    code = f"""
import resource, signal
from stepdpo_trl.runs.run_directory import Log, RunError
log = Log(__import__("pathlib").Path({str(path)!r}))
log.append("x", {{"text": "a" * 100}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))
try:
    log.append("y", {{"text": "b" * 300}})
except RunError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "All before them are safe" in output
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["x"]


def test_two_processes(tmp_path):
    with RunDirectory(tmp_path):
        code = f"from stepdpo_trl.runs.run_directory import RunDirectory; RunDirectory({str(tmp_path)!r})"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
        assert f"Another process (process {os.getpid()} on " in output
    with RunDirectory(tmp_path):
        pass


def test_settings(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.keep_settings("stage", {"a": 1, "b": [1, 2], "n": 1}, may_change=("n",))
        run.keep_settings("stage", {"a": 1, "b": (1, 2), "n": 2}, may_change=("n",))
        assert run.settings()["stage"]["n"] == 2
        with pytest.raises(RunError, match=r"begun with a=1 \(now 2\)"):
            run.keep_settings("stage", {"a": 2, "b": [1, 2], "n": 2}, may_change=("n",))
        with pytest.raises(RunError, match=r"begun with c=None \(now 3\)"):
            run.keep_settings("stage", {"a": 1, "b": [1, 2], "n": 2, "c": 3}, may_change=("n",))
