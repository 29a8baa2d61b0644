"""Simulated student in place of a model. It solves chains of operations and sometimes miscalculates."""

import random
import re
import time
from collections.abc import Container, Iterator, Sequence

from stepdpo_trl.generation import Completion, Request, Sampling
from stepdpo_trl.pipeline.judges.arithmetic import evaluate_expression
from stepdpo_trl.pipeline.records import Problem as Record
from stepdpo_trl.quickstart import ArithmeticProblem, split_labeled_steps
from stepdpo_trl.quickstart.arithmetic import OPENING, draw_problem


class Student:
    """
    Generator that solves arithmetic problems step by step. A wrong step is not corrected by later ones.

    Args:
        mistakes: Probability of a wrong result per step.
        delay: Seconds per answer.
        unreadable: Probability that a solution ends without an answer.
        wordings: Number of wordings of a step.
    """

    def __init__(self, mistakes: float = 0.2, delay: float = 0.0, unreadable: float = 0.0, wordings: int = 1):
        self.mistakes, self.delay, self.unreadable, self.wordings = mistakes, delay, unreadable, wordings
        self.asked: list[str] = []

    def render(self, user: str, response_prefix: str) -> str:
        return f"{user}\n---\n{response_prefix}"

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        for request in requests:
            if request.key not in done:
                time.sleep(self.delay)
                self.asked.append(request.key)
                yield [(request, self.answer(request))]

    def answer(self, request: Request) -> Completion:
        rng = random.Random(request.seed)
        user, _, prefix = request.prompt.partition("\n---\n")
        text = "" if prefix else OPENING + "Step 1:"
        text += self.solve(ArithmeticProblem.parse(re.search(r"What is .*\?", user)[0]), prefix, rng)
        if rng.random() < self.unreadable:
            text = text.partition("The answer")[0]
        return Completion(text, "stop", len(request.prompt), len(text))

    def solve(self, problem: ArithmeticProblem, prefix: str, rng: random.Random) -> str:
        before = split_labeled_steps(prefix)[:-1] if prefix else []
        left = problem.expression
        if before:
            left = before[-1].rpartition("leaving ")[2] if "leaving" in before[-1] else before[-1].rpartition("= ")[2]
        number, lines = len(before) + 1, []
        while re.search(r" [*+-] ", left):
            operation = re.search(r"-?\d+ \* -?\d+", left) or re.match(r"-?\d+ [+-] -?\d+", left)
            value = int(evaluate_expression(operation[0])) + (
                rng.choice((1, 2, 10)) if rng.random() < self.mistakes else 0
            )
            left = left[: operation.start()] + str(value) + left[operation.end() :]
            rest = f", leaving {left}" if re.search(r" [*+-] ", left) else ""
            wording = " so" * rng.randrange(self.wordings) if self.wordings > 1 else ""
            lines.append(f"{wording} {operation[0]} = {value}{rest}")
            number += 1
        steps = f"\nStep {len(before) + 2}:"
        text = lines[0]
        for index, line in enumerate(lines[1:]):
            text += steps.replace(str(len(before) + 2), str(len(before) + 2 + index)) + line
        return text + f"\nThe answer is \\boxed{{{left}}}."


def draw_records(count: int, operations: int = 4, seed: int = 0) -> list[Record]:
    """Draw problems with their answers."""
    rng = random.Random(seed)
    drawn = {problem.text: problem for problem in (draw_problem(rng, operations) for _ in range(20 * count))}
    return [Record(f"p{n}", text, problem.answer) for n, (text, problem) in enumerate(drawn.items())][:count]
