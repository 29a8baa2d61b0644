"""
Speed and memory of the preparation of large data, compared with DPOTrainer's.

    python examples/benchmark_large_data.py                              # up to 1,000,000 pairs, about an hour
    python examples/benchmark_large_data.py --rows 10000 100000 --dpo_rows 10000

Each line of the table is measured in a new process, with the tokenizer of the quickstart. A pair has about 250 tokens
of prefix and two steps of 55 tokens, like those of Math-Step-DPO-10K, and four pairs have the same prompt. Memory is
the highest anonymous memory of the process (`RssAnon`, without mapped files, which the system can drop) minus that
before the work, in MB (Linux only).

Rows per second are those of a second of CPU time.

- prepare: create the trainer, which tokenizes and checks all rows. DPOTrainer gets the same texts as ordinary pairs.
- batches: draw the indices of an epoch, in the trainer's shuffled order.
- groups: the same, with `group_by_prompt`.
- lengths: sort the rows by their number of tokens, as for `precompute_ref_log_probs`.
- stages: attach an `SDPOCallback` that finds the stages in a column.
- split: `split_stages` by source, by gamma and at random.
- stream: create the trainer with a streaming dataset, and draw all rows once.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORK = ("prepare", "batches", "groups", "lengths", "stages", "split", "stream")
DPO_WORK = ("prepare", "batches", "stream")
TRAINERS = {"StepDPOTrainer": WORK, "DPOTrainer": DPO_WORK}


def make_rows(count: int) -> Iterator[dict[str, str]]:
    """Yield step pairs of the quickstart's form, with the lengths of Math-Step-DPO-10K."""
    rng = random.Random(0)

    def step(number: int, length: int) -> str:
        sums = " and ".join(f"{rng.randrange(10, 100)} + {rng.randrange(10, 100)} = 42" for _ in range(length))
        return f" {sums}, leaving {number}"

    for index in range(count):
        if index % 4 == 0:
            problem = f"What is {' + '.join(str(rng.randrange(100)) for _ in range(50))}?"
        steps = [f"Step {number}:{step(number, rng.randrange(4, 9))}" for number in range(1, rng.randrange(2, 6))]
        yield {
            "prompt": problem,
            "initial_reason_steps": "\n".join(["Let's think step by step.", *steps, f"Step {len(steps) + 1}:"]),
            "chosen": step(index, rng.randrange(5, 10)),
            "rejected": step(index + 1, rng.randrange(5, 10)),
            "source": f"source {index % 3}",
            "stage": f"stage {index % 2}",
        }


def write_rows(count: int, folder: Path) -> None:
    """Write the rows for both trainers."""
    from datasets.arrow_writer import ArrowWriter

    with (
        ArrowWriter(path=str(folder / "StepDPOTrainer.arrow")) as pairs,
        ArrowWriter(path=str(folder / "DPOTrainer.arrow")) as plain,
    ):
        for row in make_rows(count):
            pairs.write(row)
            prompt = f"{row['prompt']}\n{row['initial_reason_steps']}"
            plain.write({"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]})
        pairs.finalize()
        plain.finalize()


class Benchmark:
    """
    Work on large data.

    Args:
        name (`str`):
            Name of the trainer.
        rows (`int`):
            Number of rows.
        folder (`Path`):
            Folder of the files.
    """

    def __init__(self, name: str, rows: int, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from stepdpo_trl.quickstart import MODEL_PATH

        self.name, self.rows, self.folder = name, rows, folder
        self.model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)

    def read_rows(self) -> Any:
        """Open the rows, with the columns that the trainer expects."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / f"{self.name}.arrow"))

    def trainer(self, dataset: Any = None, **options: Any) -> Any:
        """Create the trainer. Its rows come from the cache if it has been created before."""
        from trl import DPOConfig, DPOTrainer

        from stepdpo_trl import StepDPOConfig, StepDPOTrainer

        dpo = self.name == "DPOTrainer"
        args = (DPOConfig if dpo else StepDPOConfig)(
            str(self.folder / "output"),
            max_steps=self.rows,
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            **options,
        )
        return (DPOTrainer if dpo else StepDPOTrainer)(
            self.model,
            args=args,
            train_dataset=self.read_rows() if dataset is None else dataset,
            processing_class=self.tokenizer,
        )

    def prepare(self) -> Callable[[], Any]:
        """Create the trainer."""
        return self.trainer

    def stream(self) -> Callable[[], Any]:
        """Create a trainer of a stream, and draw all rows."""
        return lambda: drain(self.trainer(self.read_rows().to_iterable_dataset()).train_dataset)

    def batches(self) -> Callable[[], Any]:
        """Draw the indices of an epoch."""
        trainer = self.trainer()
        return lambda: drain(trainer._get_train_sampler(trainer.train_dataset))

    def groups(self) -> Callable[[], Any]:
        """Draw the indices of an epoch, grouped by prompt."""
        trainer = self.trainer(group_by_prompt=True)
        return lambda: drain(trainer._get_train_sampler(trainer.train_dataset))

    def lengths(self) -> Callable[[], Any]:
        """Sort the rows by length."""
        from stepdpo_trl.shared_prefix.mixin import longest_first

        trainer = self.trainer()
        return lambda: longest_first(trainer.train_dataset)

    def stages(self) -> Callable[[], Any]:
        """Find the stages."""
        from stepdpo_trl import SDPOCallback

        trainer = self.trainer()
        return lambda: SDPOCallback(trainer)

    def split(self) -> Callable[[], Any]:
        """Split the rows into stages."""
        import numpy as np

        from stepdpo_trl import split_stages

        rows = self.read_rows()
        gamma = np.random.default_rng(0).normal(size=len(rows))
        halves = [0.5, 0.5]
        return lambda: (
            split_stages(rows, "easy_to_hard", source_column="source", gamma=gamma),
            split_stages(rows, "easy_to_hard", fractions=halves, gamma=gamma),
            split_stages(rows, "stratified", fractions=halves, source_column="source"),
        )


def drain(iterable: Any) -> None:
    """Iterate without keeping anything."""
    deque(iterable, maxlen=0)


def anonymous_megabytes() -> float:
    """Return the anonymous memory of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


class Peak(threading.Thread):
    """Thread that watches the anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.before = self.highest = anonymous_megabytes()

    def run(self) -> None:
        """Update the highest value until the work ends."""
        while not self.ended.wait(0.02):
            self.highest = max(self.highest, anonymous_megabytes())


def measure(name: str, rows: int, folder: Path, work: str) -> dict[str, float]:
    """Do some work, and return its seconds and its memory."""
    benchmark = Benchmark(name, rows, folder)
    benchmark.trainer(benchmark.read_rows().select(range(100)))  # imports
    function = getattr(benchmark, work)()
    peak = Peak()
    peak.start()
    started, cpu = time.monotonic(), time.process_time()
    kept = function()
    found = {"seconds": time.monotonic() - started, "cpu": time.process_time() - cpu}
    peak.ended.set()
    peak.join()
    del kept
    return {**found, "megabytes": max(peak.highest, anonymous_megabytes()) - peak.before}


def measure_in_process(name: str, rows: int, folder: Path, work: str) -> dict[str, float]:
    """Measure in a new process."""
    command = [sys.executable, __file__, "--measure", name, str(rows), str(folder), work]
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{work} of {rows} rows with {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lines(sizes: list[int], most_for_dpo: int) -> Iterator[str]:
    """Measure, and yield the lines of the table."""
    yield f"{'rows':>9}  {'work':<9}{'trainer':<15}{'seconds':>9}{'CPU':>9}{'rows/s':>12}{'MB':>7}"
    for rows in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            write_rows(rows, Path(temporary))
            for work in WORK:
                for name in TRAINERS:
                    if work not in TRAINERS[name] or (name == "DPOTrainer" and rows > most_for_dpo):
                        continue
                    found = measure_in_process(name, rows, Path(temporary), work)
                    yield (
                        f"{rows:>9}  {work:<9}{name:<15}{found['seconds']:>9.1f}{found['cpu']:>9.1f}"
                        f"{rows / found['cpu']:>12,.0f}{found['megabytes']:>7.0f}"
                    )


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="(%(default)s)")
    parser.add_argument("--dpo_rows", type=int, default=100_000, help="most rows for DPOTrainer (%(default)s)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.rows) < 100:
        parser.error(f"--rows contains {min(args.rows)}, but must be at least 100.")
    if args.measure:
        name, rows, folder, work = args.measure
        print(json.dumps(measure(name, int(rows), Path(folder), work)))
        return
    for text in lines(args.rows, args.dpo_rows):
        print(text, flush=True)


if __name__ == "__main__":
    main()
