"""Step pairs from the small model's own mistakes: several localizers and rectifiers, through the data pipeline."""

import json
import random
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.generation import Completion, ModelSpec, Request, Sampling
from stepdpo_trl.pipeline.build import build
from stepdpo_trl.pipeline.collect import wrong_solutions
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.localize import localize, read_verdicts
from stepdpo_trl.pipeline.records import Problem, Solution, Verdict, text_digest
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.quickstart import MODEL_PATH, ArithmeticProblem, first_lost_step, make_problems
from stepdpo_trl.runs.run_directory import RunDirectory, RunError
from stepdpo_trl.runs.runner import TaskRunner
from stepdpo_trl.runs.tasks import Task

OPERATIONS = (2, 6)  # of a problem. Longer ones the small model gets wrong for want of training, too
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=256)
OTHER = ModelSpec("other-model")
MOST = 8  # samples for each wrong solution

# Where pairs come from: the judge that finds the first wrong step, and who writes the preferred one
SOURCES = ("arithmetic", "rollout", "random", "other")


class OtherModel:
    """Knows arithmetic and writes it in words of its own: right steps that the small model would not write."""

    def render(self, user: str, response_prefix: str) -> str:
        """The problem on one line, what is written so far on the others."""
        return f"{user}\n{response_prefix}"

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """Go on from the last step's "leaving ..."."""
        yield [(request, self.go_on(str(request.prompt))) for request in requests if request.key not in done]

    def go_on(self, text: str) -> Completion:
        """The rest of a solution, beginning with the text of the step whose "Step k:" is there."""
        problem, _, written = text.partition("\n")
        expression = written.rpartition("leaving ")[2].partition("\n")[0] if "leaving" in written else problem[8:-1]
        number, steps = written.count("Step "), []
        try:
            stages = ArithmeticProblem.parse(f"What is {expression}?").stages
        except ValueError:  # a negative number on the way
            return Completion(" I cannot say.", "stop", 0, 0)
        for left, then in pairwise(stages):
            at = left.due
            done = f" as {left.numbers[at]} {left.operators[at]} {left.numbers[at + 1]} makes {left.value_at(at)}"
            steps.append(f"{done}, {then.expression} is left")
        rest = "".join(f"\nStep {number + index}:{step}" for index, step in enumerate(steps))
        return Completion(f"{rest.partition(':')[2]}\nThe answer is \\boxed{{{then.numbers[0]}}}.", "stop", 0, 0)


def random_judge(solution: Solution) -> Task[Verdict]:
    """Any step: the control."""
    step = random.Random(solution.key).randint(1, len(split_steps(solution.text)))
    return Verdict(step, "random", {})
    yield  # a task that asks nothing


def make_shard(folder: str, shard: tuple[int, int], count: int, batch_size: int) -> None:
    """Go through all stages with a part of the problems, once for each source."""
    path = Path(folder) / f"shard-{shard[0]}-of-{shard[1]}"
    problems = [Problem(str(n), p.text, p.answer) for n, p in enumerate(make_problems(count, "pairs", OPERATIONS))]
    model, size = ModelSpec(str(MODEL_PATH), batch_size=batch_size), {"batch_size": batch_size}
    with Session({OTHER: OtherModel()}) as session:
        session.collect(path, problems, "sums", model, STEP_PROMPTS["plain"], SAMPLING, num_samples=2, shard=shard)
        session.localize(path, "arithmetic", JudgeOptions(), size)
        session.localize(path, "rollout", JudgeOptions(num_rollouts=8), size)
        with RunDirectory(path) as run:
            localize(TaskRunner(run, "localize random"), random_judge, "random")
        for judge_name in ("arithmetic", "rollout", "random"):
            session.rectify(path, judge_name, max_attempts=MOST, model=size)
        session.rectify(path, "arithmetic", max_attempts=1, rectifier=OTHER)


def read_pairs(folder: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, float]]]:
    """The pairs of each source, and what can be said of each localizer."""
    shards = sorted(Path(folder).glob("shard-*"))
    pairs, facts = {}, {}
    with RunDirectory(shards[0]) as run:
        ways = {name.partition(".by-")[0] if ".by-" not in name else "other": name for name in run.logs("corrections")}
    for source in SOURCES:
        rows, _ = build(shards, ways[source])
        # By problem, so that those held out are of other problems
        pairs[source] = sorted(rows, key=lambda row: text_digest(row["problem_id"]))
        if source != "other":
            facts[source] = {"pairs": len(rows), **_compare_with_truth(shards, source)}
    return pairs, facts


def _compare_with_truth(shards: list[Path], judge_name: str) -> dict[str, float]:
    solutions = named = right = samples = 0
    for path in shards:
        with RunDirectory(path) as run:
            verdicts, corrections = read_verdicts(run, judge_name)[1], run.log(f"corrections.{judge_name}")
            samples += sum(record["samples"] for record in corrections.values())
            for solution in wrong_solutions(run):
                step = verdicts[solution.key].step
                truth = first_lost_step(ArithmeticProblem.parse(solution.problem.problem), solution.text)
                solutions, named, right = solutions + 1, named + (step is not None), right + (step == truth)
    return {"wrong solutions": solutions, "named": named, "named right": right, "samples to rectify": samples}


def fresh_pairs(folder: Path, model: str, count: int, seed: int, batch_size: int) -> list[dict[str, Any]]:
    """So many pairs from a model's own mistakes, from as many problems as that takes."""
    spec, size = ModelSpec(model, batch_size=batch_size), {"batch_size": batch_size}
    drawn = make_problems(3200, "pairs", OPERATIONS, seed)
    problems = [Problem(str(n), problem.text, problem.answer) for n, problem in enumerate(drawn)]
    rows: list[dict[str, Any]] = []
    asked = count
    with Session() as session:
        while len(rows) < count and asked <= len(problems):
            session.collect(folder, problems[:asked], "sums", spec, STEP_PROMPTS["plain"], SAMPLING, 2, seed)
            session.localize(folder, "arithmetic", JudgeOptions(), size)
            session.rectify(folder, "arithmetic", max_attempts=MOST, model=size)
            try:
                rows = build([folder])[0]
            except RunError:  # none yet
                rows = []
            asked = int(asked * min(4, max(1.3, 1.1 * count / max(len(rows), 1)))) + 1
    if len(rows) < count:
        raise RunError(f"{len(problems)} problems give only {len(rows)} pairs instead of {count}.")
    return rows[:count]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """As JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
