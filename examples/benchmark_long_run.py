"""
Memory, speed and leftovers of a long training run of the quickstart model.

    python examples/benchmark_long_run.py                               # 9 runs of 2,000 updates, about half an hour
    python examples/benchmark_long_run.py --trainers StepDPOTrainer --workers 0
    python examples/benchmark_long_run.py --updates 100 --every 10

A run logs, evaluates and saves a checkpoint every 50 updates. Each line of the table is a run in a new process:

- memory: resident memory of the process after a tenth of the updates and after all of them, in MB, and its growth.
- CPU time: of the process per update, in the second tenth of the updates and in the last, in milliseconds, and its
  growth. The wall time is next to it, which depends on what else runs on the machine.
- end: seconds from the last update to the end of the process.
- left: open files and processes that the run has left behind, files in the temporary folder and in /dev/shm, and files
  in the output folder that are not those of the last two checkpoints (Linux only).

`DPOTrainer` trains on the same texts as ordinary preference pairs. `sDPO` is StepDPOTrainer in two stages. The worker
processes of the data loaders are started anew for each epoch and evaluation with `fork`, and kept with `spawn`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRAINERS = ("StepDPOTrainer", "sDPO", "DPOTrainer")
WORKERS = ("0", "fork", "spawn")
BATCH = 8


def make_recorder(tenth: int) -> Any:
    """Create a callback that records memory and time after every tenth of the updates."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.records: list[dict[str, float]] = []

        def record(self) -> None:
            self.records.append(
                {"wall": time.monotonic(), "cpu": time.process_time(), "megabytes": resident_megabytes()}
            )

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.record()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # After the evaluation and the checkpoint of the update before
            if state.global_step and state.global_step % tenth == 0:
                self.record()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.record()

    return Recorder()


def resident_megabytes() -> float:
    """Return the resident memory of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


def leftovers() -> dict[str, set]:
    """Return what the process holds or has created: open files, processes, files in temporary folders."""
    import psutil

    fds = {f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}" for fd in os.listdir("/proc/self/fd") if fd_exists(fd)}
    return {
        "open files": {name for name in fds if not name.endswith(".ttf")},  # matplotlib keeps two fonts open
        "processes": {f"{child.pid} {child.name()}" for child in psutil.Process().children(recursive=True)},
        "temporary files": {str(path) for path in Path(tempfile.gettempdir()).rglob("*")},
        "shared memory": {path.name for path in Path("/dev/shm").iterdir() if f"_{os.getpid()}_" in path.name},
    }


def fd_exists(fd: str) -> bool:
    """Return whether a file descriptor is open. That of the listing itself is not."""
    return os.path.lexists(f"/proc/self/fd/{fd}")


def make_trainer(name: str, workers: str, updates: int, every: int, folder: Path, recorder: Any) -> Any:
    """Create a trainer for a long run."""
    from datasets import Dataset, concatenate_datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from stepdpo_trl import SDPOCallback, StepDPOConfig, StepDPOTrainer
    from stepdpo_trl.quickstart import MODEL_PATH, PAIRS_PATH

    pairs = Dataset.from_json(str(PAIRS_PATH))
    evaluation = pairs.select(range(64))
    pairs = concatenate_datasets([pairs] * 13)
    if name == "DPOTrainer":
        pairs, evaluation = (
            rows.map(lambda row: {"prompt": f"{row['prompt']}\n{row['initial_reason_steps']}"}).select_columns(
                ["prompt", "chosen", "rejected"]
            )
            for rows in (pairs, evaluation)
        )
    config = DPOConfig if name == "DPOTrainer" else StepDPOConfig
    args = config(
        str(folder),
        max_steps=updates // 2 if name == "sDPO" else updates,  # counted per stage
        per_device_train_batch_size=BATCH,
        learning_rate=1e-6,
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        dataloader_num_workers=0 if workers == "0" else 2,
        dataloader_persistent_workers=workers == "spawn",
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    return (DPOTrainer if name == "DPOTrainer" else StepDPOTrainer)(
        AutoModelForCausalLM.from_pretrained(MODEL_PATH),
        args=args,
        train_dataset=pairs,
        eval_dataset=evaluation,
        processing_class=AutoTokenizer.from_pretrained(MODEL_PATH),
        callbacks=[recorder, *([SDPOCallback(fractions=[0.5, 0.5])] if name == "sDPO" else [])],
    )


def run(name: str, workers: str, updates: int, every: int, folder: Path) -> dict:
    """Train, and return what was measured."""
    import torch

    torch.set_num_threads(1)  # fastest for a model of this size
    if workers == "spawn":
        torch.multiprocessing.set_start_method("spawn")
    recorder = make_recorder(updates // 10)
    trainer = make_trainer(name, workers, updates, every, folder, recorder)
    before = leftovers()
    trainer.train()
    ended = time.monotonic()
    del trainer
    after = leftovers()
    left = {kind: sorted(after[kind] - before[kind]) for kind in after}
    return {"records": recorder.records, "ended": ended, "left": left}


def measure(name: str, workers: str, updates: int, every: int) -> dict:
    """Run in a new process, and return what was measured."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, files = Path(temporary, "output"), Path(temporary, "files")
        files.mkdir()
        options = ["--updates", str(updates), "--every", str(every), "--run", name, workers, str(folder)]
        environment = {**os.environ, "TMPDIR": str(files), "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, __file__, *options],
            capture_output=True,
            text=True,
            env=environment,
        )
        ended = time.monotonic()  # the same clock in all processes
        if done.returncode:
            raise SystemExit(f"{name} with {workers} workers failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        expected = {"README.md", *(f"checkpoint-{number}" for number in (updates - every, updates))}
        if name == "sDPO":
            expected |= {"stage-1", "stage-2", "sdpo", "sdpo_report.json", "sdpo_report.png"}
        found["left"]["output files"] = sorted({path.name for path in folder.iterdir()} - expected)
        found["seconds to end"] = ended - found["records"][-1]["wall"]
    return found


def summarize(found: dict) -> dict[str, Any]:
    """Return the numbers of a line of the table."""
    records = found["records"]
    last, second = ((records[-2], records[-1]), (records[1], records[2]))
    return {
        "memory": (records[1]["megabytes"], records[-1]["megabytes"]),
        **{name: tuple(end[name] - start[name] for start, end in (second, last)) for name in ("cpu", "wall")},
        "end": found["seconds to end"],
        "left": {kind: names for kind, names in found["left"].items() if names},
    }


def line(name: str, workers: str, numbers: dict[str, Any], tenth: int) -> str:
    """Return a line of the table."""
    text = f"{name:<15}{workers:<7}"
    for key, factor in (("memory", 1), ("cpu", 1000 / tenth), ("wall", 1000 / tenth)):
        first, last = (value * factor for value in numbers[key])
        text += f"{first:>9.1f}{last:>9.1f}{last / first - 1:>+8.1%}"
    left = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in numbers["left"].items()) or "nothing"
    return text + f"{numbers['end']:>7.1f}  {left}"


def lines(trainers: list[str], workers: list[str], updates: int, every: int) -> Iterator[str]:
    """Run, and yield the lines of the table."""
    yield f"{'':<22}{'memory in MB':>26}{'CPU ms per update':>26}{'wall ms per update':>26}{'end s':>7}  left"
    yield f"{'trainer':<15}{'workers':<7}" + f"{'first':>9}{'last':>9}{'':>8}" * 3
    for name in trainers:
        for start in workers:
            yield line(name, start, summarize(measure(name, start, updates, every)), updates // 10)


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS, help="(all)")
    parser.add_argument("--workers", nargs="+", choices=WORKERS, default=WORKERS, help="0, or how 2 are started (all)")
    parser.add_argument("--updates", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--every", type=int, default=50, help="updates between evaluations (%(default)s)")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.every < 1:
        parser.error(f"--every is {args.every}, but must be at least 1.")
    if args.updates < 20 or args.updates % 20 or args.updates % args.every:
        parser.error(
            f"--updates is {args.updates}, but must be a multiple of 20 (tenths, and two stages of sDPO) and of "
            f"--every ({args.every}). Pass for example --updates {20 * args.every}."
        )
    if args.run:
        name, workers, folder = args.run
        print(json.dumps(run(name, workers, args.updates, args.every, Path(folder))))
        return
    for text in lines(args.trainers, args.workers, args.updates, args.every):
        print(text, flush=True)


if __name__ == "__main__":
    main()
