"""Ctrl-C and SIGTERM, on the processes of the real commands."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

pytest.importorskip("openai", reason="needs the extra openai")

from stepdpo_trl.quickstart import MODEL_PATH, make_problems

from ..generation.test_faults import trickle
from ..generation.test_openai import Server

STUBBORN = """
import time
from stepdpo_trl.cli.interrupts import stoppable

with stoppable():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("stopping", flush=True)
        time.sleep(1.5)
        print("stopped", flush=True)
"""


@pytest.fixture
def server():
    server = Server()
    server.http.disconnected = threading.Event()
    yield server
    server.http.shutdown()


def start(*command):
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize(
    ("numbers", "lines"),
    [
        ((signal.SIGINT, signal.SIGINT), ["stopping", ""]),
        ((signal.SIGTERM, signal.SIGINT), ["stopping", ""]),
        ((signal.SIGINT, signal.SIGTERM, signal.SIGTERM), ["stopping", "stopped"]),
    ],
)
def test_two_signals(numbers, lines):
    with start(sys.executable, "-c", STUBBORN) as process:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        assert process.stdout.read().splitlines() == lines
    assert process.returncode == (0 if "stopped" in lines else 130)


def test_ctrl_c_during_an_import(tmp_path):
    """Packages turn the exception into another one, or abort."""
    (tmp_path / "slow.py").write_text(
        "import time\nprint('ready', flush=True)\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError from None\n"
    )
    code = "from stepdpo_trl.cli.interrupts import stoppable\nwith stoppable():\n    import slow"
    with start(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "\nstepdpo: interrupted. Rerun the same command to resume.\n"
    assert process.returncode == 130


def command_of(name, folder, *options):
    (folder / "p.jsonl").write_text(
        "".join(json.dumps({"problem": p.text, "answer": p.answer}) + "\n" for p in make_problems(40, "pairs"))
    )
    where = ["--output-dir", str(folder / "out"), "--problems", str(folder / "p.jsonl"), "--prompt", "plain"]
    where += ["--output-file", str(folder / "pairs.jsonl")] * (name == "data")
    return [sys.executable, "-m", "stepdpo_trl.cli.main", name, *where, *options]


def press(process, numbers, pause=0.5):
    """Send signals to the process group, as a terminal does. Return the output, and the seconds after the last one."""
    children = psutil.Process(process.pid).children(recursive=True)
    for number in numbers:
        os.killpg(process.pid, number)
        last = time.monotonic()
        time.sleep(pause)
    out = process.stdout.read()
    process.wait()
    seconds = time.monotonic() - last
    assert not psutil.wait_procs(children, timeout=10)[1]
    return out, seconds


def check_end(name, process, out, seconds, presses):
    # The second signal may arrive when Python has restored its default, which a shell reports as 130 too
    assert process.returncode in (130, *[-signal.SIGINT] * (presses > 1)), out
    assert seconds < 6, out  # 1.5 s on an idle machine
    assert "Traceback" not in out, out
    assert "Exception" not in out
    assert "destroyed" not in out
    assert presses > 1 or f"stepdpo {name}: interrupted. Rerun the same command to resume." in out


TROUBLES = {
    "hang": lambda handler, body: handler.connection.recv(1),
    "trickle": trickle("head"),
    "retry": lambda handler, body: handler.reply(429, b"{}", retry_after="300"),
}


def wait_for_requests(server, process, count):
    end = time.monotonic() + 120
    while len(server.bodies) < count and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "trouble", "numbers"),
    [
        ("collect", "trickle", (signal.SIGINT,)),
        ("collect", "hang", (signal.SIGTERM,)),
        ("collect", "retry", (signal.SIGINT,)),
        ("collect", "hang", (signal.SIGINT, signal.SIGINT)),
        ("collect", "retry", (signal.SIGINT, signal.SIGINT)),
        ("data", "trickle", (signal.SIGINT,)),
        ("data", "retry", (signal.SIGINT, signal.SIGINT)),
        ("eval", "hang", (signal.SIGINT,)),
        ("eval", "retry", (signal.SIGINT, signal.SIGINT)),
    ],
)
def test_commands_with_a_server(server, tmp_path, name, trouble, numbers):
    """The first signal ends a command soon, with the answers that have arrived, and a second Ctrl-C at once."""
    server.script = ["ok"] * 6 + [TROUBLES[trouble]] * 100
    options = ["--model", "m", "--base-url", server.url, "--tokenizer", str(MODEL_PATH)]
    options += ["--max-concurrent-requests", "8", "--num-samples", "2", "--temperature", "1"]
    command = command_of(name, tmp_path, *options)
    with start(*command) as process:
        wait_for_requests(server, process, 14)
        out, seconds = press(process, numbers)
    check_end(name, process, out, seconds, len(numbers))
    answers = next(iter([*(tmp_path / "out").glob("generations.policy.jsonl"), *(tmp_path / "out").glob("answers.*")]))
    assert len(answers.read_text().splitlines()) == 6


@pytest.mark.long
def test_a_signal_to_the_checking_processes_is_no_outcome(server, tmp_path):
    """SIGTERM to the whole process group ends them too. The solutions are checked when the run resumes."""
    code = "import time\n\ndef check(problem, solution):\n    time.sleep(0.1)\n    return True\n"
    (tmp_path / "slow.py").write_text(code)
    options = ["--model", "m", "--base-url", server.url, "--tokenizer", str(MODEL_PATH), "--num-samples", "2"]
    options += ["--temperature", "1", "--checker", f"{tmp_path / 'slow.py'}:check"]
    for number, pause in enumerate((0.1, 0.8, 1.5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        checks, answers = (folder / "out" / f"{name}.jsonl" for name in ("checks", "generations.policy"))
        with start(*command_of("collect", folder, *options)) as process:
            end = time.monotonic() + 120
            while not answers.exists() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(pause)
            out, seconds = press(process, (signal.SIGTERM,))
        check_end("collect", process, out, seconds, 1)
        assert "failed" not in (checks.read_text() if checks.exists() else "")
    with start(*command_of("collect", folder, *options)) as process:
        out = process.stdout.read()
    assert process.returncode == 0, out
    outcomes = {record["key"]: record["outcome"] for record in map(json.loads, checks.read_text().splitlines())}
    assert list(outcomes.values()) == ["right"] * 80


@pytest.mark.long
@pytest.mark.parametrize(("part", "number"), [("data", "INT"), ("data", "TERM"), ("train", "INT"), ("train", "TERM")])
def test_loop(tmp_path, part, number):
    """Ctrl-C reaches all processes of the loop, SIGTERM only the first one. All of them end."""
    out = tmp_path / "out"
    options = ["--model", str(MODEL_PATH), "--judge", "arithmetic", "--temperature", "1", "--stages", "1"]
    options += ["--", "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "100000"]
    pairs = out / "stage-1" / "pairs.jsonl"
    with start(*command_of("loop", tmp_path, *options)) as process:
        if part == "data":
            while not list(out.glob("stage-1/run/*.jsonl")) and process.poll() is None:
                time.sleep(0.05)
        else:
            while not (pairs.exists() and _trains(process)) and process.poll() is None:
                time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        start_of_end = time.monotonic()
        os.killpg(process.pid, signal.SIGINT) if number == "INT" else process.terminate()
        printed = process.stdout.read()
        process.wait()
    assert process.returncode == 130, printed
    assert time.monotonic() - start_of_end < 15
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert "stepdpo loop: interrupted. Rerun the same command to resume." in printed
    assert not re.search("Traceback|Exception", printed), printed


def _trains(process):
    """Return whether the training script runs, and has used some processor time."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "stepdpo_trl.cli.train" in child.cmdline() and child.cpu_times().user > 8:
                return True
    return False
