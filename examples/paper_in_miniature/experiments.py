"""
Run the experiments of Step-DPO and sDPO in miniature, with the quickstart model, its own mistakes and five seeds.

    python examples/paper_in_miniature/run.py

The data pipeline collects step pairs from the model's mistakes. Every method is tuned on validation problems with the
same number of trials, trained with the same number of pairs and updates, and evaluated on test problems. Two processes
run in parallel. Finished runs are stored in `runs.jsonl`, so the same command resumes after an interruption. README.md
in this folder describes the results.
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
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices are so small that one thread is fastest
warnings.filterwarnings("ignore")

import datasets  # noqa: E402
from experiment_parts import read_rows, write_rows  # noqa: E402
from joined import KINDS, first_pairs, loop_run  # noqa: E402
from pairs import make_shard, read_pairs  # noqa: E402
from report import best_settings, write_report  # noqa: E402
from tqdm import tqdm  # noqa: E402
from training import ARMS, load, margins, measure, set_up, train  # noqa: E402

from stepdpo_trl.runs.log import Log  # noqa: E402

datasets.disable_progress_bars()


@dataclass(frozen=True)
class Scale:
    """
    Size of the experiments.

    Args:
        problems (`int`, *optional*, defaults to `900`):
            Number of problems from which pairs are collected.
        pairs (`int`, *optional*, defaults to `64`):
            Number of pairs per run. Each seed draws them from the collected pairs.
        epochs (`int`, *optional*, defaults to `4`):
            Number of epochs per run.
        batch (`int`, *optional*, defaults to `16`):
            Batch size in pairs.
        held_out (`int`, *optional*, defaults to `48`):
            Number of evaluation pairs, which are not trained on.
        test (`int`, *optional*, defaults to `500`):
            Number of test problems.
        validation (`int`, *optional*, defaults to `250`):
            Number of validation problems.
        seeds (`int`, *optional*, defaults to `5`):
            Number of runs per method.
        trial_seeds (`tuple[int, ...]`, *optional*, defaults to `(100, 101)`):
            Seeds of the tuning trials. With a single seed, a learning rate that is too high may be selected by chance.
        rates (`tuple[float, ...]`, *optional*):
            Learning rates to try.
        betas (`tuple[float, ...]`, *optional*):
            Values of beta to try.
        sft_rates (`tuple[float, ...]`, *optional*):
            Learning rates to try for SFT, which has no beta, so that all methods have the same number of trials.
        stages (`int`, *optional*, defaults to `4`):
            Number of stages of the loop.
        stage_pairs (`int`, *optional*, defaults to `32`):
            Number of pairs per stage of the loop.
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
        """Number of updates per run."""
        return self.epochs * self.pairs // self.batch


QUICK = Scale(50, 6, 1, 1, 2, 6, 4, 1, (100,), (3e-5,), (0.4,), (2e-4,), 1, 2)


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/paper_in_miniature"),
        help="folder for runs and results (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="check that everything runs, without useful results")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}, but must be at least 1.")
    return args


def trial(folder: str, arm: str, rate: float, beta: float, seed: int, scale: Scale) -> Any:
    """Train an arm and evaluate it, on validation problems for the trial seeds and on test problems otherwise."""
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
    """Evaluate the initial model."""
    return measure(load(), scale.test, False, (0.0, 1.0))


class Runs:
    """
    Runner of jobs in several processes that skips finished jobs.

    Args:
        log (`Log`):
            Log of the finished jobs.
        pool (`ProcessPoolExecutor`):
            Pool of worker processes.
    """

    def __init__(self, log: Log, pool: ProcessPoolExecutor) -> None:
        self.log, self.pool = log, pool

    def do(self, description: str, jobs: Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> None:
        """Run the jobs, given as `(key, function, arguments)`, whose keys are not in the log yet."""
        left = {self.pool.submit(function, *given): key for key, function, given in jobs if key not in self.log}
        for future in tqdm(as_completed(left), total=len(left), desc=description, disable=False):
            self.log.append(left[future], {"result": future.result()})


def main() -> None:
    """Run all experiments and write the report."""
    args = parse_args()
    scale = QUICK if args.quick else Scale()
    out: Path = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "runs.jsonl")
    requested = json.loads(
        json.dumps({**asdict(scale), "processes": args.processes})
    )  # tuples become lists, as in log
    if "scale" not in log:
        log.append("scale", requested)
    if log["scale"] != requested:
        raise SystemExit(
            f"{out} contains runs of another scale or number of processes. Pass the options of those runs, or another "
            "--output_dir."
        )
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
        runs.do("Loop", loops)
    minutes = log["minutes"]["result"] if "minutes" in log else 0.0
    log.append("minutes", {"result": minutes + (time.perf_counter() - start) / 60})
    print(write_report(log, out))


def collect(runs: Runs, out: Path, scale: Scale, parts: int) -> str:
    """Collect pairs, write the pairs of each source to a file, and return the folder of these files."""
    folder = out / "pairs"
    given = [(str(folder), (index, parts), scale.problems, 128) for index in range(parts)]
    runs.do("Collecting pairs", ((f"pairs/{index}", make_shard, given[index]) for index in range(parts)))
    pairs, facts = read_pairs(str(folder))
    if "facts" not in runs.log:
        runs.log.append("facts", {"result": facts})
    for source, rows in pairs.items():
        if len(rows) < scale.pairs + scale.held_out:
            raise SystemExit(
                f"{scale.problems} problems yield only {len(rows)} pairs for the source {source!r}, but "
                f"{scale.pairs + scale.held_out} are needed. Increase `problems` in `Scale`."
            )
        write_rows(folder / f"{source}.jsonl", rows)
    return str(folder)
