r"""Sums with multiplications in them: problems, solutions, and the truth about every step.

A problem is a chain of operations such as "What is 7 + 3 * 4 - 5?". Each step of its solution works one operation and
writes down what is left, the multiplications first and otherwise from left to right:

    Let's think step by step.
    Step 1: 3 * 4 = 12, leaving 7 + 12 - 5
    Step 2: 7 + 12 = 19, leaving 19 - 5
    Step 3: 19 - 5 = 14
    The answer is \boxed{14}.

The numbers of a problem have one digit, and all values on the way lie between 0 and 60. Standard library only.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

OPENING = "Let's think step by step.\n"
OPERATORS = ("+", "-", "*")
SMALLEST, LARGEST = 0, 60  # of all values on the way

# Problems of the three kinds never meet: each text belongs to one by its hash. In parts of ten.
SPLITS = {"corpus": range(0, 6), "pairs": range(6, 8), "held_out": range(8, 10)}

_STEP = re.compile(r"^Step (\d+):(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class ArithmeticProblem:
    """
    A chain of operations, or what is left of it.

    Args:
        numbers (`tuple[int, ...]`):
            The numbers, one more than there are operators.
        operators (`tuple[str, ...]`):
            `"+"`, `"-"` or `"*"` between them.
    """

    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def expression(self) -> str:
        """Such as `"7 + 3 * 4"`."""
        pairs = zip(self.operators, self.numbers[1:], strict=True)
        return str(self.numbers[0]) + "".join(f" {operator} {number}" for operator, number in pairs)

    @property
    def text(self) -> str:
        """The problem as the user asks it."""
        return f"What is {self.expression}?"

    @property
    def due(self) -> int:
        """Index of the operator to work next: the first multiplication, the first of all if there is none."""
        return self.operators.index("*") if "*" in self.operators else 0

    def value_at(self, index: int) -> int:
        """Result of the operation at `index`."""
        left, right = self.numbers[index : index + 2]
        return {"+": left + right, "-": left - right, "*": left * right}[self.operators[index]]

    def work(self, index: int) -> "ArithmeticProblem":
        """What is left after the operation at `index`."""
        numbers = (*self.numbers[:index], self.value_at(index), *self.numbers[index + 2 :])
        return ArithmeticProblem(numbers, self.operators[:index] + self.operators[index + 1 :])

    def step(self, index: int) -> str:
        """Text of the step that works the operation at `index`, from behind its "Step k:"."""
        left = self.work(index)
        done = f" {self.numbers[index]} {self.operators[index]} {self.numbers[index + 1]} = {left.numbers[index]}"
        return f"{done}, leaving {left.expression}" if left.operators else done

    @property
    def stages(self) -> list["ArithmeticProblem"]:
        """What is left before each step of the right solution, the answer last."""
        stages = [self]
        while stages[-1].operators:
            stages.append(stages[-1].work(stages[-1].due))
        return stages

    @property
    def answer(self) -> str:
        """The right answer."""
        return str(self.stages[-1].numbers[0])

    @property
    def split(self) -> str:
        """Which of [`SPLITS`] the problem belongs to."""
        part = int(hashlib.sha256(self.text.encode()).hexdigest(), 16) % 10
        return next(name for name, parts in SPLITS.items() if part in parts)

    @classmethod
    def parse(cls, text: str) -> "ArithmeticProblem":
        """
        Read a problem from its text.

        Args:
            text (`str`):
                Such as `"What is 7 + 3 * 4?"`.

        Returns:
            `ArithmeticProblem`: The problem.

        Raises:
            ValueError: If the text is not such a problem.
        """
        if not re.fullmatch(r"What is \d+( [*+-] \d+)+\?", text):
            raise ValueError(
                f"{text!r} is not a problem that can be worked here. Write it like 'What is 7 + 3 * 4?': whole "
                "numbers, with ' + ', ' - ' or ' * ' between them."
            )
        return cls(tuple(map(int, re.findall(r"\d+", text))), tuple(re.findall(r"[*+-]", text)))


def make_problems(
    count: int, split: str, n_operations: int | tuple[int, int] = (2, 4), seed: int = 0
) -> list[ArithmeticProblem]:
    """
    Draw different problems of a split.

    Args:
        count (`int`):
            How many.
        split (`str`):
            `"corpus"` (what the quickstart model was trained on), `"pairs"` (what the step pairs come from) or
            `"held_out"`.
        n_operations (`int` or `tuple[int, int]`, *optional*, defaults to `(2, 4)`):
            Number of operations, which is the number of steps: a number, or the least and the most.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw. The same arguments give the same problems.

    Returns:
        `list[ArithmeticProblem]`: The problems.

    Raises:
        ValueError: If the split is not known, or there are no such problems.
    """
    if count < 1:
        raise ValueError(f"`count={count}` problems cannot be drawn. Ask for at least 1.")
    problems: dict[ArithmeticProblem, None] = {}
    for draws, problem in enumerate(iterate_problems(split, n_operations, seed)):
        problems[problem] = None
        if len(problems) == count:
            return list(problems)
        if draws > 20 * count + 1000:
            break
    raise ValueError(
        f"There are not {count} different problems with n_operations={n_operations}. Ask for fewer, or for more "
        "operations."
    )


def iterate_problems(
    split: str, n_operations: int | tuple[int, int] = (2, 4), seed: int = 0
) -> Iterator[ArithmeticProblem]:
    """Draw problems of a split without end; arguments as for [`make_problems`]. Some may come twice."""
    if split not in SPLITS:
        raise ValueError(f"`split={split!r}` is not known. Choose one of {sorted(SPLITS)}.")
    least, most = (n_operations, n_operations) if isinstance(n_operations, int) else n_operations
    if not 2 <= least <= most:
        raise ValueError(
            f"`n_operations={n_operations!r}` is not possible. Give a number of at least 2, or the least and the most "
            "such as (2, 4)."
        )
    rng = random.Random(f"{split} {least} {most} {seed}")
    while True:
        problem = draw_problem(rng, rng.randint(least, most))
        if problem.split == split:
            yield problem


def draw_problem(rng: random.Random, n_operations: int) -> ArithmeticProblem:
    """
    Draw a problem of any split, one whose first operation is not the one to work first.

    Args:
        rng (`random.Random`):
            Source of randomness.
        n_operations (`int`):
            Number of operations, at least 2.

    Returns:
        `ArithmeticProblem`: The problem.
    """
    while True:
        numbers = tuple(rng.randint(2, 9) for _ in range(n_operations + 1))
        problem = ArithmeticProblem(numbers, tuple(rng.choices(OPERATORS, (4, 2, 4), k=n_operations)))
        if problem.due > 0 and all(
            SMALLEST <= number <= LARGEST for stage in problem.stages for number in stage.numbers
        ):
            return problem


def write_solution(problem: ArithmeticProblem, choices: list[int] | None = None) -> str:
    """
    Write a solution.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        choices (`list[int]`, *optional*):
            Index of the operator that each step works, defaults to the right ones.

    Returns:
        `str`: The text of the assistant's turn.
    """
    lines, left = [], problem
    for number in range(len(problem.operators)):
        index = left.due if choices is None else choices[number]
        lines.append(f"Step {number + 1}:{left.step(index)}\n")
        left = left.work(index)
    return OPENING + "".join(lines) + f"The answer is \\boxed{{{left.numbers[0]}}}."


def split_labelled_steps(solution: str) -> list[str]:
    """
    Return the steps of a solution, each from behind its "Step k:" to the end of its line.

    Args:
        solution (`str`):
            Text of a solution, or of its beginning.

    Returns:
        `list[str]`: The steps in the order of the text.
    """
    return [match[2] for match in _STEP.finditer(solution)]


def is_right_step(problem: ArithmeticProblem, index: int, step: str) -> bool:
    """
    Whether a step is what has to be done there, and done right.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        index (`int`):
            Number of the step, from 1.
        step (`str`):
            The step, such as `" 3 * 4 = 12, leaving 7 + 12 - 5"`.

    Returns:
        `bool`: `True` if the operation is the one to work next, and its result and what is left are right.
    """
    if not 1 <= index <= len(problem.operators):
        return False
    left = problem.stages[index - 1]
    return step.rstrip() == left.step(left.due)


def first_wrong_step(problem: ArithmeticProblem, solution: str) -> int | None:
    """
    Return where a solution first goes wrong.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        solution (`str`):
            Text of the solution.

    Returns:
        `int` or `None`: Number of the first wrong step, from 1, where a missing or a superfluous step is a wrong one
        too; `None` if all steps are right.
    """
    steps = split_labelled_steps(solution)
    for index, step in enumerate(steps, start=1):
        if not is_right_step(problem, index, step):
            return index
    return None if len(steps) == len(problem.operators) else len(steps) + 1


def first_lost_step(problem: ArithmeticProblem, solution: str) -> int | None:
    """
    Return the step that loses the right answer. Unlike for [`first_wrong_step`], any order that keeps it will do.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        solution (`str`):
            Text of the solution.

    Returns:
        `int` or `None`: Number of the first step, from 1, that works no operation of what is left, or changes the
        value of the rest; `None` if there is none.
    """
    left = problem
    for number, step in enumerate(split_labelled_steps(solution), start=1):
        ways = [index for index in range(len(left.operators)) if left.step(index) == step.rstrip()]
        if not ways or left.work(ways[0]).answer != problem.answer:
            return number
        left = left.work(ways[0])
    return None


def read_result(solution: str) -> str | None:
    r"""
    Return the final answer of a solution.

    Args:
        solution (`str`):
            Text of the solution.

    Returns:
        `str` or `None`: What the last `\boxed{}` holds, `None` if there is none.
    """
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", solution)
    return boxed[-1].strip() if boxed else None
