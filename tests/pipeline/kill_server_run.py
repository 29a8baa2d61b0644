"""
Kill runs against a server with SIGKILL and restart them: python -m tests.pipeline.kill_server_run FOLDER ADDRESS KILLS

KILLS is the number per pipeline stage. The test starts this script. It imports everything once and forks a process for
each run. Prints the number of kills in each stage.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from stepdpo_trl.data.answers import check_answer
from stepdpo_trl.data.prompts import StepPrompt
from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.generation.openai import OpenAIGenerator
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.records import Problem
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.quickstart import MODEL_PATH

STAGES = ("collect", "localize", "rectify")


class Checker:
    """Answer checker without worker processes, which a forked process cannot have."""

    def check(self, solutions, checker=None, stop=None):
        return [check_answer(problem["answer"], text) for problem, text in solutions]


def run(path, generator, sizes):
    session = Session({generator.spec: generator}, Checker())
    problems = [Problem(str(number), f"Problem {number}?", "42") for number in range(16)]
    prompt = StepPrompt("{{ problem }}", "Step 1:")
    session.collect(path, problems, "simulated", generator.spec, prompt, Sampling(), 3)
    sizes.append(size(path))
    session.localize(path, "rollout", JudgeOptions())
    sizes.append(size(path))
    session.rectify(path, num_corrections=3)
    sizes.append(size(path))


def size(path):
    return sum(file.stat().st_size for file in path.glob("*.jsonl"))


def fork(path, generator, kill_at):
    """Run in a forked process, and kill it once it has written `kill_at` bytes. Returns whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            run(path, generator, [])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ended, status = 0, 0
    while not ended and size(path) < kill_at:
        time.sleep(0.001)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def main(folder, address, kills):
    check_answer("\\pi", "\\boxed{3}")  # imports math-verify
    spec = ModelSpec("simulated", "openai", address, str(MODEL_PATH), max_concurrent_requests=16)
    generator = OpenAIGenerator(spec)
    assert generator.tokenizer  # loads it
    path, sizes = folder / "killed", [0]
    path.mkdir()
    # The uninterrupted run has threads, which a forked process would lack: nothing is forked after it
    uninterrupted = os.fork()
    if uninterrupted == 0:
        run(folder / "uninterrupted", generator, sizes)
        (folder / "sizes.json").write_text(json.dumps(sizes))
        os._exit(0)
    assert os.waitpid(uninterrupted, 0)[1] == 0
    sizes = json.loads((folder / "sizes.json").read_text())
    rng = random.Random(0)
    killed = dict.fromkeys(STAGES, 0)
    for stage, first, last in zip(STAGES, sizes, sizes[1:], strict=False):
        for moment in sorted(rng.uniform(first, last) for _ in range(kills)):
            killed[stage] += fork(path, generator, moment)
    fork(path, generator, float("inf"))
    print(json.dumps(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
