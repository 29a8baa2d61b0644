"""
Kill sDPO runs with SIGKILL, resume them, and print how their final weights differ from an uninterrupted run's.

A script started by the tests. It imports everything once and forks one process per attempt.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

if importlib.util.find_spec("deepspeed"):  # otherwise accelerate imports it in each fork
    import deepspeed  # noqa: F401
from stepdpo_trl.sdpo import reference
from stepdpo_trl.sdpo import report as sdpo_report
from tests.sdpo.separate_runs import staged_run, trained_weights

# Stage 1 is updates 1 to 3, stage 2 is 4 to 6; checkpoints after 2, 3, 4 and 6
OPTIONS = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 4}


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner, name, make):
    setattr(owner, name, make(getattr(owner, name)))


def before(owner, name, when=lambda *args: True):
    """Kill this process when a function is called."""
    replace(owner, name, lambda old: lambda *a, **k: die() if when(*a) else old(*a, **k))


def after(owner, name, when=lambda *args: True):
    """Kill this process when a function has returned."""
    replace(owner, name, lambda old: lambda *a, **k: (old(*a, **k), when(*a) and die())[0])


def in_second_stage(trainer):
    return lambda *args: trainer.stage is not None and trainer.stage.number == 2


def cut_state(trainer):
    def save(folder):
        (Path(folder) / "trainer_state.json").write_text('{"global_step": 4, "log_his')
        die()

    replace(trainer, "_save_rng_state", lambda old: save)


def at_update(number):
    return lambda t: replace(
        t.sdpo, "on_step_end", lambda old: lambda a, s, c, **k: die() if s.global_step == number else old(a, s, c, **k)
    )


def nth_copy(number):
    calls = iter(range(1000))
    return lambda t: before(reference, "copy_tensor", lambda *args: next(calls) == number)


POINTS = {
    "last update of stage 1": at_update(3),
    "stage 1 not yet saved": lambda t: before(t, "save_model", lambda folder, *args: "stage-1" in folder),
    "stage 1 without its marker": lambda t: after(t, "save_model", lambda folder, *args: "stage-1" in folder),
    "stage 1 not yet renamed": lambda t: before(os, "replace", lambda source, target: "stage-1" in str(target)),
    "stage 1 just renamed": lambda t: after(os, "replace", lambda source, target: target.name == "stage-1"),
    "reference half copied": nth_copy(5),
    "reference swapped": lambda t: after(t.reference, "become_policy"),
    "scores half written": lambda t: after(np, "savez", in_second_stage(t)),
    "first batch of stage 2": lambda t: before(t, "compute_loss", in_second_stage(t)),
    "first checkpoint of stage 2 without optimizer": lambda t: before(
        t, "_save_optimizer_and_scheduler", lambda *args: t.state.global_step == 4
    ),
    "first checkpoint of stage 2 with half a state": lambda t: replace(
        t, "_save_checkpoint", lambda old: lambda *a: (cut_state(t), old(*a)) if in_second_stage(t)() else old(*a)
    ),
    "within stage 2": at_update(5),
    "stage 2 without its marker": lambda t: after(t, "save_model", lambda folder, *args: "stage-2" in folder),
}


# The first mode is killed at all points, the others where they differ from it
IN_ALL_MODES = [
    "reference swapped",
    "scores half written",
    "first batch of stage 2",
    "first checkpoint of stage 2 with half a state",
    "within stage 2",
]


def attempt(model, folder, mode, point=None, delay=None):
    """
    Start or resume a run in a forked process. Return whether it finished.

    It is killed at `point`, one of `POINTS`, or after `delay` seconds.
    """
    pid = os.fork()
    if pid == 0:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            trainer = staged_run(model, folder, mode, **OPTIONS)
            if point is not None:
                POINTS[point](trainer)
            resume = any((path / "trainer_state.json").exists() for path in folder.glob("checkpoint-*"))
            trainer.train(resume_from_checkpoint=resume)
            torch.save(trained_weights(trainer), folder / "final.pt")
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, folder.with_suffix(".log").read_text()[-3000:]
    return True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=int, default=0, help="kills at random times in each mode")
    parser.add_argument("modes", nargs="+")
    args = parser.parse_args()
    random.seed(0)
    sdpo_report.find_spec = lambda name: None  # skips the plots, which take longer than the training
    report = []
    for mode in args.modes:
        uninterrupted = args.folder / mode / "uninterrupted"
        uninterrupted.parent.mkdir(parents=True)
        start = time.time()
        assert attempt(args.model, uninterrupted, mode)
        length = time.time() - start
        expected = torch.load(uninterrupted / "final.pt")
        kills = [(point, None) for point in (POINTS if mode == args.modes[0] else IN_ALL_MODES)]
        delays = sorted(random.uniform(0, length) for _ in range(args.random))
        kills += [(f"at {delay:.2f} s", delay) for delay in delays]
        for number, (point, delay) in enumerate(kills):
            folder = args.folder / mode / str(number)
            killed = not attempt(args.model, folder, mode, point if delay is None else None, delay)
            assert attempt(args.model, folder, mode)
            final = torch.load(folder / "final.pt")
            difference = max((final[name] - expected[name]).abs().max().item() for name in expected)
            report.append({"mode": mode, "point": point, "killed": killed, "difference": difference})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
