"""
Kill evaluations with SIGKILL and restart them: python -m tests.evaluation.kill_evaluation FOLDER

The tests start this script. It imports everything once and forks a process for each run.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from stepdpo_trl.data.answers import check_answer
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.evaluation.evaluate import evaluate
from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.pipeline.session import Session

from ..simulated import Student, draw_records

KILLS = 5


class Checker:
    """Answer checker without worker processes, which a forked process cannot have."""

    def check(self, solutions, checker=None, stop=None):
        return [check_answer(problem["answer"], text) for problem, text in solutions]


def run(path):
    models = [ModelSpec("one/model"), ModelSpec("other/model")]
    students = [Student(0.1, delay=0.002), Student(0.3, delay=0.002, unreadable=0.1)]
    session = Session(dict(zip(models, students, strict=True)), Checker())
    problems, prompt = draw_records(40), STEP_PROMPTS["plain"]
    evaluate(session, path, "drawn", problems, models, prompt, Sampling(1.0, 1.0, 256), 3)


def size(path):
    return sum(file.stat().st_size for name in ("answers", "checks") for file in path.glob(f"{name}.*"))


def fork(path, kill_at=None):
    """Run in a forked process, and kill it once it has written `kill_at` bytes. Returns whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            run(path)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ended, status = 0, 0
    while kill_at is not None and not ended and size(path) < kill_at:
        time.sleep(0.002)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        if kill_at is not None:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def main(folder):
    check_answer("\\pi", "\\boxed{3}")  # imports math-verify
    fork(folder / "uninterrupted")
    total = size(folder / "uninterrupted")
    rng = random.Random(0)
    path = folder / "killed"
    kills = sum(fork(path, (number + rng.random()) / KILLS * total) for number in range(KILLS))
    fork(path)
    print(json.dumps({"kills": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
