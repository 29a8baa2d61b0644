"""
What step pairs cost: binary search against a linear scan of all prefixes, rounds against a flat 20 samples.

    python examples/benchmark_pipeline.py

Both sides read the same samples, those of the quickstart's small model on long problems, so that verdicts and yield
can be compared one by one. Takes about five minutes on two cores.
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
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=60, help="problems of 8 and 9 steps (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    if args.problems < 1 or args.batch_size < 1:
        parser.error("--problems and --batch_size must be at least 1.")
    return args


def linear_scan(policy: Policy, k: int) -> Judge:
    """`k` continuations of every prefix; the first of which none is right is lost."""

    def judge(solution: Solution) -> Task[Verdict]:
        steps = split_steps(solution.text)
        step, sampled = len(steps), 0
        for length in range(len(steps) - 1, 0, -1):
            continuations = yield from policy.sample(solution.problem, steps.prefix(length + 1), range(k))
            sampled += k
            if not any(continuation.check.outcome == RIGHT for continuation in continuations):
                step = length
        return Verdict(step, "linear scan", {"rollouts": sampled + k})  # and those behind the last step

    return judge


def main() -> None:
    """Collect, localize both ways, rectify both ways, print."""
    args = parse_args()
    drawn = make_problems(args.problems, "pairs", (8, 9))
    problems = [Problem(str(n), problem.text, problem.answer) for n, problem in enumerate(drawn)]
    model, prompt = ModelSpec(str(MODEL_PATH), batch_size=args.batch_size), STEP_PROMPTS["plain"]
    with tempfile.TemporaryDirectory() as folder, Session() as session:
        path = Path(folder)
        session.collect(path, problems, "quickstart", model, prompt, Sampling(1.0, 1.0, 256), num_samples=4)
        before = count_samples(path)
        session.localize(path, "rollout", JudgeOptions(num_rollouts=K), {"batch_size": args.batch_size})
        anew = count_samples(path) - before
        session.rectify(path, max_attempts=FLAT, model={"batch_size": args.batch_size})
        generator = session.generator(model)
        policy = Policy("policy", prompt, generator.render, 0)
        with RunDirectory(path) as run:
            runner = TaskRunner(run, "linear scan")
            runner.services["policy"] = model_service(
                generator, Sampling(1.0, 1.0, 256), run.log("generations.policy"), runner.name
            )
            runner.services["check"] = RecordedChecks(session.checker, run.log("checks"))
            compare_localization(runner, policy, anew)
            compare_rectification(runner, policy)


def count_samples(path: Path) -> int:
    """Samples of the policy so far."""
    with RunDirectory(path) as run:
        return len(run.log("generations.policy"))


def compare_localization(runner: TaskRunner, policy: Policy, anew: int) -> None:
    """Print rollouts and verdicts of both searches, for solutions of 8 or more steps."""
    verdicts = runner.run.log("verdicts.rollout")
    solutions = [s for s in wrong_solutions(runner.run) if verdicts[s.key]["step"] and len(split_steps(s.text)) >= 8]
    scan = linear_scan(policy, K)
    linear = dict(zip((s.key for s in solutions), ordered(runner, [(s.key, scan(s)) for s in solutions]), strict=True))
    binary = {key: verdicts[key]["evidence"]["rollout"]["rollouts"] for key in linear}
    spent = sum(tried for seen in binary.values() for tried, _ in seen.values())
    scanned = sum(verdict.evidence["rollouts"] for verdict in linear.values())
    same = sum(verdicts[key]["step"] == verdict.step for key, verdict in linear.items())
    print(f"\nLocalization of {len(linear)} wrong solutions of 8 or more steps, k = {K}")
    print(f"    rollouts, linear scan       {scanned:>8,}   {scanned / len(linear):.1f} a solution")
    print(f"    rollouts, binary search     {spent:>8,}   {spent / len(linear):.1f} a solution: {spent / scanned:.3f}")
    print(f"    sampled anew, of all        {anew:>8,}   {anew / scanned:.3f}: others were there from collect")
    print(f"    same verdict                {same:>8,}   {same / len(linear):.1%}")


def compare_rectification(runner: TaskRunner, policy: Policy) -> None:
    """Print samples and yield of rounds and of a flat number."""
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
    """Results of tasks in the order of the tasks."""

    def named(key: str, task: Task) -> Task:
        return key, (yield from task)

    results = dict(run_tasks([named(key, task) for key, task in tasks], runner.services))
    return [results[key] for key, _ in tasks]


if __name__ == "__main__":
    main()
