"""Pairs and solutions as an HTML page: one file without external resources, for light and dark screens."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from .example import Example, Part, Scoring, Token, strongest_ratio
from .text import (
    NEWLINE,
    PART_OF_CHARACTER,
    SPACE,
    TAB,
    format_token_count,
    format_value,
    ratio_digits,
    shorten,
    split_marks,
    visible_text,
    visible_token,
)

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1c;--paper:#fff;--soft:#6a6a6a;--line:#dcdcdc;--box:#f6f6f6;
--good:#11703a;--bad:#b3261e;--up:30 160 80;--down:225 60 50}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#17181a;--soft:#9d9d9d;--line:#3a3c40;--box:#202225;
--good:#62d08b;--bad:#ff8a80;--up:40 165 90;--down:220 65 60}}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--paper)}
h1,h2{line-height:1.2}h2{margin-top:3rem;border-top:1px solid var(--line);padding-top:1.5rem}
h3{font-size:1rem;margin:1.3rem 0 .3rem}h3 small,.facts,.legend{font-weight:normal;color:var(--soft)}
a{color:inherit}.scroll{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.2rem 1.2rem .2rem 0;text-align:right;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums;white-space:nowrap}td.name{text-align:left;white-space:normal}
pre{font:14px/1.9 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
background:var(--box);padding:.6rem .9rem;border-radius:6px;border-left:4px solid var(--line)}
pre.context{color:var(--soft);line-height:1.5}.lead{color:var(--soft)}
pre.chosen{border-color:var(--good)}pre.rejected,pre.first-wrong-step{border-color:var(--bad)}
h3.chosen,td.chosen,pre.chosen{color:var(--good)}
h3.rejected,td.rejected,pre.rejected{color:var(--bad)}
h3.first-wrong-step,td.first-wrong-step,pre.first-wrong-step{color:var(--bad)}
pre.tokens{color:var(--ink)}
.t{border-radius:3px;padding:.12em 0;box-shadow:inset 0 0 0 1px var(--line)}.t i{font-style:normal;opacity:.45}
.up{background:rgb(var(--up)/var(--a))}.down{background:rgb(var(--down)/var(--a))}
.t:hover{outline:2px solid var(--ink)}
figure{display:inline-block;margin:0 1rem .5rem 0}figcaption{color:var(--soft);font-size:.85rem}
img{max-width:100%;border:1px solid var(--line);border-radius:6px}
.bar{display:inline-block;width:8rem;height:.8rem;border-radius:3px;margin:0 .5rem;vertical-align:-.05rem;
background:linear-gradient(90deg,rgb(var(--down)/.7),transparent,rgb(var(--up)/.7))}
"""
_MAX_OPACITY = 0.7  # of the strongest color, low enough to keep the text readable

_MAX_SIDE = 512  # of an image, in pixels. Larger images are scaled down to keep the page small


def write_page(examples: Sequence[Example], scoring: Scoring, short: bool = False) -> str:
    """
    Render examples as an HTML page.

    Args:
        examples (`Sequence[Example]`):
            Pairs or solutions.
        scoring (`Scoring`):
            Models that computed the log-probabilities.
        short (`bool`, *optional*, defaults to `False`):
            Whether to leave out the middle of long texts before the steps.

    Returns:
        `str`: The page.
    """
    strongest = strongest_ratio(examples)
    title = "Pairs" if examples[0].is_pair else "Solutions"
    body = [f"<h1>{title}</h1>", _legend(examples, scoring, strongest), _table(examples, scoring)]
    content = "".join([*body, *(_example(example, strongest, short) for example in examples)])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{content}</body></html>\n"


def _legend(examples: Sequence[Example], scoring: Scoring, strongest: float) -> str:
    lines = []
    if scoring.policy is not None:
        lines.append(f"log π: log-probability under the policy, {escape(scoring.policy)}, in nats.")
    if scoring.reference is not None:
        low, high = (format_value(bound, ratio_digits(strongest), sign=True) for bound in (-strongest, strongest))
        lines.append(f"log π<sub>ref</sub>: log-probability under the reference model, {escape(scoring.reference)}.")
        lines.append(f"Ratio, log π - log π<sub>ref</sub>: {low}<span class=bar></span>{high}")
    if examples[0].margin(scoring.beta) is not None:
        lines.append(f"Margin: implicit reward margin, {scoring.beta:g} x difference of the ratios.")
    if any(part.tokens for example in examples for part in example.parts):
        marks = f"{SPACE} space, {NEWLINE} end of line, {TAB} tab, {PART_OF_CHARACTER} part of a character."
        lines.append(f"Each box is a token. Point at it to see its values. {marks}")
    return f"<p class=legend>{'<br>'.join(lines)}</p>" if lines else ""


def _table(examples: Sequence[Example], scoring: Scoring) -> str:
    """Render a table of the sums of all steps, with links to the examples."""
    names = ["tokens"] if any(part.tokens for part in examples[0].parts) else []
    names += ["log π"] if scoring.policy is not None else []
    names += ["log π<sub>ref</sub>", "ratio"] if scoring.reference is not None else []
    names += ["margin"] if examples[0].margin(scoring.beta) is not None else []
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = [f"<tr><th></th><th></th>{head}</tr>"]
    for example in examples:
        for number, part in enumerate(example.parts):
            link = "" if number else f'<a href="#{_anchor(example)}">{escape(example.name)}</a>'
            margin = None if number else example.margin(scoring.beta)
            values = {
                "tokens": str(len(part.tokens)),
                "log π": format_value(part.policy, 4),
                "log π<sub>ref</sub>": format_value(part.reference, 4),
                "ratio": format_value(part.ratio, 4, sign=True),
                "margin": "" if margin is None else format_value(margin, 4, sign=True),
            }
            cells = "".join(f"<td>{values[name]}</td>" for name in names)
            title = f"<td class='name {part.kind}'>{escape(part.title)}</td>"
            lines.append(f"<tr><td class=name>{link}</td>{title}{cells}</tr>")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _example(example: Example, strongest: float, short: bool) -> str:
    parts = [f'<section id="{_anchor(example)}"><h2>{escape(example.where)}</h2>']
    facts = "<br>".join(f"{escape(visible_text(f'{name}: {value}'))}" for name, value in example.facts)
    parts += [f"<p class=facts>{facts}</p>"] if facts else []
    parts += [_image(image) for image in example.images]
    for title, text in example.context:
        shown = escape(visible_text(shorten(text) if short else text))
        parts.append(f"<h3>{escape(title)}</h3><pre class=context>{shown}</pre>")
    parts += [_part(part, strongest) for part in example.parts]
    return f"{''.join(parts)}</section>"


def _image(image: Any) -> str:
    """Image as a data URI, with its original size."""
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f"{image.width}x{image.height}"
    picture = f"<img src='data:image/png;base64,{data}' alt='image {size}'>"
    return f"<figure>{picture}<figcaption>image {size}</figcaption></figure>"


def _part(part: Part, strongest: float) -> str:
    notes = [format_token_count(part.tokens)] if part.tokens else []
    notes += [f"log π {format_value(part.policy, 4)}"] if part.policy is not None else []
    notes += [f"ratio {format_value(part.ratio, 4, sign=True)}"] if part.ratio is not None else []
    notes += ["ends the solution"] if part.ends else []
    title = f"<h3 class={part.kind}>{escape(part.title)} <small>{', '.join(notes)}</small></h3>"
    lead = f"<span class=lead>{escape(visible_text(part.lead.strip(chr(10))))}</span> " if part.lead.strip() else ""
    if not part.tokens:
        return f"{title}<pre class={part.kind}>{lead}{escape(visible_text(part.text))}</pre>"
    tokens = "<wbr>".join(_token(token, strongest) for token in part.tokens)
    return f"{title}<pre class='tokens {part.kind}'>{lead}{tokens}</pre>"


def _token(token: Token, strongest: float) -> str:
    pieces = [escape(piece) for piece in split_marks(visible_token(token.text))]
    pieces[1::2] = [f"<i>{piece}</i>" for piece in pieces[1::2]]
    text = "".join(pieces).replace(NEWLINE, f"{NEWLINE}\n")
    values = [f"token {token.id}"]
    values += [f"log π {format_value(token.policy, 4)}"] if token.policy is not None else []
    style, kind = "", "t"
    if token.ratio is not None:
        values += [f"log π_ref {format_value(token.reference, 4)}", f"ratio {format_value(token.ratio, 4, sign=True)}"]
        opacity = _MAX_OPACITY * abs(token.ratio) / strongest if strongest else 0.0
        style = f" style='--a:{opacity:.2f}'"
        kind = "t up" if token.ratio > 0 else "t down"
    return f"<span class='{kind}'{style} title='{', '.join(values)}'>{text}</span>"


def _anchor(example: Example) -> str:
    return re.sub(r"\W", "-", example.name)
