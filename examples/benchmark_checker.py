"""
Measure how many solutions are checked per second.

    python examples/benchmark_checker.py
    python examples/benchmark_checker.py --checks 100000 --checkers math

The solutions are those of the quickstart's problems. Every second one ends with a fraction, right or wrong, which
math-verify has to parse. `function` is a function of the user, which costs a child process per solution. The memory is
that of this process and of the largest worker, and how much it has grown in the second half.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepdpo_trl.data.answers import AnswerChecker, count_cores
from stepdpo_trl.data.checkers import ANSWER_CHECKERS, Checker, resolve_checker
from stepdpo_trl.quickstart import make_problems, write_solution

FUNCTION = "function"


def ends_with_the_answer(problem: Mapping[str, Any], solution: str) -> bool | None:
    """Check a solution as a function of the user would."""
    return str(problem["answer"]) in solution.rpartition("\n")[2]


def draw_solutions(count: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield problems with solutions, half of them wrong."""
    drawn = [(problem.answer, write_solution(problem)) for problem in make_problems(500, "pairs")]
    for number in range(count):
        answer, solution = drawn[number % len(drawn)]
        if number % 2:
            solution += f"\nThe answer is \\boxed{{\\frac{{{int(answer) * 2 + number % 4 // 2}}}{{2}}}}."
        yield {"answer": answer}, solution


def memory_of(pool: AnswerChecker) -> tuple[float, float]:
    """Return the memory of this process and of the largest worker in MB (Linux)."""

    def resident(pid: int | str) -> float:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6

    return resident("self"), max(resident(pid) for pid in pool.pool._pool_manager.worker_manager.workers)


def measure(name: str, processes: int, checks: int) -> None:
    """Print one row of the table."""
    checker = resolve_checker(f"{__file__}:{ends_with_the_answer.__name__}") if name == FUNCTION else Checker(name)
    with AnswerChecker(processes) as pool:
        pool.check(draw_solutions(10 * processes), checker)  # starts the workers
        start = time.perf_counter()
        pool.check(draw_solutions(checks // 2), checker)
        before = memory_of(pool)
        pool.check(draw_solutions(checks - checks // 2), checker)
        seconds, after = time.perf_counter() - start, memory_of(pool)
    memory = "".join(f"{value:>11.0f}{value - earlier:>+7.1f}" for value, earlier in zip(after, before, strict=True))
    print(f"{name:<10}{processes:>10}{checks:>10,}{seconds:>9.1f}{checks / seconds:>11,.0f}{memory}", flush=True)


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=10_000, help="solutions per row (%(default)s)")
    parser.add_argument("--processes", type=int, default=count_cores(), help="worker processes (%(default)s)")
    names = [*ANSWER_CHECKERS, FUNCTION]
    parser.add_argument("--checkers", nargs="+", choices=names, default=names, help="rows of the table")
    args = parser.parse_args()
    if args.checks < 2 or args.processes < 1:
        parser.error("--checks must be at least 2, and --processes at least 1.")
    print("checker    processes    checks  seconds  per second   main, MB       worker, MB")
    for name in args.checkers:
        measure(name, args.processes, args.checks)


if __name__ == "__main__":
    main()
