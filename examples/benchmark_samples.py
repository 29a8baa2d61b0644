"""
Measure how many samples step pairs cost.

    python examples/benchmark_samples.py

The benchmark compares localization by binary search with a linear scan of all prefixes, and rectification in rounds
with a fixed number of 20 samples. Both sides use the same samples of the quickstart model on long problems, so their
verdicts and yields can be compared one by one. It takes about five minutes on two cores.
"""

import argparse
import tempfile
from pathlib import Path

from stepdpo_trl.data.answers import RIGHT
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.data.steps import split_steps
from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.pipeline.collect import wrong_solutions
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.judges.protocol import Judge
from stepdpo_trl.pipeline.policy import Policy
from stepdpo_trl.pipeline.records import Problem, Solution, Verdict
from stepdpo_trl.pipeline.session import Session
from stepdpo_trl.quickstart import MODEL_PATH, make_problems
from stepdpo_trl.runs.run_directory import RunDirectory
from stepdpo_trl.runs.runner import TaskRunner
from stepdpo_trl.runs.tasks import RecordedChecks, Task, model_service, run_tasks

K, FLAT = 8, 20


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--problems", type=int, default=60, help="number of problems with 8 or 9 steps (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="generation batch size (default: %(default)s)")
    args = parser.parse_args()
    for name in ("problems", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but must be at least 1.")
    return args


def linear_scan(policy: Policy, k: int) -> Judge:
    """Return a judge that samples `k` continuations after every step and names the first step after which all fail."""

    def judge(solution: Solution) -> Task[Verdict]:
        steps = split_steps(solution.text)
        step, sampled = len(steps), 0
        for length in range(len(steps) - 1, 0, -1):
            continuations = yield from policy.sample(solution.problem, steps.prefix(length + 1), range(k))
            sampled += k
            if not any(continuation.check.outcome == RIGHT for continuation in continuations):
                step = length
        return Verdict(step, "linear scan", {"rollouts": sampled + k})  # includes those after the last step

    return judge


def main() -> None:
    """Run the benchmark and print the results."""
    args = parse_args()
    drawn = make_problems(args.problems, "pairs", (8, 9))
    problems = [Problem(str(n), problem.text, problem.answer) for n, problem in enumerate(drawn)]
    model, prompt = ModelSpec(str(MODEL_PATH), batch_size=args.batch_size), STEP_PROMPTS["plain"]
    with tempfile.TemporaryDirectory() as folder, Session() as session:
        path = Path(folder)
        session.collect(path, problems, "quickstart", model, prompt, Sampling(1.0, 1.0, 256), num_samples=4)
        before = count_samples(path)
        session.localize(path, "rollout", JudgeOptions(num_rollouts=K), {"batch_size": args.batch_size})
        new_samples = count_samples(path) - before
        session.rectify(path, max_attempts=FLAT, model={"batch_size": args.batch_size})
        generator = session.generator(model)
        policy = Policy("policy", prompt, generator.render, 0)
        with RunDirectory(path) as run:
            runner = TaskRunner(run, "linear scan")
            runner.services["policy"] = model_service(
                generator, Sampling(1.0, 1.0, 256), run.log("generations.policy"), runner.name
            )
            runner.services["check"] = RecordedChecks(session.checker, run.log("checks"))
            compare_localization(runner, policy, new_samples)
            compare_rectification(runner, policy)


def count_samples(path: Path) -> int:
    """Return the number of samples drawn from the policy so far."""
    with RunDirectory(path) as run:
        return len(run.log("generations.policy"))


def compare_localization(runner: TaskRunner, policy: Policy, new_samples: int) -> None:
    """Print the rollouts and verdicts of both searches for solutions with at least 8 steps."""
    verdicts = runner.run.log("verdicts.rollout")
    solutions = [s for s in wrong_solutions(runner.run) if verdicts[s.key]["step"] and len(split_steps(s.text)) >= 8]
    scan = linear_scan(policy, K)
    linear = dict(zip((s.key for s in solutions), ordered(runner, [(s.key, scan(s)) for s in solutions]), strict=True))
    binary = {key: verdicts[key]["evidence"]["rollout"]["rollouts"] for key in linear}
    spent = sum(tried for seen in binary.values() for tried, _ in seen.values())
    scanned = sum(verdict.evidence["rollouts"] for verdict in linear.values())
    same = sum(verdicts[key]["step"] == verdict.step for key, verdict in linear.items())
    per_solution, ratio = spent / len(linear), new_samples / scanned
    print(f"\nLocalization of {len(linear)} wrong solutions with at least 8 steps, k = {K}")
    print(f"    rollouts, linear scan       {scanned:>8,}   {scanned / len(linear):.1f} per solution")
    print(
        f"    rollouts, binary search     {spent:>8,}   {per_solution:.1f} per solution, ratio: {spent / scanned:.3f}"
    )
    print(f"    new samples, all solutions  {new_samples:>8,}   ratio: {ratio:.3f} (collect had drawn the others)")
    print(f"    same verdict                {same:>8,}   {same / len(linear):.1%}")


def compare_rectification(runner: TaskRunner, policy: Policy) -> None:
    """Print the samples and yield of rectification in rounds and with a fixed number of samples."""
    corrections = runner.run.log("corrections.rollout")
    solutions = {s.key: s for s in wrong_solutions(runner.run) if s.key in corrections}

    def flat(solution: Solution) -> Task[bool]:
        steps, step = split_steps(solution.text), corrections[solution.key]["step"]
        sampled = yield from policy.sample(solution.problem, steps.prefix(step), range(FLAT))
        return any(
            s.check.outcome == RIGHT and split_steps(s.text).texts()[step - 1 : step] != (steps.texts()[step - 1],)
            for s in sampled
        )

    found = sum(ordered(runner, [(key, flat(solution)) for key, solution in solutions.items()]))
    rounds = sum(record["samples"] for record in corrections.values())
    print(f"\nRectification of {len(solutions)} wrong solutions")
    print(f"    samples, flat {FLAT}             {FLAT * len(solutions):>8,}   yield {found}")
    yielded = sum(bool(record["found"]) for record in corrections.values())
    print(f"    samples, in rounds          {rounds:>8,}   yield {yielded}: {rounds / FLAT / len(solutions):.3f}")


def ordered(runner: TaskRunner, tasks: list[tuple[str, Task]]) -> list:
    """Run tasks and return their results in the order of the tasks."""

    def named(key: str, task: Task) -> Task:
        return key, (yield from task)

    results = dict(run_tasks([named(key, task) for key, task in tasks], runner.services))
    return [results[key] for key, _ in tasks]


if __name__ == "__main__":
    main()
