"""
Run all pipeline stages with the simulated student, or kill that run several times.

    python -m tests.pipeline.kill_pipeline FOLDER
    python -m tests.pipeline.kill_pipeline FOLDER --kills 23 --size 250000

With `--kills`, each attempt is forked from this process, killed and resumed by the next one.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import math_verify  # noqa: F401  (once for all forks)

sys.path.insert(0, str(Path(__file__).parents[2]))

from stepdpo_trl.data.answers import check_answer
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.session import Session
from tests.simulated import Student, draw_records

STAGES = ["settings", "problems", "checks", "generations", "solutions", "verdicts", "corrections"]


class InProcessChecker:
    """Checks answers without worker processes, which would take longer to start than an attempt lasts."""

    def __exit__(self, *args):
        pass

    def check(self, solutions, checker=None, stop=None):
        return [check_answer(problem["answer"], text) for problem, text in solutions]


def run(path, **options):
    """Run or resume the pipeline."""
    model = ModelSpec("student")
    with Session({model: Student(delay=0.001)}, **options) as session:
        problems, prompt = draw_records(18), STEP_PROMPTS["plain"]
        session.collect(path, problems, "drawn", model, prompt, Sampling(1.0, 1.0, 256), 3)
        session.localize(path, "rollout", JudgeOptions())
        session.rectify(path, num_corrections=2)


def size(path):
    return sum(file.stat().st_size for file in path.glob("*.jsonl"))


def last_stage(path):
    """Return the stage that the run has reached."""
    return max((file.name.partition(".")[0] for file in path.glob("*.jsonl")), key=STAGES.index, default=None)


def fork(path):
    """Start an attempt in a forked process. Return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run(path, checker=InProcessChecker())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_repeatedly(path, kills, whole):
    """Kill a run of `whole` bytes `kills` times, evenly spread. Return the stage reached at each kill."""
    rng = random.Random(0)
    stages = []
    for moment in ((kill + rng.random()) / (kills + 1) for kill in range(kills)):
        pid, ended = fork(path), 0
        while not ended and size(path) < moment * whole:
            time.sleep(0.002)
            ended, _ = os.waitpid(pid, os.WNOHANG)
        if not ended:
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
                stages.append(last_stage(path))
    return stages


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--size", type=int, help="bytes written by an uninterrupted run")
    args = parser.parse_args()
    if args.kills:
        print(json.dumps(kill_repeatedly(args.folder, args.kills, args.size)))
    else:
        run(args.folder)


if __name__ == "__main__":
    main()
