"""HTML report of a run: counts, costs, example pairs, settings."""

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .build_record import BuildRecord
from .summary import Summary, costs_of, rows_of, uncounted

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
h1,h2{line-height:1.2}table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
td:last-child,th:last-child,.costs td:not(:first-child),.costs th:not(:first-child){text-align:right;
font-variant-numeric:tabular-nums}
.bar{display:grid;grid-template-columns:6rem 1fr 5rem;gap:.6rem;align-items:center;margin:.15rem 0}
.bar div{background:#3b6ea5;height:1rem;border-radius:2px}.bar span:last-child{text-align:right}
.flow{display:flex;gap:.6rem;flex-wrap:wrap;margin:1rem 0}
.flow div{border:1px solid #bbb;border-radius:6px;padding:.5rem .9rem}.flow b{display:block;font-size:1.5rem}
pre{background:#f5f5f5;padding:.8rem;overflow:auto;border-radius:6px;white-space:pre-wrap}
.pair{border:1px solid #ddd;border-radius:6px;padding:0 1rem;margin:1rem 0}
.pair .rejected{background:#fdecea}.pair .chosen{background:#e9f5ec}
dt{font-weight:600}dd{margin:0 0 .6rem 0}
"""

_GLOSSARY = {
    "collect, localize, rectify, build": "The pipeline stages: sample solutions, find the first wrong step of each "
    "wrong one, sample a right step in its place, write the pairs.",
    "step": "A reasoning step of a solution, such as the text after “Step 3:”.",
    "prefix": "The part of a solution before a step, up to and including its label. Column initial_reason_steps.",
    "right, wrong, unreadable": "Outcome of a solution: its final answer equals the gold answer, differs from it, or "
    "cannot be read (no final answer, truncated, refused by the server).",
    "rejected step": "The first wrong step of a wrong solution. Column rejected.",
    "preferred step": "The first step of a right continuation of the same prefix. Column chosen.",
    "judge": "Method that names the first wrong step. “a,b” asks b if a abstains, “a+b” requires that both agree.",
    "located": "A judge has named the first wrong step. Otherwise it abstains.",
    "rollout": "Continuation of a prefix, sampled to see whether the model still reaches the right answer from there.",
    "corrected": "A wrong step for which at least one preferred step was found.",
    "dropped": "Left out, for the given reason.",
    "request": "One answer of a model. Answers are stored and never requested twice.",
    "prompt tokens, tokens": "Tokens that a model has read, and tokens that it has sampled.",
    "minutes": "Time from the start of a stage to its last record, added up over resumes and shards.",
}


def render_report(summary: Summary, build: BuildRecord | None = None) -> str:
    """
    Render the report of a run.

    Args:
        summary ([`Summary`]):
            The counts.
        build ([`BuildRecord`], *optional*):
            The last build.

    Returns:
        `str`: One HTML page without external resources.
    """
    parts = ["<h1>Step pairs: report of a run</h1>", _flow(summary, build)]
    parts += ["<h2>Counts</h2>", _table(("stage", "what", "count"), rows_of(summary, build))]
    if build is not None:
        parts.append(f"<p>The pairs are in {_text(build.output_file)}.</p>")
    for judge_name, places in summary.places.items():
        parts += [f"<h2>Position of the first wrong step, by {_text(judge_name)}</h2>", _bars(places)]
    if summary.agreement:
        rows = [
            (f"{one} and {other}", f"{both['same']} of {both['both']}", _share(both["same"], both["both"]))
            for (one, other), both in summary.agreement.items()
        ]
        parts.append("<h2>Agreement of judges, on solutions that both have located</h2>")
        parts.append(_table(("judges", "same step", "share"), rows))
    examples = build.examples if build is not None else summary.examples
    if examples:
        parts += ["<h2>Example pairs</h2>", *map(_pair, examples)]
    head = ("stage", "minutes", "requests", "prompt tokens", "tokens")
    parts += ["<h2>Cost per pipeline stage</h2>", _table(head, _stage_costs(summary), "costs")]
    if note := uncounted(summary):
        parts.append(f"<p>{_text(note)}</p>")
    parts += ["<h2>Cost per model</h2>", _table(("model", "per pair", "all"), _model_costs(summary, build), "costs")]
    parts += ["<h2>Settings</h2>", f"<pre>{_text(json.dumps(summary.settings, indent=2, ensure_ascii=False))}</pre>"]
    terms = "".join(f"<dt>{_text(term)}</dt><dd>{_text(meaning)}</dd>" for term, meaning in _GLOSSARY.items())
    parts += ["<h2>Glossary</h2>", f"<dl>{terms}</dl>"]
    head_tag = f'<meta charset="utf-8"><title>Step pairs</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head_tag}</head><body>{''.join(parts)}</body></html>\n"


def _stage_costs(summary: Summary) -> list[tuple[Any, ...]]:
    return [
        (name, "-" if minutes is None else f"{minutes:,.1f}", requests, prompt_tokens, tokens)
        for name, requests, prompt_tokens, tokens, minutes in costs_of(summary)
    ]


def _model_costs(summary: Summary, build: BuildRecord | None) -> list[tuple[str, str, str]]:
    pairs = build.pairs if build is not None else 0
    pairs = pairs or max((counts["pairs"] for counts in summary.corrections.values()), default=0)
    rows = []
    for name, usage in summary.usage.items():
        for what in ("requests", "prompt_tokens", "tokens"):
            each = f"{usage[what] / pairs:,.1f}" if pairs else "-"
            rows.append((f"{name}, {what.replace('_', ' ')}", each, f"{usage[what]:,}"))
    return rows


def _flow(summary: Summary, build: BuildRecord | None) -> str:
    boxes: list[tuple[str, int]] = [("problems", summary.problems), ("solutions", summary.outcomes.total())]
    boxes.append(("wrong", summary.outcomes["wrong"]))
    boxes += [("located", max(counts["located"] for counts in summary.verdicts.values()))] if summary.verdicts else []
    boxes += [("corrected", max(c["rectified"] for c in summary.corrections.values()))] if summary.corrections else []
    boxes += [("pairs", build.pairs)] if build is not None else []
    return f"<div class=flow>{''.join(f'<div><b>{count:,}</b>{name}</div>' for name, count in boxes)}</div>"


def _pair(example: Mapping[str, str]) -> str:
    titles = {"prompt": "prompt", "initial_reason_steps": "prefix", "rejected": "rejected", "chosen": "chosen"}
    texts = "".join(
        f"<p>{title}</p><pre class={title}>{_text(example[column])}</pre>" for column, title in titles.items()
    )
    return f"<div class=pair>{texts}</div>"


def _bars(counts: Counter[int]) -> str:
    most = max(counts.values(), default=1)
    return "".join(
        f"<div class=bar><span>step {step}</span><div style='width:{100 * counts[step] / most:.1f}%'></div>"
        f"<span>{counts[step]:,}</span></div>"
        for step in sorted(counts)
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]], kind: str = "") -> str:
    lines = ["".join(f"<th>{_text(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return f"<table{f' class={kind}' * bool(kind)}>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(value: Any) -> str:
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
