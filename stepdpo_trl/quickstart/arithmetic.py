r"""Arithmetic problems with exact solutions and exact checks of every step.

A problem is a chain of operations such as "What is 7 + 3 * 4 - 5?". Each step of its solution computes one operation
and writes the remaining expression. Multiplications come first, and otherwise the order is left to right:

    Let's think step by step.
    Step 1: 3 * 4 = 12, leaving 7 + 12 - 5
    Step 2: 7 + 12 = 19, leaving 19 - 5
    Step 3: 19 - 5 = 14
    The answer is \boxed{14}.

The numbers of a problem have one digit, and all intermediate values are between 0 and 60. Standard library only.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

OPENING = "Let's think step by step.\n"
OPERATORS = ("+", "-", "*")
SMALLEST, LARGEST = 0, 60  # bounds of all intermediate values

# Tenths of all problems. The hash of a problem's text determines its split, so that the splits are disjoint.
SPLITS = {"corpus": range(0, 6), "pairs": range(6, 8), "held_out": range(8, 10)}

_STEP = re.compile(r"^Step (\d+):(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class ArithmeticProblem:
    """
    Chain of operations: a problem, or the remaining part of one.

    Args:
        numbers (`tuple[int, ...]`):
            The operands, one more than there are operators.
        operators (`tuple[str, ...]`):
            The operators between the operands: `"+"`, `"-"` or `"*"`.
    """

    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def expression(self) -> str:
        """Expression of the problem, such as `"7 + 3 * 4"`."""
        pairs = zip(self.operators, self.numbers[1:], strict=True)
        return str(self.numbers[0]) + "".join(f" {operator} {number}" for operator, number in pairs)

    @property
    def text(self) -> str:
        """Problem text in the user turn."""
        return f"What is {self.expression}?"

    @property
    def next_index(self) -> int:
        """Index of the operator to compute next: the first multiplication, or the first operator if there is none."""
        return self.operators.index("*") if "*" in self.operators else 0

    def value_at(self, index: int) -> int:
        """Return the result of the operation at `index`."""
        left, right = self.numbers[index : index + 2]
        return {"+": left + right, "-": left - right, "*": left * right}[self.operators[index]]

    def work(self, index: int) -> "ArithmeticProblem":
        """Return the problem that remains after computing the operation at `index`."""
        numbers = (*self.numbers[:index], self.value_at(index), *self.numbers[index + 2 :])
        return ArithmeticProblem(numbers, self.operators[:index] + self.operators[index + 1 :])

    def step(self, index: int) -> str:
        """Return the text of the step that computes the operation at `index`, without its label "Step k:"."""
        left = self.work(index)
        done = f" {self.numbers[index]} {self.operators[index]} {self.numbers[index + 1]} = {left.numbers[index]}"
        return f"{done}, leaving {left.expression}" if left.operators else done

    @property
    def stages(self) -> list["ArithmeticProblem"]:
        """Remaining problem before each step of the correct solution, followed by the answer."""
        stages = [self]
        while stages[-1].operators:
            stages.append(stages[-1].work(stages[-1].next_index))
        return stages

    @property
    def answer(self) -> str:
        """Correct answer."""
        return str(self.stages[-1].numbers[0])

    @property
    def split(self) -> str:
        """Split of [`SPLITS`] that the problem belongs to."""
        part = int(hashlib.sha256(self.text.encode()).hexdigest(), 16) % 10
        return next(name for name, parts in SPLITS.items() if part in parts)

    @classmethod
    def parse(cls, text: str) -> "ArithmeticProblem":
        """
        Parse the text of a problem.

        Args:
            text (`str`):
                Problem text, such as `"What is 7 + 3 * 4?"`.

        Returns:
            `ArithmeticProblem`: The problem.

        Raises:
            ValueError: If the text does not have this format.
        """
        if not re.fullmatch(r"What is \d+( [*+-] \d+)+\?", text):
            raise ValueError(
                f"{text!r} is not a supported arithmetic problem. Use whole numbers joined by ' + ', ' - ' or ' * ', "
                "as in 'What is 7 + 3 * 4?'."
            )
        return cls(tuple(map(int, re.findall(r"\d+", text))), tuple(re.findall(r"[*+-]", text)))


def make_problems(
    count: int, split: str, n_operations: int | tuple[int, int] = (2, 4), seed: int = 0
) -> list[ArithmeticProblem]:
    """
    Draw distinct problems of a split.

    Args:
        count (`int`):
            Number of problems.
        split (`str`):
            `"corpus"` (pretraining data of the quickstart model), `"pairs"` (source of the step pairs) or
            `"held_out"`.
        n_operations (`int` or `tuple[int, int]`, *optional*, defaults to `(2, 4)`):
            Number of operations, which equals the number of steps. Either a number or a range `(minimum, maximum)`.
        seed (`int`, *optional*, defaults to `0`):
            Random seed. The same arguments always return the same problems.

    Returns:
        `list[ArithmeticProblem]`: The problems.

    Raises:
        ValueError: If an argument is invalid, or if there are not enough distinct problems.
    """
    if count < 1:
        raise ValueError(f"`count={count}` is invalid. Pass at least 1.")
    problems: dict[ArithmeticProblem, None] = {}
    for draws, problem in enumerate(iterate_problems(split, n_operations, seed)):
        problems[problem] = None
        if len(problems) == count:
            return list(problems)
        if draws > 20 * count + 1000:
            break
    raise ValueError(
        f"Found fewer than {count} distinct problems with n_operations={n_operations}. Decrease `count` or increase "
        "`n_operations`."
    )


def iterate_problems(
    split: str, n_operations: int | tuple[int, int] = (2, 4), seed: int = 0
) -> Iterator[ArithmeticProblem]:
    """Draw an endless sequence of problems, with repetitions. The arguments are those of [`make_problems`]."""
    if split not in SPLITS:
        raise ValueError(f"`split={split!r}` is unknown. Choose one of {sorted(SPLITS)}.")
    least, most = (n_operations, n_operations) if isinstance(n_operations, int) else n_operations
    if not 2 <= least <= most:
        raise ValueError(
            f"`n_operations={n_operations!r}` is invalid. Pass a number of at least 2, or a range (minimum, maximum) "
            "such as (2, 4)."
        )
    rng = random.Random(f"{split} {least} {most} {seed}")
    while True:
        problem = draw_problem(rng, rng.randint(least, most))
        if problem.split == split:
            yield problem


def draw_problem(rng: random.Random, n_operations: int) -> ArithmeticProblem:
    """
    Draw a problem of any split in which the first operation is not the first to be computed.

    Args:
        rng (`random.Random`):
            Random number generator.
        n_operations (`int`):
            Number of operations, at least 2.

    Returns:
        `ArithmeticProblem`: The problem.
    """
    while True:
        numbers = tuple(rng.randint(2, 9) for _ in range(n_operations + 1))
        problem = ArithmeticProblem(numbers, tuple(rng.choices(OPERATORS, (4, 2, 4), k=n_operations)))
        if problem.next_index > 0 and all(
            SMALLEST <= number <= LARGEST for stage in problem.stages for number in stage.numbers
        ):
            return problem


def write_solution(problem: ArithmeticProblem, choices: list[int] | None = None) -> str:
    """
    Write the solution of a problem.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        choices (`list[int]`, *optional*):
            Index of the operator that each step computes. Defaults to the correct order of operations.

    Returns:
        `str`: Text of the assistant turn.
    """
    lines, left = [], problem
    for number in range(len(problem.operators)):
        index = left.next_index if choices is None else choices[number]
        lines.append(f"Step {number + 1}:{left.step(index)}\n")
        left = left.work(index)
    return OPENING + "".join(lines) + f"The answer is \\boxed{{{left.numbers[0]}}}."


def split_labeled_steps(solution: str) -> list[str]:
    """
    Return the steps of a solution: the text after each label "Step k:" up to the end of the line.

    Args:
        solution (`str`):
            Solution or beginning of a solution.

    Returns:
        `list[str]`: The steps, in order.
    """
    return [match[2] for match in _STEP.finditer(solution)]


def is_right_step(problem: ArithmeticProblem, index: int, step: str) -> bool:
    """
    Return whether a step equals the corresponding step of the correct solution.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        index (`int`):
            Number of the step, starting from 1.
        step (`str`):
            The step, such as `" 3 * 4 = 12, leaving 7 + 12 - 5"`.

    Returns:
        `bool`: `True` if the step computes the correct next operation, and both its result and the remaining
        expression are right.
    """
    if not 1 <= index <= len(problem.operators):
        return False
    left = problem.stages[index - 1]
    return step.rstrip() == left.step(left.next_index)


def first_wrong_step(problem: ArithmeticProblem, solution: str) -> int | None:
    """
    Return the number of the first wrong step of a solution.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        solution (`str`):
            Text of the solution.

    Returns:
        `int` or `None`: Number of the first wrong step, starting from 1. A missing or superfluous step is also wrong.
        `None` if all steps are right.
    """
    steps = split_labeled_steps(solution)
    for index, step in enumerate(steps, start=1):
        if not is_right_step(problem, index, step):
            return index
    return None if len(steps) == len(problem.operators) else len(steps) + 1


def first_lost_step(problem: ArithmeticProblem, solution: str) -> int | None:
    """
    Return the number of the first step that changes the value of the expression.

    Unlike [`first_wrong_step`], this accepts any order of operations that preserves the value.

    Args:
        problem (`ArithmeticProblem`):
            The problem.
        solution (`str`):
            Text of the solution.

    Returns:
        `int` or `None`: Number of the first step, starting from 1, that does not compute an operation of the remaining
        expression or that changes its value. `None` if there is no such step.
    """
    left = problem
    for number, step in enumerate(split_labeled_steps(solution), start=1):
        matches = [index for index in range(len(left.operators)) if left.step(index) == step.rstrip()]
        if not matches or left.work(matches[0]).answer != problem.answer:
            return number
        left = left.work(matches[0])
    return None


def read_result(solution: str) -> str | None:
    r"""
    Return the final answer of a solution.

    Args:
        solution (`str`):
            Text of the solution.

    Returns:
        `str` or `None`: Content of the last `\boxed{}`, or `None` if there is none.
    """
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", solution)
    return boxed[-1].strip() if boxed else None
