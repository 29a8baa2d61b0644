"""
False equations in the steps of a solution.

Only what can be read beyond doubt is judged: numbers with +, -, *, / and parentheses on both sides. Variables, powers,
units within a side, mixed numbers and clock times make it silent. Rounded values pass. Standard library only.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

from ...data.steps import Steps, split_steps
from ...runs.tasks import Task
from ..records import Solution, Verdict

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
# A side begins behind a word, a sentence or another side, and not within a number, a formula or a variable
_SIDE = rf"-?\(*{_NUMBER}(?:[\d.,+\-*/()% \t]*[\d)%])?"
_CHAIN = re.compile(rf"(?<![\w.,^_{{}}\\:%)/*+\-])({_SIDE}(?:[ \t]*=[ \t]*{_SIDE})+)")
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
# What stands before may belong to the left side: "half of 10 + 2 = 7"
_GOES_ON_BEFORE = re.compile(
    r"(?:[+\-*/^=<>\u2248]|\b(?:of|by|times|plus|minus|over|per|half|twice|double|triple|squared|cubed|root|percent|and))"
    r"[ \t]*$",
    re.I,
)
# And what stands behind to the right: "= 2 hours 30 minutes", "= 5 R 2", "= 3 times", "= 2x", "= 4!"
_GOES_ON_BEHIND = re.compile(
    r"^(?:[\w^!{\\:/*]|[ \t]*[ap]\.?m\b|[ \t]+(?:hour|day|week|dollar|foot|cents)\b"
    r"|[ \t]*[+\-*/^=][ \t]*\S|[ \t]+[A-Za-z]+\.?,?[ \t]+(?:and[ \t]+)?\d"
    r"|[ \t]+(?:r|remainder|with|times|plus|minus|divided|million|billion|thousand|hundred|dozen|and|to|or|of)\b)",
    re.I,
)
_LEAVING = re.compile(rf"({_SIDE}) = {_SIDE}, leaving (\S[^\n]*?)(?=[ \t]*(?:[.,;](?:\s|$)|$))", re.M)
_ASKED = re.compile(rf"\s*(?:what is|compute|calculate|evaluate|simplify)\s+({_SIDE})\s*[?.]?\s*", re.I)

_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def false_equations(problem: str, steps: Steps) -> list[str | None]:
    """
    Find a false equation in each step.

    Args:
        problem (`str`):
            The problem. Where it asks for the value of an expression ("What is 2 + 3 * 4?"), a step that says
            "3 * 4 = 12, leaving 2 + 12" must work what is there, and what it leaves must have that value.
        steps (`Steps`):
            The steps.

    Returns:
        `list[str | None]`: For each step the first equation that is false, `None` where there is none.
    """
    texts = [_spell(text) for text in steps.texts()]
    found = [_false_equation(text) for text in texts]
    asked = _ASKED.fullmatch(_spell(problem))
    if asked is None:
        return found
    left, value = asked[1], evaluate_expression(asked[1])
    for index, text in enumerate(texts):
        step = _LEAVING.search(text)
        if step:
            if not re.search(rf"(?<![\d.]){re.escape(step[1])}(?![\d.])", left):
                found[index] = found[index] or f"{step[1]} is no part of {left}"
            elif evaluate_expression(step[2]) != value:  # or it is no expression at all
                found[index] = found[index] or f"{left} = {step[2]}"
            left = step[2]
    return found


def _spell(text: str) -> str:
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def _false_equation(text: str) -> str | None:
    for match in _CHAIN.finditer(text):
        if _GOES_ON_BEFORE.search(text, 0, match.start()) or _GOES_ON_BEHIND.match(text[match.end() :]):
            continue
        sides = [side.strip() for side in match[1].split("=")]
        for left, right in pairwise(sides):
            if _is_false(left, right):
                return f"{left} = {right}"
    return None


def _is_false(left: str, right: str) -> bool:
    """Whether an equation is false beyond doubt. "3 * 4 = 12 + 5 = 17" is read as it is meant."""
    value = evaluate_expression(left)
    if value is None or not re.search(r"\d\s*[+\-*/]|[)%]", left):
        return False
    leading = re.match(rf"-?{_NUMBER}%?", right)
    claims = [right, *([leading[0]] if leading else [])]
    values = [evaluate_expression(claim) for claim in claims]
    values += [evaluate_expression(claim.rstrip("%")) for claim in claims if claim.endswith("%")]
    return not any(claim is None or _close(value, claim, left, right) for claim in values)


def _close(value: Fraction, claim: Fraction, left: str, right: str) -> bool:
    """Equal, or equal but for rounding: of the result, or of decimals that the left side took over."""
    decimals = max((len(digits) for digits in re.findall(r"\.(\d+)", right)), default=0)
    whole = value.denominator == 1
    rounding = Fraction(0) if whole else Fraction(1, 10**decimals)
    taken_over = abs(value) / 200 if re.search(r"\.\d", left) else 0
    return abs(value - claim) <= max(rounding, taken_over)


def evaluate_expression(expression: str) -> Fraction | None:
    """
    Work out an expression.

    Args:
        expression (`str`):
            Numbers with +, -, *, /, % and parentheses.

    Returns:
        `Fraction` or `None`: Its exact value, `None` if it is not such an expression.
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression)
    if re.search(rf"[+-]\s*{_NUMBER}%", text):  # "100 - 20%": of what?
        return None
    text = re.sub(rf"({_NUMBER})%", r"(\1/100)", text).strip()
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # which Python does not read
    if not re.fullmatch(r"[\d.+\-*/()\s]+", text) or re.search(r"\*\*|//|\d\s+\d|\)\s*\d|\d\s*\(", text):
        return None
    try:
        return _work(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ZeroDivisionError, ValueError, RecursionError, MemoryError):
        return None


def _work(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(ast.get_source_segment(text, node) or "")
    if isinstance(node, ast.UnaryOp):
        return -_work(node.operand, text) if isinstance(node.op, ast.USub) else _work(node.operand, text)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_work(node.left, text), _work(node.right, text))
    raise ValueError(text)


def arithmetic_judge(solution: Solution) -> Task[Verdict]:
    """
    The first step with a false equation in it. Free; right where it speaks, silent where all equations hold.

    Args:
        solution (`Solution`):
            The solution.

    Returns:
        `Verdict`: Its evidence is the equation.
    """
    steps = split_steps(solution.text, solution.style)
    for number, false in enumerate(false_equations(solution.problem.problem, steps), start=1):
        if false:
            return Verdict(number, "arithmetic", {"equation": false})
    return Verdict(None, "arithmetic", {"reason": "every equation that can be read holds"})
    yield  # a task that asks nothing
