"""The first stages of the comparison: problems, solutions and step pairs, and the training data of each method."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiment_parts import read_rows, write_rows
from method_data import draw, independent_rows, right_rows, step_rows, whole_rows, write_staged
from plan import METHODS, STEP, Connection, Settings, data_options, policy_options, sampling_options
from sources import (
    ProblemFiles,
    Rows,
    Sample,
    correct_at_random,
    costs,
    problem_files,
    read_corrected,
    read_samples,
    read_step_pairs,
    started_folders,
    write_more_problems,
    write_problems,
)
from units import Units

from stepdpo_trl.data.files import write_atomically
from stepdpo_trl.pipeline.records import read_texts
from stepdpo_trl.runs.run_directory import RunError


@dataclass
class DataStage:
    """
    Problems, samples of the initial model, and training data.

    Args:
        units (`Units`):
            Runner of the units of work.
        settings (`Settings`):
            Settings that must stay the same.
        connection (`Connection`):
            Where models run.
    """

    units: Units
    settings: Settings
    connection: Connection

    @property
    def out(self) -> Path:
        """Folder of the comparison."""
        return self.units.path

    @property
    def files(self) -> ProblemFiles:
        """Files of the problems."""
        return problem_files(self.out / "problems")

    @property
    def runs(self) -> list[Path]:
        """Runs with the samples of the initial model."""
        return [Path(run) for run in self.settings.runs] or [self.out / "pairs"]

    @cached_property
    def folders(self) -> list[Path]:
        """Folders of these runs, which are their shards if they have some."""
        return [folder for run in self.runs for folder in started_folders(run)]

    @cached_property
    def samples(self) -> list[Sample]:
        """Solutions that were sampled for the step pairs, without those of problems for tuning and tests."""
        texts = {text for file in self.files.excluded for text in read_texts(file)}
        return list(read_samples(self.folders, texts))

    def make(self, methods: Sequence[str]) -> None:
        """Make the training data of methods."""
        self.units.do("problems", lambda: write_problems(self.settings, self.out / "problems"))
        if not self.settings.runs:
            self.collect()
        self.units.do("data/step", self.make_pairs)
        if "dpo-tokens" in methods:
            self.sample_more(self.facts_of(STEP)["tokens"])
        makers: dict[str, Callable[[], None]] = {
            "sft": self.make_right,
            "dpo-whole": self.make_whole,
            "dpo-pairs": self.make_independent,
            "dpo-tokens": self.make_matched,
            "sdpo": self.make_staged,
            "step-dpo-random": self.make_random,
        }
        for name, maker in makers.items():
            if name in methods:
                self.units.do(f"data/{METHODS[name].data}", maker)

    def collect(self) -> None:
        """Sample solutions of the training problems and build step pairs, until there are enough of them."""
        run, shards = self.out / "pairs", self.settings.shards
        for shard in range(shards):
            name = f"pairs/{shard}-of-{shards}"
            if len(self._pairs_before(run, shard)) >= self.settings.pairs:
                return
            command = ["stepdpo", "data", "--problems", str(self.files.train), "--output-dir", str(run)]
            command += ["--output-file", str(self.out / "shard.jsonl"), "--shard", f"{shard}/{shards}"]
            options = data_options(self.settings, self.files.excluded)
            self.units.command(name, [*command, *policy_options(self.settings, self.connection), *options])

    def _pairs_before(self, run: Path, shard: int) -> Rows:
        """Return the pairs of the shards before a shard, which are complete."""
        names = {f"shard-{number}-of-{self.settings.shards}" for number in range(shard)}
        folders = [folder for folder in started_folders(run) if folder.name in names]
        return read_step_pairs(folders, self.files.excluded)

    def _all_pairs(self) -> Rows:
        return [row for run in self.runs for row in read_step_pairs(started_folders(run), self.files.excluded)]

    # ------------------------------------------------------------------------------------------------ files

    def data_file(self, name: str) -> Path:
        """Return the file of the training data of a method. It is the only one in its folder, as `trl sft` expects."""
        return self.out / "data" / METHODS[name].data / "train.jsonl"

    def facts_of(self, name: str) -> dict[str, Any]:
        """Return the number of rows of the training data of a method, and its costs in tokens and minutes."""
        file = self.out / "data" / f"{METHODS[name].data}.json"
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return facts

    def _write(self, name: str, rows: Rows, tokens: float, minutes: float, **more: float) -> None:
        if not rows:
            raise RunError(
                f"There is no training data for {name}. Sample more solutions, or remove it from --methods."
            )
        self.data_file(name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.data_file(name), rows)
        self._write_facts(name, rows=len(rows), tokens=tokens, minutes=minutes, **more)

    def _write_facts(self, name: str, **facts: float) -> None:
        write_atomically(self.out / "data" / f"{METHODS[name].data}.json", json.dumps(facts) + "\n")

    def _pairs(self) -> Rows:
        return read_rows(self.out / "data" / "pairs.jsonl")

    def _step_costs(self) -> tuple[float, float]:
        facts = self.facts_of(STEP)
        return facts["tokens"], facts["minutes"]

    # ------------------------------------------------------------------------------------------------ methods

    def make_pairs(self) -> None:
        """Draw the step pairs. Their cost is their share of that of all pairs of the runs."""
        found = self._all_pairs()
        if not found:
            raise RunError(f"There are no step pairs in {', '.join(map(str, self.runs))}. Run `stepdpo data` first.")
        if len(found) < self.settings.pairs:
            print(f"There are only {len(found)} step pairs instead of {self.settings.pairs}.", flush=True)
        pairs = draw(found, self.settings.pairs)
        (self.out / "data").mkdir(exist_ok=True)
        write_rows(self.out / "data" / "pairs.jsonl", pairs)
        tokens, minutes = costs(self.folders)
        share = len(pairs) / len(found)
        problems = round(share * len({sample.solution.problem.id for sample in self.samples}))
        self._write(STEP, step_rows(pairs), share * tokens, share * minutes, problems=problems)

    def make_whole(self) -> None:
        """Write the whole solutions of the pairs."""
        solutions = [sample.solution for sample in self.samples]
        endings = {(solution.problem.id, solution.text): solution.finish_reason for solution in solutions}
        endings |= {(problem, text): finish_reason for problem, text, finish_reason in read_corrected(self.folders)}
        self._write("dpo-whole", whole_rows(self._pairs(), endings), *self._step_costs())

    def make_right(self) -> None:
        """Write right solutions of the problems of the pairs."""
        pairs = self._pairs()
        rows = right_rows(pairs, self.samples, read_corrected(self.folders), len(pairs))
        self._write("sft", rows, *self._step_costs())

    def make_independent(self) -> None:
        """Write as many independent pairs as there are step pairs."""
        rows = independent_rows(self.samples)
        count = min(len(rows), self.facts_of(STEP)["rows"])
        self._write_independent("dpo-pairs", rows, count, self.samples, self.folders)

    def make_matched(self) -> None:
        """Write as many independent pairs as the sampled tokens of the step pairs buy."""
        samples = [*self.samples, *self._more_samples()]
        rows, tokens = independent_rows(samples), sum(sample.tokens for sample in samples)
        count = min(len(rows), round(self.facts_of(STEP)["tokens"] / tokens * len(rows)))
        more = [self.out / "independent"] if (self.out / "independent").exists() else []
        self._write_independent("dpo-tokens", rows, count, samples, [*self.folders, *more])

    def _write_independent(
        self, name: str, rows: Rows, count: int, samples: Sequence[Sample], folders: Sequence[Path]
    ) -> None:
        """Write the first of all independent pairs. Their cost is their share of that of all solutions."""
        share = count / max(len(rows), 1)
        tokens, minutes = sum(sample.tokens for sample in samples), costs(folders, ("collect",))[1]
        self._write(name, rows[:count], share * tokens, share * minutes)

    def make_staged(self) -> None:
        """Write the data of sDPO, ordered by the initial model."""
        source, target = self.data_file(STEP), self.data_file("sdpo")
        target.parent.mkdir(exist_ok=True)
        model, dtype = self.settings.model, self.settings.dtype
        self.units.call_function("data/staged", write_staged, source, target, model, dtype)
        self._write_facts("sdpo", **self.facts_of(STEP))

    def make_random(self) -> None:
        """Localize and correct the solutions at random, folder by folder, until there are enough pairs."""
        changes = {"base_url": self.connection.base_url} if self.connection.base_url else {}
        count = self.facts_of(STEP)["rows"]
        done: list[Path] = []
        rows: Rows = []
        for number, source in enumerate(self.folders):
            if len(rows) < count:
                done.append(self.out / "random" / f"{number}-{source.name}")
                attempts = self.settings.max_attempts
                self.units.call_function("data/random", correct_at_random, source, done[-1], changes, attempts)
                rows += read_step_pairs(done[-1:], self.files.excluded)
        tokens, minutes = costs(done)
        share = min(1.0, count / max(len(rows), 1))
        self._write("step-dpo-random", step_rows(draw(rows, count)), share * tokens, share * minutes)

    # ------------------------------------------------------------------------------------------------ more samples

    def sample_more(self, budget: float) -> None:
        """Sample more solutions of the same problems, until all solutions together have cost `budget` tokens."""
        if self.units.is_done(f"data/{METHODS['dpo-tokens'].data}"):
            return
        file, count = self.out / "problems" / "more.jsonl", 0
        initial = sum(sample.tokens for sample in self.samples)
        if not initial:
            raise RunError(
                "The server has not reported tokens, so dpo-tokens has no budget. Remove it from --methods."
            )
        write_more_problems(self.samples, file)
        problems = len({sample.solution.problem.id for sample in self.samples})
        per_round = initial / len(self.samples) * problems  # tokens of one more solution of each problem
        while initial + sum(sample.tokens for sample in self._more_samples()) < budget:
            count = count + 1 if count else math.ceil((budget - initial) / per_round)
            self.units.command(f"independent/{count}", self._sampling_command(file, count))

    def _sampling_command(self, file: Path, count: int) -> list[str]:
        command = ["stepdpo", "collect", "--problems", str(file), "--output-dir", str(self.out / "independent")]
        command += [*policy_options(self.settings, self.connection), *sampling_options(self.settings)]
        return [*command, "--seed", "1", "--num-samples", str(count)]

    def _more_samples(self) -> list[Sample]:
        run = self.out / "independent"
        return list(read_samples([run], ())) if (run / "solutions.jsonl").exists() else []
