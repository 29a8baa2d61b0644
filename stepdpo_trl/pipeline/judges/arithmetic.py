"""
Judge `arithmetic`: the first step with a false equation.

Only equations that can be read without doubt are checked: numbers with +, -, *, / and parentheses on both sides. The
judge ignores equations with variables, powers, units within a side, mixed numbers or clock times, and accepts rounded
values. It takes linear time: expressions of more than `MAX_LENGTH` characters are ignored. This module uses the
standard library only.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate, pairwise

from ...data.steps import Steps, split_steps
from ...runs.tasks import Task
from ..records import Solution, Verdict

MAX_LENGTH = 500  # characters of an expression

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_START = re.compile(r"-?\({0,20}\.?\d")  # of an expression
_SIDE = re.compile(rf"{_START.pattern}(?:[\d.,+\-*/()% \t]*[\d)%])?")
# The lookbehind keeps a chain from starting within a number, a formula or a variable
_CHAIN_START = re.compile(rf"(?<![\w.,^_{{}}\\:%)/*+\-]){_START.pattern}")
_RUN = re.compile(r"[\d.,+\-*/()% \t=]+")  # contains chains of expressions joined by equal signs
_SPELLINGS = (
    (re.compile(r"(?<![\d)])\*\*|\*\*(?![\d(])"), ""),  # bold
    (re.compile(r"\\(?:d|t)?frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\times\b|\\cdot\b|[\u00d7\u00b7\u2219]"), "*"),
    (re.compile(r"\\div\b|\u00f7"), "/"),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"\\left|\\right|\\[,!;]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\?\$|£|€"), ""),
    (re.compile(r"(?<=[\d)])[ \t]*[xX][ \t]*(?=[\d(])"), "*"),
    (re.compile(r"^[ \t]*[-*•][ \t]+", re.M), ""),  # bullets
)
# Text before the equation that may belong to its left side, as in "half of 10 + 2 = 7"
_CONTINUES_LEFT = re.compile(
    r"(?:[+\-*/^=<>\u2248]|\b(?:of|by|times|plus|minus|over|per|half|twice|double|triple|squared|cubed|root|percent|and))"
    r"[ \t]*$",
    re.I,
)
# Text after the equation that may belong to its right side, as in "= 2 hours 30 minutes", "= 5 R 2", "= 2x", "= 4!"
_CONTINUES_RIGHT = re.compile(
    r"[\w^!{\\:/*]|[ \t]*[ap]\.?m\b|[ \t]+(?:hour|day|week|dollar|foot|cents)\b"
    r"|[ \t]*[+\-*/^=][ \t]*\S|[ \t]+[A-Za-z]+\.?,?[ \t]+(?:and[ \t]+)?\d"
    r"|[ \t]+(?:r|remainder|with|times|plus|minus|divided|million|billion|thousand|hundred|dozen|and|to|or|of)\b",
    re.I,
)
_WIDTH = 100  # of the text before the equation that is searched
_LEAVING = re.compile(r", leaving (?=\S)")
_SENTENCE_END = re.compile(r"[.,;](?:\s|$)|$", re.M)
_QUESTION = re.compile(rf"\s*(?:what is|compute|calculate|evaluate|simplify)\s+({_SIDE.pattern})\s*(?:[?.]\s*)?", re.I)

_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def arithmetic_judge(solution: Solution) -> Task[Verdict]:
    """
    Judge a solution by its equations, without a model.

    Args:
        solution (`Solution`):
            The solution.

    Returns:
        `Verdict`: The first step with a false equation, with the equation as evidence. The judge abstains if no
            equation is false.
    """
    steps = split_steps(solution.text, solution.style)
    for number, equation in enumerate(false_equations(solution.problem.problem, steps), start=1):
        if equation:
            return Verdict(number, "arithmetic", {"equation": equation})
    return Verdict(None, "arithmetic", {"reason": "every equation that can be read holds"})
    yield  # makes this a task, although it sends no requests


def false_equations(problem: str, steps: Steps) -> list[str | None]:
    """
    Find the first false equation of each step.

    If the problem asks for the value of an expression ("What is 2 + 3 * 4?"), steps such as "3 * 4 = 12, leaving
    2 + 12" are checked further: the operation must be part of the expression, and what is left must have its value.

    Args:
        problem (`str`):
            The problem.
        steps (`Steps`):
            The steps.

    Returns:
        `list[str | None]`: The first false equation of each step, or `None` if it has none.
    """
    texts = [_normalize(text) for text in steps.texts()]
    found = [_false_equation(text) for text in texts]
    question = _QUESTION.fullmatch(_normalize(problem))
    left = question[1] if question else ""
    value = evaluate_expression(left)
    for index, text in enumerate(texts if question else []):
        operation, rest = _operation(text)
        if max(map(len, (left, operation, rest))) > MAX_LENGTH:
            break
        if operation:
            if not re.search(rf"(?<![\d.]){re.escape(operation)}(?![\d.])", left):
                found[index] = found[index] or f"{operation} is no part of {left}"
            elif evaluate_expression(rest) != value:  # also if it is not an expression
                found[index] = found[index] or f"{left} = {rest}"
            left = rest
    return found


def _normalize(text: str) -> str:
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def _operation(text: str) -> tuple[str, str]:
    """Return "3 * 4" and "12 + 2" of "3 * 4 = 12, leaving 12 + 2", or empty strings."""
    for match in _LEAVING.finditer(text):
        before = text[max(0, match.start() - 2 * MAX_LENGTH - 4) : match.start()]
        left, _, result = before.rpartition(" = ")
        start = _START.search(left, len(left.rstrip("0123456789.,+-*/()% \t")))
        if start and left[-1] in "0123456789)%" and _SIDE.fullmatch(result):
            end = _SENTENCE_END.search(text, match.end() + 1)
            assert end is not None
            return left[start.start() :], text[match.end() : end.start()].rstrip(" \t")
    return "", ""


def _chains(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each chain such as "3 * 4 = 12 = 6 + 6". An expression ends with a digit, ) or %."""
    for run in _RUN.finditer(text):
        if "=" not in run[0]:
            continue
        parts = run[0].split("=")
        offsets = list(accumulate((len(part) + 1 for part in parts), initial=run.start()))
        starts = [_START.match(part.lstrip(" \t")) is not None for part in parts]
        expressions = [part.rstrip(" \t+-*/(.,") for part in parts]
        ends = [part.rstrip(" \t") == expression for part, expression in zip(parts, expressions, strict=True)]
        first = 0
        while first < len(parts) - 1:
            last = first
            while ends[last] and last + 1 < len(parts) and starts[last + 1]:
                last += 1
            start = _CHAIN_START.search(text, offsets[first], offsets[first + 1] - 1) if last > first else None
            if start:
                yield start.start(), offsets[last] + len(expressions[last])
            first = last + 1 if start else first + 1


def _false_equation(text: str) -> str | None:
    for start, end in _chains(text):
        if _CONTINUES_LEFT.search(text, max(0, start - _WIDTH), start) or _CONTINUES_RIGHT.match(text, end):
            continue
        for left, right in pairwise(side.strip() for side in text[start:end].split("=")):
            if _is_false(left, right):
                return f"{left} = {right}"
    return None


def _is_false(left: str, right: str) -> bool:
    """Return whether an equation is certainly false. Chained operations, as in "3 * 4 = 12 + 5 = 17", are accepted."""
    if not re.search(r"\d\s*[+\-*/]|[)%]", left):
        return False
    value = evaluate_expression(left)
    if value is None:
        return False
    leading = re.match(rf"-?{_NUMBER}%?", right)
    claims = [right, *([leading[0]] if leading else [])]
    values = [evaluate_expression(claim) for claim in claims]
    values += [evaluate_expression(claim.rstrip("%")) for claim in claims if claim.endswith("%")]
    return not any(claim is None or _close(value, claim, left, right) for claim in values)


def _close(value: Fraction, claim: Fraction, left: str, right: str) -> bool:
    """Return whether both sides are equal up to rounding, of the result or of decimals on the left side."""
    decimals = max((len(digits) for digits in re.findall(r"\.(\d+)", right)), default=0)
    is_integer = value.denominator == 1
    of_result = Fraction(0) if is_integer else Fraction(1, 10**decimals)
    of_inputs = abs(value) / 200 if re.search(r"\.\d", left) else 0
    return abs(value - claim) <= max(of_result, of_inputs)


def evaluate_expression(expression: str) -> Fraction | None:
    """
    Evaluate an arithmetic expression exactly.

    Args:
        expression (`str`):
            Numbers with +, -, *, /, % and parentheses.

    Returns:
        `Fraction` or `None`: The value, or `None` if the expression is not of this form, has no value or has more than
        `MAX_LENGTH` characters.
    """
    if len(expression) > MAX_LENGTH:
        return None
    if re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?", expression):
        return Fraction(expression)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression)
    if re.search(rf"[+-]\s*{_NUMBER}%", text):  # "100 - 20%" is ambiguous
        return None
    text = re.sub(rf"(?<![\d.,])({_NUMBER})%", r"(\1/100)", text).strip()
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python rejects leading zeros
    if not re.fullmatch(r"[\d.+\-*/()\s]+", text) or re.search(r"\*\*|//|\d\s+\d|\)\s*\d|\d\s*\(", text):
        return None
    try:
        return _evaluate(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ZeroDivisionError, ValueError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(ast.get_source_segment(text, node) or "")
    if isinstance(node, ast.UnaryOp):
        return -_evaluate(node.operand, text) if isinstance(node.op, ast.USub) else _evaluate(node.operand, text)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left, text), _evaluate(node.right, text))
    raise ValueError(text)
