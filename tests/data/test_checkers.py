"""Checkers by name and functions of the user: outcomes, limits, processes left behind, bad input."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepdpo_trl.data.answers import AnswerChecker, Check, check_choice, check_exact, check_golds, count_cores
from stepdpo_trl.data.checkers import Checker, CheckerError, resolve_checker

HERE = Path(__file__).parent
USERS = HERE / "checkers_of_users.py"
LINUX = sys.platform == "linux"


@pytest.fixture(scope="module")
def pool():
    with AnswerChecker(2, time_limit=1.0, memory_limit=2**26) as pool:
        yield pool


def of_users(name):
    return resolve_checker(f"{USERS}:{name}")


@pytest.mark.parametrize(
    ("gold", "text", "outcome", "answer"),
    [
        ("Paris", r"\boxed{Paris}", "right", "Paris"),
        ("Paris", r"\boxed{\text{Paris}}", "right", r"\text{Paris}"),
        ("New  York", "The answer is New York.", "right", "New York"),
        ("0.5", r"\boxed{1/2}", "wrong", "1/2"),
        ("Paris", r"\boxed{paris}", "wrong", "paris"),
        ("Paris", "Paris", "unreadable", None),
    ],
)
def test_exact(gold, text, outcome, answer):
    check = check_exact(gold, text)
    assert (check.outcome, check.answer) == (outcome, answer)


# What a person reads in these answers: a letter, or None if it is not certain which
CHOICES = {
    r"\boxed{B}": "B",
    r"\boxed{(B)}": "B",
    r"\boxed{b)}": "B",
    r"\boxed{B.}": "B",
    r"\boxed{\text{B}}": "B",
    r"\boxed{\textbf{(B)}}": "B",
    r"\boxed{\mathrm{(B)}}": "B",
    r"\boxed{(\text{B})}": "B",
    r"\boxed{B. Paris}": "B",
    r"\boxed{B.Paris}": "B",
    r"\boxed{(B) Vitamin C}": "B",
    r"\boxed{B:x}": "B",
    r"$\boxed{B}$": "B",
    r"\boxed{\textbf{(C)}\ 59}": "C",
    r"\boxed{\textbf{(C) }59}": "C",
    r"\boxed{\text{(C) }59}": "C",
    r"\boxed{\text{C. }59}": "C",
    r"\boxed{C)\,59}": "C",
    r"\boxed{\mathbf{(C)}~\frac{1}{2}}": "C",
    r"\boxed{\text{(C) }\frac{1}{2}\text{ of A and B}}": "C",
    r"\boxed{\text{Option C}}": "C",
    r"\boxed{\text{choice (C)}}": "C",
    r"\boxed{A. Vitamins B and C}": "A",
    r"\boxed{A. Hepatitis B}": "A",
    r"\boxed{(b) Both (A) and (C)}": "B",
    r"\boxed{(C), not (D)}": "C",
    r"\boxed{A. Hepatitis A or B.}": "A",
    r"\boxed{(D) A and B}": "D",
    r"\boxed{D. Both (A) and (B)}": "D",
    r"\boxed{E: None of A, B, C, D}": "E",
    r"\boxed{(A) (3, 4)}": "A",
    r"\boxed{(A) a = 1, b = 2}": "A",
    "Hence the correct answer is (D) both of them.": "D",
    "The answer is D because A and B are false.": "D",
    "**Answer: E**": "E",
    "The answer is **C**. Paris is the capital.": "C",
    "The answer is option C.": "C",
    "#### C": "C",
    "The correct option is C.": "C",
    "So the correct choice is: **(C) 59**.": "C",
    "The best option is B, and the correct option is C.": "C",
    "The answer is not A. The correct option is C.": "C",
    r"The correct option is C. \boxed{D}": "D",
    # Other letters, words, values
    r"\boxed{F}": None,
    "Answer: F": None,
    r"\boxed{Z) no}": None,
    r"\boxed{(I) only}": None,
    "The answer is I think C.": None,
    r"\boxed{Paris}": None,
    r"\boxed{A cat}": None,
    r"\boxed{Always}": None,
    r"\boxed{59}": None,
    r"\boxed{E = mc^2}": None,
    r"\boxed{C_2}": None,
    r"\boxed{a + b}": None,
    r"\boxed{A.M.}": None,
    r"\boxed{}": None,
    "It is D": None,
    "The correct option is clear.": None,
    "The correct option is a difficult one.": None,
    # Several options
    r"\boxed{A and B}": None,
    r"\boxed{A, B}": None,
    r"\boxed{AB}": None,
    r"\boxed{A/B}": None,
    r"\boxed{(A) and (B)}": None,
    r"\boxed{(A), (B) and (C)}": None,
    r"\boxed{(A)(B)}": None,
    r"\boxed{(a) and (b)}": None,
    r"\boxed{a) 3, b) 4}": None,
    r"\boxed{A) or B)}": None,
    r"\boxed{A. and B.}": None,
    r"\boxed{\text{A} or \text{B}}": None,
    r"\boxed{\textbf{(A)}\text{ or }\textbf{(B)}}": None,
    r"\boxed{(A) Paris and (B) London}": None,
    r"\boxed{A. Paris, B. London}": None,
    r"\boxed{A. Paris; C) Rome}": None,
    r"\boxed{A}, \boxed{B}": None,
    "The correct option is A or B.": None,
}


@pytest.mark.parametrize("text", CHOICES)
def test_choice(text):
    letter = CHOICES[text]
    for gold in "ABCDE":
        check = check_choice(gold, f"Let me see.\n{text}")
        if letter is None:
            assert check.outcome == "unreadable"
        else:
            assert check == Check("right" if gold == letter else "wrong", letter)


def test_choice_without_an_answer():
    assert check_choice("D", "It is D").reason == "no final answer"
    assert check_choice("D", "Answer: F") == Check("unreadable", "F", "the answer is not one of the letters A to E")


def test_choice_golds(pool):
    golds = ["A", "E", "F", "0", "b", "(B)", "AB", ""]
    assert [golds[index] for index in check_golds(pool, golds, Checker("choice"))] == golds[2:]
    assert check_golds(pool, golds, Checker("exact")) == []


def test_outcomes_of_a_function(pool):
    """The function receives the whole row. None and blank solutions are unreadable, but no failures."""
    solutions = [({"word": "a"}, "b a"), ({"word": "a"}, "b"), ({"word": "a"}, "unknown"), ({"word": "a"}, " \n")]
    assert pool.check(solutions, of_users("last_word")) == [
        Check("right"),
        Check("wrong"),
        Check("unreadable", reason="the checker returned None"),
        Check("unreadable", reason="the solution is blank"),
    ]
    assert pool.check(solutions[:1], of_users("with_more")) == [Check("right")]
    lengths = [({"length": 1}, "ab"), ({"length": 2}, "ab")]
    assert pool.check(lengths, of_users("numpy_bool")) == [Check("right"), Check("wrong")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "the checker raised KeyError: 'no such column'"),
        ("exits", "the checker raised SystemExit: 0"),
        ("dies", "the checking process died (signal 9)"),
        ("hangs", "checking took more than 1 s"),
        pytest.param(
            "exhausts_memory",
            "checking took more than 0.0625 GiB of memory",
            marks=pytest.mark.skipif(not LINUX, reason="memory is limited on Linux"),
        ),
    ],
)
def test_a_function_that_fails(pool, name, reason):
    """A failure makes its solution unreadable and does not touch others."""
    assert pool.check([({}, "x")], of_users(name)) == [Check("unreadable", reason=reason, failed=True)]
    assert pool.check([({"word": "a"}, "a")], of_users("last_word")) == [Check("right")]


@pytest.mark.parametrize(
    ("name", "value"),
    [("text", r"'yes' \(str\)"), ("number", r"1 \(int\)"), ("numpy_array", r"array\(\[ True\]\) \(ndarray\)")],
)
def test_a_function_that_returns_something_else(pool, name, value):
    with pytest.raises(CheckerError, match=rf"'checkers_of_users.py:{name}' returned {value} for the problem 'p7'"):
        pool.check([({"id": "p7"}, "x")], of_users(name))
    assert pool.check([({"word": "a"}, "a")], of_users("last_word")) == [Check("right")]


def commands_with(mark):
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [file.parent.name] if mark in file.read_text(errors="replace") else []
    return found


@pytest.mark.skipif(not LINUX, reason="looks at /proc")
def test_processes_that_a_function_leaves_behind_are_killed(pool):
    mark = f"left behind by {os.getpid()}"
    assert pool.check([({"mark": mark}, "x")] * 3, of_users("sleeps_in_a_child")) == [Check("right")] * 3
    assert commands_with(mark) == []
    assert pool.check([({}, "x")], of_users("forks")) == [Check("right")]
    assert pool.check([({"mark": mark}, "x")], of_users("starts_and_hangs"))[0].reason == "checking took more than 1 s"
    assert commands_with(mark) == []


def rss_of(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descendants():
    """Process ids and parents of all processes below this one, zombies included."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def check_many(count):
    """Check `count` solutions, and return the growth of memory in the second half, of this process and its workers."""
    before = descendants()
    with AnswerChecker(2) as pool:

        def run(numbers):
            solutions = (({"answer": str(n % 7)}, rf"It is \boxed{{\frac{{{n % 9}}}{{1}}}}.") for n in numbers)
            outcomes = [check.outcome for check in pool.check(solutions)]
            assert outcomes == ["right" if n % 9 == n % 7 else "wrong" for n in numbers]
            return rss_of(os.getpid()), max(rss_of(pid) for pid in pool.pool._pool_manager.worker_manager.workers)

        first = run(range(count // 2))
        second = run(range(count // 2, count))
    deadline = time.monotonic() + 10
    while (left := descendants() - before - infrastructure()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()
    return [after - earlier for earlier, after in zip(first, second, strict=True)]


def infrastructure():
    """Processes of multiprocessing that live as long as this one."""
    from multiprocessing import forkserver, resource_tracker

    return {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}


@pytest.mark.skipif(not LINUX, reason="looks at /proc")
@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_many_checks_leave_no_process_and_no_memory(count):
    assert max(check_many(count)) < 20 * 2**20


def test_all_cores_are_used():
    with AnswerChecker() as pool:
        assert pool.processes == count_cores() >= 1
    if LINUX:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(list(allowed)[:1]))
        try:
            assert count_cores() == 1
        finally:
            os.sched_setaffinity(0, allowed)


SCRIPT = f"""
from stepdpo_trl.data.answers import AnswerChecker
from stepdpo_trl.data.checkers import resolve_checker

if __name__ == "__main__":
    with AnswerChecker(2, time_limit=60) as pool:
        print("ready", flush=True)
        pool.check([({{"mark": "MARK"}}, "x")] * 2, resolve_checker({str(USERS)!r} + ":starts_and_hangs"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_every_worker(tmp_path, number):
    """So also end the processes that the function of a user has started."""
    mark = f"worker test {os.getpid()} {number}"
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.replace("MARK", mark))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, file], stdout=subprocess.PIPE, env=environment, start_new_session=True, stderr=subprocess.PIPE
    ) as script:
        assert script.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while len(commands_with(mark)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        script.send_signal(number)
        script.wait(20)
    deadline = time.monotonic() + 15
    while (left := [*commands_with(mark), *in_session(script.pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def in_session(number):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += [status.parent.name] if fields[3] == str(number) and fields[0] != "Z" else []
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maths", "--checker 'maths' is not known. Did you mean 'math'?"),
        ("choices", "Did you mean 'choice'?"),
        ("checks.py", "lacks the name of the function. Pass checks.py:FUNCTION."),
        ("checks.py:a b", "is not of the form FILE.py:FUNCTION"),
        (":f", "is not of the form FILE.py:FUNCTION"),
        ("chekers_of_users.py:last_word", "there is no file chekers_of_users.py. Did you mean checkers_of_users.py?"),
        ("checkers_of_users.py:lastword", "has no function 'lastword'. Did you mean 'last_word'?"),
        ("checkers_of_users.py:not_a_function", "has no function 'not_a_function'."),
        ("checkers_of_users.py:one_argument", "one_argument(problem) cannot be called with a problem and a solution"),
        ("checkers_of_users.py:no_arguments", "no_arguments() cannot be called with a problem and a solution"),
        ("broken.py:f", "broken.py cannot be imported (SyntaxError: "),
        ("leaves.py:f", "leaves.py cannot be imported (SystemExit: 3). Fix it."),
        ("no.such.module:f", "no.such.module cannot be imported (ModuleNotFoundError: No module named 'no')"),
        ("os.path:joined", "os.path has no function 'joined'. Did you mean 'join'?"),
    ],
)
def test_bad_checkers(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(USERS, tmp_path)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(CheckerError) as error:
        resolve_checker(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checker_in_a_module_and_from_another_folder(tmp_path, monkeypatch, pool):
    """The file imports a module beside it, and is found again from any folder."""
    (tmp_path / "beside_it.py").write_text("WORD = 'a'\n")
    (tmp_path / "own.py").write_text(
        "import beside_it\n\ndef check(problem, solution):\n    return solution == beside_it.WORD\n"
    )
    monkeypatch.chdir(tmp_path)
    checker = resolve_checker("own.py:check")
    monkeypatch.chdir("/")
    assert checker.name == "own.py:check"
    assert resolve_checker(checker.spelling) == checker
    assert [check.outcome for check in pool.check([({}, "a"), ({}, "b")], checker)] == ["right", "wrong"]
    (tmp_path / "own.py").write_text("def check(problem, solution):\n    return True\n")
    changed = resolve_checker(checker.spelling)
    assert changed != checker
    assert pool.check([({}, "b")], changed) == [Check("right")]
    module = resolve_checker("operator:contains")
    assert (module.name, module.custom) == ("operator:contains", True)
    assert pool.check([({"b": 1}, "b"), ({}, "b")], module) == [Check("right"), Check("wrong")]
