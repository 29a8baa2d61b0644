"""Conversion of model output to Markdown that shows formulas, and Markdown or HTML in the output as plain text."""

import re

# A single dollar opens a formula if no space follows, and closes it if no space precedes and no digit follows, as in
# Pandoc's tex_math_dollars: "$5 and $7" is money
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|\\\(((?:(?!\\\().)+?)\\\)"
    r"|(?<![\\$\w])\$(?![\s$])((?:\\.|(?!\n\s*\n)[^$\\])+?)(?<!\s)\$(?![\d$])",
    re.S,
)
# Formulas that are shown as source: \rule{999em}{999em} could cover the page, a macro could hide such a size, and an
# inner delimiter would end the formula early
_NOT_RENDERED = re.compile(
    r"\\(?:rule|includegraphics|href|url|html[A-Z]\w*|[gex]?def|let|futurelet|(?:re)?newcommand|providecommand|tmspace)"
    r"(?![A-Za-z])|\\[A-Za-z]*@|\\[\[\])]"
    r"|\d\.?\s*(?:em|ex|mu|pt|pc|px|mm|cm|in|bp|dd|cc|nd|nc|sp)(?![a-z])"
)


def to_markdown(text: str) -> str:
    """
    Convert a text to Markdown that shows it as written, with its formulas rendered by KaTeX.

    Args:
        text (`str`):
            Text of a problem or solution. It is not trusted.

    Returns:
        `str`: The Markdown.
    """
    shown, end = [], 0
    for match in _FORMULA.finditer(text):
        display, formula = bool(match[1] or match[2]), next(group for group in match.groups() if group is not None)
        shown.append(_escape(text[end : match.start()]))
        shown.append(_formula(formula, display) if _can_be_rendered(formula) else _escape(match[0]))
        end = match.end()
    shown.append(_escape(text[end:]))
    return re.sub(r"\n[ \t]*", "  \n", "".join(shown))


def _can_be_rendered(formula: str) -> bool:
    braces = re.sub(r"\\.", "", formula, flags=re.S)  # an open brace would extend the formula to the text after it
    return not _NOT_RENDERED.search(formula) and braces.count("{") == braces.count("}")


def _escape(text: str) -> str:
    text = re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", text)
    # KaTeX looks for \( and \[ in the text of the page, but not across elements
    return text.replace("&#92;", "&#92;<wbr>")


def _formula(formula: str, display: bool) -> str:
    # An unescaped % would start a comment
    formula = re.sub(r"\\.|%", lambda match: r"\%" if match[0] == "%" else match[0], formula, flags=re.S)
    formula = formula.replace("<", r"\lt ").replace(">", r"\gt ").replace("\n", " ")
    return rf"\[{formula}\]" if display else rf"\({formula}\)"
