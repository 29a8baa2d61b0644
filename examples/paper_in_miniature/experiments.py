"""
The experiments of Step-DPO and sDPO in miniature: the quickstart's small model, its own mistakes, five seeds.

    python examples/paper_in_miniature/run.py

From nothing: problems are drawn, pairs collected by the data pipeline, every method tuned on validation problems with
the same number of trials, trained with the same number of pairs and updates, and measured on test problems. Two
processes work side by side. What is done is in `runs.jsonl`, and the same command goes on after an interruption.
README.md beside this file says what came out.
"""

import argparse
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these matrices are small
warnings.filterwarnings("ignore")

import datasets  # noqa: E402
from joined import KINDS, first_pairs, loop_run  # noqa: E402
from pairs import make_shard, read_pairs, read_rows, write_rows  # noqa: E402
from report import best_settings, write_report  # noqa: E402
from tqdm import tqdm  # noqa: E402
from training import ARMS, load, margins, measure, set_up, train  # noqa: E402

from stepdpo_trl.runs.run_directory import Log  # noqa: E402

datasets.disable_progress_bars()


@dataclass(frozen=True)
class Scale:
    """
    How much is done.

    Args:
        problems (`int`):
            From which pairs are collected.
        pairs, epochs, batch (`int`):
            Of each run. A seed draws its pairs from those collected.
        held_out (`int`):
            Pairs that are followed and not trained on.
        test, validation (`int`):
            Problems.
        seeds (`int`):
            Runs of each method.
        trial_seeds (`tuple`):
            Seeds of trials. One may be lucky at a learning rate that is too high for others.
        rates, betas (`tuple`):
            Settings that are tried for each method.
        sft_rates (`tuple`):
            As many for supervised fine-tuning, which has no beta.
        stages, stage_pairs (`int`):
            Of the loop.
    """

    problems: int = 900
    pairs: int = 64
    epochs: int = 4
    batch: int = 16
    held_out: int = 48
    test: int = 500
    validation: int = 250
    seeds: int = 5
    trial_seeds: tuple[int, ...] = (100, 101)
    rates: tuple[float, ...] = (3e-5, 6e-5, 1.2e-4, 2.4e-4, 4.8e-4)
    betas: tuple[float, ...] = (0.1, 0.4)
    sft_rates: tuple[float, ...] = (3e-5, 6e-5, 1.2e-4, 1.7e-4, 2.4e-4, 3.4e-4, 4.8e-4, 6.8e-4, 9.6e-4, 2e-3)
    stages: int = 4
    stage_pairs: int = 32

    @property
    def updates(self) -> int:
        """Of each run."""
        return self.epochs * self.pairs // self.batch


QUICK = Scale(50, 6, 1, 1, 2, 6, 4, 1, (100,), (3e-5,), (0.4,), (2e-4,), 1, 2)


def parse_args() -> argparse.Namespace:
    """Read and check the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/paper_in_miniature"), help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that work side by side (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="see that it runs: nothing is learnt")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}, but there must be at least 1.")
    return args


def trial(folder: str, arm: str, rate: float, beta: float, seed: int, scale: Scale) -> Any:
    """Train one arm and measure it, on validation problems with a seed of trials, on test problems otherwise."""
    rows = read_rows(Path(folder) / f"{ARMS[arm].source}.jsonl")
    held_out, tuning = rows[-scale.held_out :], seed in scale.trial_seeds
    rows = random.Random(seed).sample(rows[: -scale.held_out], scale.pairs)
    follow = held_out if arm in ("DPO", "Step-DPO") and not tuning else []
    model, log = train(ARMS[arm], rows, follow, scale.updates, scale.batch, rate, beta, seed)
    if tuning:
        return measure(model, scale.validation, True, (0.0,))
    result = {**measure(model, scale.test, False, (0.0, 1.0)), "log": log}
    return {**result, "margins": margins(model, held_out)} if follow else result


def before(scale: Scale) -> Any:
    """Measure the model that all begin with."""
    return measure(load(), scale.test, False, (0.0, 1.0))


class Runs:
    """
    Work for several processes, of which nothing is done twice.

    Args:
        log (`Log`):
            What is done.
        pool (`ProcessPoolExecutor`):
            The processes.
    """

    def __init__(self, log: Log, pool: ProcessPoolExecutor) -> None:
        self.log, self.pool = log, pool

    def do(self, what: str, jobs: Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> None:
        """Run jobs, each with its key."""
        left = {self.pool.submit(work, *given): key for key, work, given in jobs if key not in self.log}
        for future in tqdm(as_completed(left), total=len(left), desc=what, disable=False):
            self.log.append(left[future], {"result": future.result()})


def main() -> None:
    """Collect, tune, train, join, report."""
    args = parse_args()
    scale = QUICK if args.quick else Scale()
    out: Path = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "runs.jsonl")
    asked = json.loads(json.dumps({**asdict(scale), "processes": args.processes}))  # as it is read again
    if "scale" not in log:
        log.append("scale", asked)
    if log["scale"] != asked:
        raise SystemExit(f"{out} holds runs of another scale or number of processes. Take another --output_dir.")
    start = time.perf_counter()
    with ProcessPoolExecutor(args.processes, get_context("spawn"), set_up) as pool:
        runs = Runs(log, pool)
        folder = collect(runs, out, scale, args.processes)

        def job(arm: str, rate: float, beta: float, seed: int) -> Any:
            name = "tune" if seed in scale.trial_seeds else "test"
            return f"{name}/{arm}/{rate:g}/{beta:g}/{seed}", trial, (folder, arm, rate, beta, seed, scale)

        def grid(arm: str) -> list[tuple[float, float]]:
            if ARMS[arm].method == "sft":
                return [(rate, 0.0) for rate in scale.sft_rates]
            return [(rate, beta) for rate in scale.rates for beta in scale.betas]

        tuned = [arm for arm in ARMS if not ARMS[arm].tuned_as]
        runs.do("Tuning", (job(arm, *one, seed) for arm in tuned for one in grid(arm) for seed in scale.trial_seeds))
        best = {arm: best_settings(log, arm) for arm in ARMS}
        runs.do("Before", iter([("test/before", before, (scale,))]))
        runs.do("Training", (job(arm, *best[arm], seed) for seed in range(scale.seeds) for arm in ARMS))
        seeds, path, settings = range(scale.seeds), str(out), best["Step-DPO"]
        runs.do("Pairs of the first model", ((f"first/{seed}", first_pairs, (path, seed, scale)) for seed in seeds))
        loops = (
            (f"loop/{kind}/{seed}", loop_run, (path, kind, seed, settings, scale)) for seed in seeds for kind in KINDS
        )
        runs.do("In turns", loops)
    minutes = log["minutes"]["result"] if "minutes" in log else 0.0
    log.append("minutes", {"result": minutes + (time.perf_counter() - start) / 60})
    print(write_report(log, out))


def collect(runs: Runs, out: Path, scale: Scale, parts: int) -> str:
    """Collect pairs, and write those of each source into a file of one folder."""
    folder = out / "pairs"
    given = [(str(folder), (index, parts), scale.problems, 128) for index in range(parts)]
    runs.do("Collecting pairs", ((f"pairs/{index}", make_shard, given[index]) for index in range(parts)))
    pairs, facts = read_pairs(str(folder))
    if "facts" not in runs.log:
        runs.log.append("facts", {"result": facts})
    for source, rows in pairs.items():
        if len(rows) < scale.pairs + scale.held_out:
            raise SystemExit(f"{scale.problems} problems give only {len(rows)} pairs by {source}.")
        write_rows(folder / f"{source}.jsonl", rows)
    return str(folder)
