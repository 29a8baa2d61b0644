"""Run folders: the lock, the logs, and stored settings."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from stepdpo_trl.runs.run_directory import RunDirectory, RunError


def open_in_another_process(path):
    code = f"from stepdpo_trl.runs.run_directory import RunDirectory; RunDirectory({str(path)!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


@pytest.mark.parametrize("inherited", [False, True])
def test_two_processes(tmp_path, inherited):
    children = " or its children" if inherited else ""
    with RunDirectory(tmp_path, inherited=inherited):
        expected = f"Another process (process {os.getpid()}{children} on {platform.node()}) is using {tmp_path}."
        assert expected in open_in_another_process(tmp_path)
    assert open_in_another_process(tmp_path) == ""
    with RunDirectory(tmp_path, inherited=inherited):
        pass


@pytest.mark.parametrize("inherited", [False, True])
def test_two_objects_in_one_process(tmp_path, inherited):
    with RunDirectory(tmp_path, inherited=not inherited), pytest.raises(RunError, match=f"process {os.getpid()}"):
        RunDirectory(tmp_path, inherited=inherited)
    with RunDirectory(tmp_path):
        pass


@pytest.mark.parametrize("inherited", [False, True])
def test_children_of_a_killed_process(tmp_path, inherited):
    """They keep the folder locked if they inherit the lock, and only then."""
    sleeper = "import time; print('started', flush=True); time.sleep(60)"
    code = (
        "import subprocess, sys\nfrom stepdpo_trl.runs.run_directory import RunDirectory\n"
        f"run = RunDirectory({str(tmp_path)!r}, inherited={inherited})\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}], close_fds=False)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        lines = {process.stdout.readline().strip() for _ in range(2)}
        (child,) = (int(line) for line in lines - {"started"})
        process.kill()
        process.wait()
        error = open_in_another_process(tmp_path)
        os.kill(child, signal.SIGKILL)
    assert (f"Another process (process {process.pid} or its children on " in error) == inherited
    assert inherited or error == ""
    for _ in range(100):
        if open_in_another_process(tmp_path) == "":
            break
    else:
        pytest.fail("the folder is still locked")


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / "lock").mkdir()
    for inherited in (False, True):
        with pytest.raises(RunError, match=r"cannot be locked \(Is a directory\)"):
            RunDirectory(tmp_path, inherited=inherited)


SETTINGS = {
    "seed": 0,
    "sampling": {"temperature": 0.8, "max_new_tokens": 96},
    "models": [{"model": "a"}, {"model": "b"}],
    "shard": [0, 1],
    "num_samples": 1,
}


def changed(**settings):
    return {**SETTINGS, **settings}


def test_settings_that_may_change_are_updated(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.keep_settings("stage", SETTINGS, may_change=("num_samples",))
        run.keep_settings("stage", changed(shard=(0, 1), num_samples=2), may_change=("num_samples",))
        assert run.settings()["stage"]["num_samples"] == 2
        with pytest.raises(RunError, match="seed: 0 in this run, 1 now"):
            run.keep_settings("stage", changed(seed=1, num_samples=2), may_change=("num_samples",))


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (
            changed(sampling={"temperature": 0.8, "max_new_tokens": 90}),
            ["sampling.max_new_tokens: 96 in this run, 90 now"],
        ),
        (changed(seed=1, shard=[1, 2]), ["seed: 0 in this run, 1 now", "shard: [0, 1] in this run, [1, 2] now"]),
        (changed(models=[{"model": "a"}, {"model": "c"}]), ["models[1].model: 'b' in this run, 'c' now"]),
        (changed(models=[{"model": "a"}]), ["models[1].model: 'b' in this run, not set now"]),
        (changed(check="llm"), ["check: not set in this run, 'llm' now"]),
        (changed(shard="x" * 200), ["shard: [0, 1] in this run, '" + "x" * 116 + "... now"]),
    ],
)
def test_changed_settings_are_listed(tmp_path, settings, lines):
    with RunDirectory(tmp_path) as run:
        run.keep_settings("stage", SETTINGS)
        with pytest.raises(RunError) as error:
            run.keep_settings("stage", settings)
        assert dict(run.settings()["stage"]) == SETTINGS
    first, *listed, last = str(error.value).splitlines()
    assert first == f"`stage` in {tmp_path} was started with other settings:"
    assert listed == [f"  {line}" for line in lines]
    assert last == "Use the settings of this run to resume it, or another folder to start a new run."


def test_options_that_are_off_need_not_be_stored(tmp_path):
    """Runs of earlier releases lack options that were added later."""
    with RunDirectory(tmp_path) as run:
        run.keep_settings("stage", SETTINGS)
        newer = changed(sampling={**SETTINGS["sampling"], "top_k": 0}, check=None)
        run.keep_settings("stage", newer)
        with pytest.raises(RunError, match=r"sampling\.top_k: 0 in this run, 20 now"):
            run.keep_settings("stage", changed(sampling={**SETTINGS["sampling"], "top_k": 20}))
