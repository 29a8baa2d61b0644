"""Functions as users write them for `--checker`, well and badly. Loaded by test_checkers."""

import os
import subprocess
import sys
import time


def last_word(problem, solution):
    """Right if the solution ends with the word of the problem; unreadable without a word."""
    words = solution.split()
    return None if words[-1] == "unknown" else words[-1] == problem["word"]


def text(problem, solution):
    return "yes"


def number(problem, solution):
    return 1


def numpy_bool(problem, solution):
    import numpy

    return numpy.float64(len(solution)) > problem["length"]


def numpy_array(problem, solution):
    import numpy

    return numpy.array([True])


def raises(problem, solution):
    return problem["no such column"]


def exits(problem, solution):
    sys.exit(0)


def dies(problem, solution):
    os.kill(os.getpid(), 9)


def hangs(problem, solution):
    while True:
        pass


def sleeps_in_a_child(problem, solution):
    """Leaves two processes behind, one of them in another session."""
    for session in (False, True):
        subprocess.Popen(
            [sys.executable, "-c", f"import time; time.sleep(60)  # {problem['mark']}"], start_new_session=session
        )
    return True


def forks(problem, solution):
    """Returns twice, and both processes live on for a moment."""
    child = os.fork()
    if not child:
        time.sleep(0.2)
    return bool(child)


def exhausts_memory(problem, solution):
    taken = []
    while True:
        taken.append(bytearray(2**22))


def one_argument(problem):
    return True


def no_arguments():
    return True


def with_more(problem, solution, strict=False):
    return True


not_a_function = 5


def starts_and_hangs(problem, solution):
    subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(100)  # {problem['mark']}"], start_new_session=True
    )
    while True:
        time.sleep(1)
