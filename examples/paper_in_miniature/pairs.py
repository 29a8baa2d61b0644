"""Collect step pairs from the model's own mistakes with the data pipeline, with several judges and rectifiers."""

from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiment_parts import random_judge

from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.generation import Completion, ModelSpec, Request, Sampling
from stepdpo_trl.pipeline.build import build
from stepdpo_trl.pipeline.collect import wrong_solutions
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.localize import localize, read_verdicts
from stepdpo_trl.pipeline.records import Problem, text_digest
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.quickstart import MODEL_PATH, ArithmeticProblem, first_lost_step, make_problems
from stepdpo_trl.runs.run_directory import RunDirectory, RunError
from stepdpo_trl.runs.runner import TaskRunner

OPERATIONS = (2, 6)  # per problem. In longer problems, the model also makes mistakes for lack of training
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=256)
OTHER = ModelSpec("other-model")
MAX_ATTEMPTS = 8  # samples for each wrong solution

# Sources of pairs: three judges, and "other" for preferred steps written by another model
SOURCES = ("arithmetic", "rollout", "random", "other")


class OtherModel:
    """Generator that writes right steps in a different wording than the quickstart model."""

    def render(self, user: str, response_prefix: str) -> str:
        """Return a prompt with the problem on the first line, followed by the beginning of the solution."""
        return f"{user}\n{response_prefix}"

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """Yield one batch with the completions of all requests that are not done."""
        yield [(request, self.complete(str(request.prompt))) for request in requests if request.key not in done]

    def complete(self, text: str) -> Completion:
        """Continue a solution after its last label "Step k:"."""
        problem, _, written = text.partition("\n")
        expression = written.rpartition("leaving ")[2].partition("\n")[0] if "leaving" in written else problem[8:-1]
        number, steps = written.count("Step "), []
        try:
            stages = ArithmeticProblem.parse(f"What is {expression}?").stages
        except ValueError:  # the remaining expression has a negative number
            return Completion(" I cannot say.", "stop", 0, 0)
        for left, then in pairwise(stages):
            at = left.next_index
            result = f" as {left.numbers[at]} {left.operators[at]} {left.numbers[at + 1]} makes {left.value_at(at)}"
            steps.append(f"{result}, {then.expression} is left")
        rest = "".join(f"\nStep {number + index}:{step}" for index, step in enumerate(steps))
        return Completion(f"{rest.partition(':')[2]}\nThe answer is \\boxed{{{then.numbers[0]}}}.", "stop", 0, 0)


def make_shard(folder: str, shard: tuple[int, int], count: int, batch_size: int) -> None:
    """Run the data pipeline on one shard of the problems, once for each source."""
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
            session.rectify(path, judge_name, max_attempts=MAX_ATTEMPTS, model=size)
        session.rectify(path, "arithmetic", max_attempts=1, rectifier=OTHER)


def read_pairs(folder: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, float]]]:
    """Return the pairs of each source, and statistics of each judge."""
    shards = sorted(Path(folder).glob("shard-*"))
    pairs, facts = {}, {}
    with RunDirectory(shards[0]) as run:
        logs = {name if ".by-" not in name else "other": name for name in run.logs("corrections")}
    for source in SOURCES:
        rows, _ = build(shards, logs[source])
        # Sort by problem, so that held-out pairs come from other problems
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
    """Collect `count` pairs from a model's own mistakes, using as many problems as necessary."""
    spec, size = ModelSpec(model, batch_size=batch_size), {"batch_size": batch_size}
    drawn = make_problems(3200, "pairs", OPERATIONS, seed)
    problems = [Problem(str(n), problem.text, problem.answer) for n, problem in enumerate(drawn)]
    rows: list[dict[str, Any]] = []
    used = count
    with Session() as session:
        while len(rows) < count and used <= len(problems):
            session.collect(folder, problems[:used], "sums", spec, STEP_PROMPTS["plain"], SAMPLING, 2, seed)
            session.localize(folder, "arithmetic", JudgeOptions(), size)
            session.rectify(folder, "arithmetic", max_attempts=MAX_ATTEMPTS, model=size)
            try:
                rows = list(build([folder])[0])
            except RunError:  # no pairs yet
                rows = []
            used = int(used * min(4, max(1.3, 1.1 * count / max(len(rows), 1)))) + 1
    if len(rows) < count:
        raise RunError(
            f"{len(problems)} problems yield only {len(rows)} pairs instead of {count}. Draw more problems."
        )
    return rows[:count]
