"""
Time and memory of the pipeline stages on a large run, measured with a synthetic run.

    python examples/benchmark_store.py                                      # a million answers of 1 KB, about an hour
    python examples/benchmark_store.py --answers 1000000 --problems 500000
    python examples/benchmark_store.py --answers 10000 --problems 1000

The records of `collect` are written directly to the files of a run. Each line of the table is then measured in a new
process. Memory is the peak of its resident memory minus the resident memory after all imports, so it includes neither
torch nor a model (Linux only). The server and the answer checker are simulated within the process and answer
immediately, so the seconds, and the seconds of CPU time, are those of the pipeline itself. `rectify`, `localize
rollout` and `eval` also sample and store new answers.

20% of the answers are wrong, with one false equation, and 10% have no final answer.
"""

import argparse
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

STEPS = 5
FILLER = "We write this down, check it once more, and keep the result in mind for the steps that follow it. "


def write_steps(rng: random.Random, written: int) -> str:
    """Return an answer of about 1 KB after as many of its steps as are written already."""
    outcome = rng.choices(("right", "wrong", "unreadable"), (0.7, 0.2, 0.1))[0]
    false_step = rng.randrange(written, STEPS) if outcome == "wrong" and written < STEPS else None
    parts = []
    for index in range(written, STEPS):
        a, b = rng.randrange(10, 10_000), rng.randrange(10, 10_000)
        parts.append(f" {FILLER}So {a} + {b} = {a + b + (index == false_step)}. {FILLER[: 60 + a % 20]}")
    answer = {"right": " \\boxed{42}", "wrong": f" \\boxed{{{rng.randrange(100, 200)}}}", "unreadable": ""}[outcome]
    numbered = (f"{'' if number == 0 else f'Step {written + number + 1}:'}{part}" for number, part in enumerate(parts))
    return "\n".join(numbered) + f"The answer is{answer}."


class Server:
    """Server that answers immediately. The answer depends on the seed of the request."""

    concurrent = 16
    tokenizer = None

    def prepare(self) -> None:
        """Do nothing."""

    def render(self, user: str, response_prefix: str) -> str:
        """Return a prompt."""
        return user + response_prefix

    def complete(self, request: Any, sampling: Any) -> Any:
        """Answer a request."""
        from stepdpo_trl.generation import Completion

        text = write_steps(random.Random(request.seed), request.prompt.count("Step ") - 1)
        return Completion(text, "stop", 100, len(text) // 4)

    def accept(self, replies: Iterable[Any]) -> list:
        """Return all replies."""
        return list(replies)

    def release(self) -> list:
        """Return no replies."""
        return []

    def interrupt(self) -> None:
        """Do nothing."""

    def abandon(self) -> None:
        """Do nothing."""


class LocalModel:
    """Model in this process. It is only asked for answers that are stored."""

    render = Server.render


class Checker:
    """Answer checker that compares numbers."""

    def check(self, solutions: Iterable[tuple[Mapping[str, Any], str]], checker: Any = None, stop: Any = None) -> list:
        """Check the final answers of solutions."""
        from stepdpo_trl.data.answers import RIGHT, UNREADABLE, WRONG, Check

        found = ((problem["answer"], re.search(r"\\boxed\{(\d+)\}", text)) for problem, text in solutions)
        return [
            Check(RIGHT if match[1] == gold else WRONG, match[1]) if match else Check(UNREADABLE, None, "no answer")
            for gold, match in found
        ]


def write_problems(path: Path, count: int, times: int = 1) -> None:
    """Write a file of problems, in which each occurs several times."""
    with path.open("w") as file:
        for number in list(range(count)) * times:
            file.write(json.dumps({"problem": f"Problem {number}: {FILLER * 3}", "answer": "42"}) + "\n")


class Benchmark:
    """
    Stages on a synthetic run.

    Args:
        folder (`Path`):
            Folder of all files.
        answers (`int`):
            Number of answers.
        problems (`int`):
            Number of problems.
    """

    def __init__(self, folder: Path, answers: int, problems: int) -> None:
        from stepdpo_trl.data.prompts import StepPrompt
        from stepdpo_trl.generation import ModelSpec, Sampling
        from stepdpo_trl.pipeline.session import Session

        self.run, self.evaluation, self.file = folder / "run", folder / "eval", folder / "problems.jsonl"
        self.answers, self.num_problems, self.num_samples = answers, problems, answers // problems
        self.model = ModelSpec("simulated", "openai", "http://localhost:1/v1")
        self.prompt, self.sampling = StepPrompt("{{ problem }}", "Step 1:"), Sampling()
        self.session = Session({self.model: cast(Any, Server())}, cast(Any, Checker()))

    def problems(self) -> Sequence[Any]:
        """Read the problems."""
        from stepdpo_trl.pipeline.records import read_problems

        return read_problems(self.file)

    def make(self) -> dict:
        """Write the records of `collect`: those of the first problem by the pipeline, the others like them."""
        from stepdpo_trl.pipeline.records import write_problem
        from stepdpo_trl.runs.run_directory import RunDirectory
        from stepdpo_trl.runs.tasks import CheckRequest, RecordedChecks

        write_problems(self.file, self.num_problems)
        problems = self.problems()
        self.session.collect(
            self.run, problems[:1], "problems", self.model, self.prompt, self.sampling, self.num_samples
        )
        with RunDirectory(self.run) as run:
            first = {name: next(iter(run.log(name).items())) for name in ("generations.policy", "checks", "solutions")}
        (self.evaluation).mkdir()
        names = ("problems", *first)
        files = {name: (self.run / f"{name}.jsonl").open("w", buffering=2**20) for name in names}

        def write(name: str, key: str, record: dict) -> None:
            files[name].write(json.dumps({"key": key, **record}) + "\n")

        prefix = first["solutions"][0].split("/")[1]
        checks = RecordedChecks(self.session.checker, cast(Any, {}))
        for number, problem in enumerate(problems):
            write("problems", problem.id, write_problem(problem))
            for sample in range(self.num_samples):
                key, text = f"{problem.id}/{prefix}/{sample}", write_steps(random.Random(number * 1000 + sample), 0)
                request = CheckRequest(f"policy/{key}", {"answer": "42"}, f"Step 1:{text}")
                (check,) = checks.work([request])
                write("generations.policy", key, {**first["generations.policy"][1], "text": text})
                write("checks", request.key, checks.record(request, check))
                changed = {"problem": problem.id, "outcome": check.outcome, "answer": check.answer, "steps": STEPS}
                write("solutions", key, {**first["solutions"][1], **changed, "text": f"Step 1:{text}"})
        for file in files.values():
            file.close()
        return {"gigabytes": sum(file.stat().st_size for file in self.run.glob("*.jsonl")) / 1e9}

    def open(self) -> dict:
        """Open all logs of the run."""
        from stepdpo_trl.runs.run_directory import RunDirectory

        with RunDirectory(self.run) as run:
            for path in self.run.glob("*.jsonl"):
                run.log(path.name.removesuffix(".jsonl"))
        return {}

    def look_up(self) -> dict:
        """Read random answers."""
        from stepdpo_trl.runs.log import Log

        log = Log(self.run / "generations.policy.jsonl")
        rng = random.Random(0)
        keys = [key for key in log if rng.random() < 100_000 / self.answers]
        rng.shuffle(keys)
        started = time.monotonic()
        for key in keys:
            log[key]
        return {"per second": len(keys) / (time.monotonic() - started)}

    def append(self) -> dict:
        """Append answers to a new log, 256 per write."""
        from stepdpo_trl.runs.log import Log

        log, record = Log(self.run.parent / "appended.jsonl"), {"text": write_steps(random.Random(0), 0)}
        count = min(self.answers, 100_000)
        started = time.monotonic()
        for start in range(0, count, 256):
            log.extend((f"{number:016x}", record) for number in range(start, min(start + 256, count)))
        return {"per second": count / (time.monotonic() - started)}

    def collect(self) -> dict:
        """Resume `collect` with nothing left to do."""
        self.session.collect(
            self.run, self.problems(), "problems", self.model, self.prompt, self.sampling, self.num_samples
        )
        return {}

    def collect_locally(self) -> dict:
        """Resume `collect` with a model in this process."""
        self.session.generators[self.model] = cast(Any, LocalModel())
        return self.collect()

    def localize(self, judge: str) -> dict:
        """Run `localize`."""
        from stepdpo_trl.pipeline.judge_options import JudgeOptions

        self.session.localize(self.run, judge, JudgeOptions(num_rollouts=2))
        return {}

    def rectify(self) -> dict:
        """Run `rectify`."""
        self.session.rectify(self.run, "arithmetic", max_attempts=4)
        return {}

    def command(self, *arguments: str) -> dict:
        """Run a command of the package."""
        from stepdpo_trl.cli.main import main

        with open(os.devnull, "w") as file:
            sys.stdout, terminal = file, sys.stdout
            assert main([*arguments]) == 0
            sys.stdout = terminal
        return {}

    def evaluate(self) -> dict:
        """Run `eval`."""
        from stepdpo_trl.evaluation.evaluate import evaluate

        evaluate(
            self.session,
            self.evaluation,
            "problems",
            self.problems(),
            [self.model],
            self.prompt,
            self.sampling,
            self.num_samples,
        )
        return {}

    def twice(self) -> dict:
        """Read a file with a million problems that all occur twice, which is refused."""
        from stepdpo_trl.pipeline.records import read_problems
        from stepdpo_trl.runs.log import RunError

        path = self.file.with_name("twice.jsonl")
        write_problems(path, self.answers, times=2)
        try:
            read_problems(path)
        except RunError as error:
            return {"refused": str(error)}
        raise AssertionError("not refused")

    def stages(self) -> dict[str, Callable[[], dict]]:
        """Return the stages in the order of the table."""
        pairs = str(self.run.parent / "pairs.parquet")
        return {
            "make the run": self.make,
            "open, first time": self.open,
            "open": self.open,
            "random lookups": self.look_up,
            "appends": self.append,
            "collect, resumed": self.collect,
            "collect, local model": self.collect_locally,
            "localize arithmetic": lambda: self.localize("arithmetic"),
            "rectify": self.rectify,
            "localize rollout": lambda: self.localize("rollout"),
            "build": lambda: self.command("build", str(self.run), "--output-file", pairs),
            "report": lambda: self.command("report", str(self.run)),
            "inspect": lambda: self.command("inspect", str(self.run)),
            "eval": self.evaluate,
            "problems passed twice": self.twice,
        }


IMPORTS = (
    "datasets",
    "numpy",
    "pyarrow.parquet",
    "torch",
    "transformers",
    "stepdpo_trl.cli.main",
    "stepdpo_trl.evaluation.evaluate",
    "stepdpo_trl.pipeline.build",
)


def measure(benchmark: Benchmark, stage: str) -> dict:
    """Run a stage, and return its seconds and its peak memory without imports."""
    for name in IMPORTS:
        importlib.import_module(name)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory
    before = peak_memory()
    started, cpu = time.monotonic(), time.process_time()
    found = benchmark.stages()[stage]()
    seconds = {"seconds": time.monotonic() - started, "cpu": time.process_time() - cpu}
    return {**seconds, "imports": before, "megabytes": peak_memory() - before, **found}


def peak_memory() -> float:
    """Return the peak of the resident memory in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def measure_in_processes(arguments: list[str], stages: Iterable[str]) -> Iterator[tuple[str, dict]]:
    """Measure each stage in a new process."""
    for stage in stages:
        command = [sys.executable, __file__, *arguments, "--stage", stage]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode:
            raise SystemExit(f"{stage} failed, see above.")
        yield stage, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--problems", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="new folder for the files (a temporary one)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(measure(Benchmark(args.folder, args.answers, args.problems), args.stage)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        benchmark = Benchmark(folder, args.answers, args.problems)
        print(f"{args.answers:,} answers to {args.problems:,} problems")
        print(f"{'':<24}{'seconds':>9}{'CPU':>9}{'MB':>7}  imports")
        options = ["--answers", str(args.answers), "--problems", str(args.problems), "--folder", str(folder)]
        for stage, found in measure_in_processes(options, benchmark.stages()):
            line = f"{stage:<24}{found['seconds']:>9.2f}{found['cpu']:>9.2f}{found['megabytes']:>7.0f}"
            line += f"{found['imports']:>9.0f}"
            line += f"  {found['per second']:,.0f} per second" if "per second" in found else ""
            line += f"  {found['gigabytes']:.2f} GB" if "gigabytes" in found else ""
            print(line, flush=True)


if __name__ == "__main__":
    main()
