r"""
Extract the final answer of a solution and compare it with the gold answer.

A math checker compares two LaTeX expressions. These rules cover the rest: which part of a solution is its answer,
whether an answer is text, and how to treat units, percent signs, currencies and number bases. They are pure functions
of strings and use the standard library only. The checker is passed to [`agrees`] as a function, for example:

```python
# With `units=True`, math-verify drops the variable of "2+2c", "6t" and "5m"
DEFAULT = LatexExtractionConfig()
CONFIG = [replace(DEFAULT, normalization_config=replace(DEFAULT.normalization_config, units=False))]


def equal(gold: str, answer: str) -> bool:
    return verify(
        parse(f"\\boxed{{{gold}}}", CONFIG), parse(f"\\boxed{{{answer}}}", CONFIG), allow_set_relation_comp=True
    )


agrees("\\frac{1}{2}", final_answer("So the answer is $\\boxed{50\\%}$."), equal)
```
"""

import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 1000  # characters of an answer. Longer ones are repetitions, and cannot be compared in reasonable time

# "The final answer is: ", "**Answer:** ", "the answers to both are "
_ANSWER = re.compile(
    r"\banswers?\b(?:\s+(?:to|of|for)\b[^.:\n]{0,80}?)?[*_\s]*(?:[:=]|\b(?:is|are)\b\s*:?)[*_\s]*"
    r"(?:(?:therefore|thus|then|simply|just|equal to|exactly|approximately|about)\b\s*)?",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*]|$)(?<![ap]\.m\.)(?<!\b[ap]\.(?=\s?m\.))|\n")
_CLAUSE = re.compile(r",?\s+(?:because|which|since|as|so|where|for)\b", re.IGNORECASE)
# Text allowed between two boxes that form one answer: "$\boxed{5}$ or $x = \boxed{7}$"
_BETWEEN_BOXES = re.compile(
    r"[\s$,;]*(?:\\\)|\\\])?[\s$,;]*(?:\\text\{)?\s*(?:and|or)?\s*\}?[\s$]*(?:\\\()?(?:\w\s*=)?\s*"
)

_BOX_OR_BRACE = re.compile(r"\\f?box(?:ed)?\s*(?:(?P<open>\{)|(?<=\s)(?P<bare>-?[\w.]+))|\\.|[{}]", re.DOTALL)
_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up)?|math(?:rm|bf|it|sf|tt)|mbox)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|~|\u00a0|\u2009|\u202f")
_MIXED = re.compile(r"(?<![\d.])(\d+) +(\d+)/(\d+)$")
_SCALE = re.compile(
    r"(?<=[\d.})])\s*(?:(\\text\s*\{)\s*)?(dozen|thousand|million|billion|trillion)s?\b", re.IGNORECASE
)
_SCALES = {"dozen": "12", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}", "trillion": "10^{12}"}
_FUNCTIONS = set(re.findall(r"\w+", "sin cos tan cot sec csc log ln exp sqrt pi and or choose"))

_UNITS: dict[str, tuple[str, Fraction]] = {
    spelling: (dimension, Fraction(factor))
    for dimension, units in {
        "length": {
            "mm millimeter millimetre": "1/1000",
            "cm centimeter centimetre": "1/100",
            "m meter metre": "1",
            "km kilometer kilometre": "1000",
            "in inch inche": "0.0254",
            "ft foot feet": "0.3048",
            "yd yard": "0.9144",
            "mi mile": "1609.344",
        },
        "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
        "mass": {
            "mg milligram": "1/1000",
            "g gram": "1",
            "kg kilogram": "1000",
            "oz ounce": "28.349523125",
            "lb pound": "453.59237",
        },
        "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
        "dollars": {"cent ¢": "1/100", "dollar $ usd": "1"},
        "euros": {"euro € eur": "1"},
        "pounds": {"£ gbp": "1"},
        "angle": {"degree deg °": "1"},
        "percent": {"% percent percentage pct": "1/100"},
        "morning": {"am": "1"},
        "afternoon": {"pm": "1"},
    }.items()
    for spellings, factor in units.items()
    for spelling in spellings.split()
}
_CURRENCY = re.compile(r"^([-+]?)\s*(?:(\\?\$|USD\b)|(€|\\euro\b)|(£|\\pounds\b))\s*(?=[-+.\d\\])")
# Units after a value: in a wrapper such as \text{}, as plain words, or as a sign
_WRAPPED_UNIT = re.compile(rf"(?:\s*/?\s*(?:{_WRAPPER.pattern})(?:\s*\^\s*\{{?[23]\}}?)?)+$")
_PLAIN_UNIT = re.compile(
    r"(?<=[\d})])(?:\s+|(?<=\d)(?=[a-zA-Z]{2}))([a-zA-Z][a-zA-Z.]*(?:(?:\s+|/)[a-zA-Z.]+)*(?:\s*\^\s*\{?[23]\}?|[²³])?)$"
)
_SIGN_UNIT = re.compile(r"\s*(?:(\\?%|€|£|¢|\\?\$)|(\^\s*\{?\s*\\circ\s*\}?|°)\s*[CF]?)$")
_BASE = re.compile(r"^([0-9A-Z.]+)_\s*(?:\{\s*(?:(\d+)|\\text\{\s*\w+\s*\})\s*\}|(\d))$")


def final_answer(text: str) -> str | None:
    r"""
    Extract the final answer of a solution, as written.

    The first match of these rules is the answer:

    1. The content of the last `\boxed{}` with balanced braces. Boxes separated only by "and", "or" or a comma form one
       answer.
    2. The text after `####` on the last line.
    3. The text after the last "answer is" or "answer:", up to the end of the sentence.

    Args:
        text (`str`):
            The solution.

    Returns:
        `str` or `None`: The answer, or `None` if the solution has none.
    """
    boxes = _boxes(text)
    if boxes:
        start, _, content = boxes.pop()
        answer = content
        while boxes and start - boxes[-1][1] < 40 and _BETWEEN_BOXES.fullmatch(text, boxes[-1][1], start):
            start, _, content = boxes.pop()
            if content != answer:
                answer = f"{content}, {answer}"
        return answer.strip() or None
    if "####" in text:
        lines = text.rsplit("####", 1)[1].strip().splitlines()
        if len(lines) == 1 and not lines[0].startswith("Step "):  # not a heading
            return lines[0].strip()
    matches = list(_ANSWER.finditer(text))
    if not matches:
        return None
    return first_clause(text[matches[-1].end() :]) or None


def first_clause(text: str) -> str:
    """Return a text up to the end of its first sentence or to a clause such as "because ...", without emphasis."""
    end = _SENTENCE_END.search(text)
    text = text[: end.start()] if end else text
    clause = _CLAUSE.search(text)
    text = text[: clause.start()] if clause else text
    return text.strip().strip("*_ ")


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Return the start, end and content of each outermost balanced `\boxed{}` and of each `\boxed 5`."""
    boxes: list[tuple[int, int, str]] = []
    opened: list[re.Match[str] | None] = []
    for match in _BOX_OR_BRACE.finditer(text):
        if match["bare"]:
            boxes.append((match.start(), match.end(), match["bare"]))
        elif match["open"] or match[0] == "{":
            opened.append(match if match["open"] else None)
        elif match[0] == "}" and opened and (box := opened.pop()):
            while boxes and boxes[-1][0] > box.start():
                boxes.pop()
            boxes.append((box.start(), match.end(), text[box.end() : match.start()]))
    return boxes


def normalize(answer: str) -> str:
    r"""
    Normalize the notation of an answer.

    This removes emphasis, math delimiters, a trailing period, spaces such as `\,`, the braces of `1{,}200` and a
    leading "The answer is". `1 4/5` becomes a mixed fraction, "million" a power of ten, and `\varnothing` becomes
    `\emptyset`.

    Args:
        answer (`str`):
            The answer, as written in a dataset or a solution.

    Returns:
        `str`: The answer in LaTeX, without delimiters.
    """
    answer = re.sub(r"\s+", " ", answer).strip(" *")
    answer = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", answer)
    if answer.startswith("$$") and answer.endswith("$$") and len(answer) > 4:
        answer = answer[2:-2]
    dollars = len(re.findall(r"(?<!\\)\$", answer))
    if dollars % 2 == 0:  # an odd number includes a currency sign
        answer = re.sub(r"(?<!\\)\$", "", answer)
    answer = re.sub(r"(?<=\d)\{([,:])\}(?=\d)", r"\1", answer)
    answer = re.sub(r"(?<=\d,)\\!\s*(?=\d{3})", "", answer)
    answer = re.sub(r"(?<=\d)(?:\\[,;:! ]|~|\u00a0|\u2009|\u202f)\s*(?=\d{3}(?!\d))", "", answer)
    answer = _SPACES.sub(" ", answer)
    answer = re.sub(r"^\s*(?:\\text\s*\{\s*)?the\s+(?:final\s+)?answer\s+is:?\s*\}?", "", answer, flags=re.IGNORECASE)
    answer = answer.replace("\\varnothing", "\\emptyset")
    answer = answer.strip().rstrip(".,;").strip() if not answer.rstrip().endswith("\\") else answer.strip()
    answer = _SCALE.sub(lambda match: f" \\cdot {_SCALES[match[2].lower()]}{match[1] or ''}", answer)
    answer = answer.replace("\\text{}", "").strip()
    return _MIXED.sub(r"\1\\frac{\2}{\3}", answer)


def is_text(answer: str) -> bool:
    r"""
    Return whether an answer is text, that is, words or an option letter.

    `\text{Tuesday}`, `(B)` and `Evelyn` are text. `12\text{ cm}` and `ab` are not.

    Args:
        answer (`str`):
            The answer.

    Returns:
        `bool`: `True` if the answer must be compared as text.
    """
    answer = normalize(answer)
    plain = unwrap(answer)
    if not re.match(r"\(?[^\W\d_]", plain) or re.search(r"[\\=+^_<>{}|]", plain):
        return False
    return re.match(rf"\(?{_WRAPPER.pattern}", answer) is not None or (
        re.fullmatch(r"\(?[A-Z]\)?", plain) is not None or re.search(r"\b[A-Z][a-z]", plain) is not None
    )


def text_key(answer: str) -> str:
    r"""
    Return the key by which two text answers are compared.

    The key is lowercase, without formatting, articles, brackets and plural endings. Lists are sorted.

    Args:
        answer (`str`):
            The answer.

    Returns:
        `str`: The comparison key.
    """
    plain = re.sub(r"[.'\"`]", "", unwrap(normalize(answer)).lower())
    items = []
    for item in re.split(r"[,;]|\band\b|\bor\b", plain):
        item = re.sub(r"^\s*(?:an?|the)\s+(?=\w{2})", "", item)
        item = re.sub(r"(?<=\w{3})s\b", "", item)
        items.append(re.sub(r"^\s*\((.*)\)\s*$", r"\1", re.sub(r"\s+", " ", item)).strip())
    return ", ".join(sorted(item for item in items if item))


def unwrap(answer: str) -> str:
    r"""Replace `\text{}`, `\mathbf{}` and the like by their content."""
    for _ in range(4):
        answer = _WRAPPER.sub(r"\1", answer)
    return answer.strip()


def split_unit(answer: str) -> tuple[str, tuple[str, Fraction] | None]:
    r"""
    Split an answer into its value and its unit.

    Args:
        answer (`str`):
            The answer.

    Returns:
        `tuple[str, tuple[str, Fraction] | None]`: The value, and the unit as its dimension and its size in base units,
        such as `("length", Fraction(1, 100))` for cm. The unit is `None` if there is none or if it is unknown; an
        unknown unit ("8 apples") is removed from the value. Answers of more than `MAX_LENGTH` characters have no unit.
    """
    answer = normalize(answer)
    if len(answer) > MAX_LENGTH:
        return answer, None
    if re.match(r"^\\text\s*\{\s*[-+]?\d[^{}]*\}$", answer):  # "\text{10:30 a.m.}"
        answer = unwrap(answer)
    unit: tuple[str, Fraction] | None
    if match := _CURRENCY.match(answer):
        unit = ("dollars" if match[2] else "euros" if match[3] else "pounds", Fraction(1))
        value = match[1] + answer[match.end() :]
        return split_unit(value)[0], unit
    if match := _SIGN_UNIT.search(answer):
        value, unit = answer[: match.start()], _unit("°" if match[2] else match[1].lstrip("\\"))
    elif match := _WRAPPED_UNIT.search(answer):
        value, unit = answer[: match.start()], _unit(unwrap(match[0]))
    elif match := _PLAIN_UNIT.search(answer):
        if _FUNCTIONS & set(re.findall(r"[a-z]+", match[1].lower())):
            return answer, None
        value, unit = answer[: match.start()], _unit(match[1])
        if unit is None and not re.match(r"[a-zA-Z]{3}", match[1]):
            return answer, None
    else:
        return answer, None
    if not re.search(r"\d|\\pi|[a-z]", value):
        return answer, None
    return value.strip(), unit


def _unit(name: str) -> tuple[str, Fraction] | None:
    """Return the dimension of a unit and its size in base units, or `None` if the unit is unknown."""
    name = re.sub(r"\bkm?ph\b|\bkmh\b", "km/h", name.lower().replace(".", "").replace("²", "^2").replace("³", "^3"))
    name = re.sub(r"\bmph\b", "mile/hour", name)
    dimensions, factor = [], Fraction(1)
    for number, part in enumerate(re.split(r"/|\bper\b", name)):
        power = (
            2
            if re.search(r"\bsq(?:uare)?\b|\^\s*\{?2", part)
            else 3
            if re.search(r"\bcu(?:bic)?\b|\^\s*\{?3", part)
            else 1
        )
        words = re.sub(r"\b(?:square|sq|cubic|cu)\b|\^\s*\{?\d\}?", " ", part).split()
        word = "".join(words) if all(len(word) == 1 for word in words) else " ".join(words)
        known = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if known is None:
            return None
        dimensions.append(known[0] + (f"^{power}" if power > 1 else ""))
        factor = factor * known[1] ** power if number == 0 else factor / known[1] ** power
    return "/".join(dimensions), factor


def agrees(gold: str, answer: str | None, equal: Callable[[str, str], bool]) -> bool:
    r"""
    Return whether an answer is equivalent to the gold answer.

    Args:
        gold (`str`):
            The gold answer.
        answer (`str` or `None`):
            The answer, as returned by [`final_answer`]. `None` is equivalent to no gold answer.
        equal (`Callable[[str, str], bool]`):
            Function that compares the LaTeX of the gold answer with the LaTeX of the answer, both without delimiters
            and units. It is called at most twice.

    Returns:
        `bool`: `True` if both are equivalent.
    """
    if answer is None or not normalize(answer):
        return False
    if text_key(gold) == text_key(answer) and (is_text(gold) or normalize(gold) == normalize(answer)):
        return True
    if is_text(gold):
        option = re.match(r"\(?([a-z])[).:]", unwrap(normalize(answer)).lower())
        return len(text_key(gold)) == 1 and option is not None and option[1] == text_key(gold)
    bases = [_BASE.match(normalize(side)) for side in (gold, answer)]
    if any(bases):
        digits = [base[1] if base else normalize(side) for base, side in zip(bases, (gold, answer), strict=True)]
        indices = {base[2] or base[3] for base in bases if base} - {None}
        return digits[0] == digits[1] and len(indices) < 2
    (gold_value, gold_unit), (value, unit) = split_unit(gold), split_unit(answer)
    if gold_unit and unit and gold_unit != unit:
        if gold_unit[0] != unit[0]:
            return False
        ratio = unit[1] / gold_unit[1]
        return equal(gold_value, f"({value}) \\cdot \\frac{{{ratio.numerator}}}{{{ratio.denominator}}}")
    if equal(gold_value, value):
        return True
    if gold_unit and gold_unit[0] == "percent" and not unit:
        return equal(f"\\frac{{{gold_value}}}{{100}}", value)
    if unit and unit[0] == "percent" and not gold_unit:
        return equal(gold_value, f"\\frac{{{value}}}{{100}}")
    return False
