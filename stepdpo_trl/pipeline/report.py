"""A report and a data card: what a run gave, what it cost, and with which settings."""

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .summary import Summary, rows_of

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
h1,h2{line-height:1.2}table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
td:last-child,th:last-child{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:grid;grid-template-columns:6rem 1fr 5rem;gap:.6rem;align-items:center;margin:.15rem 0}
.bar div{background:#3b6ea5;height:1rem;border-radius:2px}.bar span:last-child{text-align:right}
.flow{display:flex;gap:.6rem;flex-wrap:wrap;margin:1rem 0}
.flow div{border:1px solid #bbb;border-radius:6px;padding:.5rem .9rem}.flow b{display:block;font-size:1.5rem}
pre{background:#f5f5f5;padding:.8rem;overflow:auto;border-radius:6px}
"""


def render_report(summary: Summary, pairs: int | None = None, left_out: Mapping[str, int] | None = None) -> str:
    """
    Write the report.

    Args:
        summary (`Summary`):
            The counts.
        pairs (`int`, *optional*):
            Pairs in the data set, where one was built.
        left_out (`Mapping[str, int]`, *optional*):
            Pairs left out of it, by reason.

    Returns:
        `str`: One page of HTML that needs nothing else.
    """
    parts = ["<h1>From problems to step pairs</h1>", _flow(summary, pairs)]
    parts += ["<h2>Counts</h2>", _table(("stage", "what", "count"), rows_of(summary))]
    if left_out:
        parts += ["<p>Left out of the data set:</p>", _table(("reason", "pairs"), left_out.items())]
    for judge_name, places in summary.places.items():
        parts += [f"<h2>Where errors lie, by {_text(judge_name)}</h2>", _bars(places)]
    if summary.agreement:
        rows = [
            (f"{one} and {other}", f"{both['same']} of {both['both']}", _share(both["same"], both["both"]))
            for (one, other), both in summary.agreement.items()
        ]
        parts += ["<h2>Agreement of judges, where both speak</h2>", _table(("judges", "same step", "share"), rows)]
    parts += ["<h2>Cost</h2>", _table(("model", "per pair", "all"), _costs(summary, pairs))]
    parts += ["<h2>Settings</h2>", f"<pre>{_text(json.dumps(summary.settings, indent=2, ensure_ascii=False))}</pre>"]
    head = f'<meta charset="utf-8"><title>Step pairs</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def write_card(summary: Summary, pairs: int, left_out: Mapping[str, int]) -> str:
    """
    Write the data card.

    Args:
        summary (`Summary`):
            The counts.
        pairs (`int`):
            Pairs in the data set.
        left_out (`Mapping[str, int]`):
            Pairs left out of it, by reason.

    Returns:
        `str`: Markdown, with the metadata of the Hub.
    """
    rows = [*rows_of(summary), *(("build", f"left out: {why}", count) for why, count in left_out.items())]
    rows.append(("build", "pairs", pairs))
    table = "\n".join(f"| {stage} | {what.replace('|', ' ')} | {count:,} |" for stage, what, count in rows)
    return f"""---
task_categories: [text-generation]
tags: [step-dpo, preference, math, stepdpo_trl]
---
# Step pairs

{pairs:,} step pairs in the columns of `xinlai/Math-Step-DPO-10K`, made by `stepdpo_trl` as in Step-DPO (arXiv
2406.18629): solutions were sampled from the model, the first wrong step of wrong ones was located, and the model (or
the `rectifier` that the settings name) wrote that step anew. `StepDPOTrainer` trains on it as it is. `step_index`
counts steps from 1; `*_ends_solution` tells whether the solution is over after a step; `source` names the way and the
sample.

| stage | what | count |
|---|---|---:|
{table}

## Settings

```json
{json.dumps(summary.settings, indent=2, ensure_ascii=False)}
```
"""


def write_import_card(name: str, counts: Mapping[str, int], rows: int) -> str:
    """Data card of what was imported from a published file."""
    table = "\n".join(f"| {what} | {count:,} |" for what, count in counts.items())
    return f"# From {name}\n\n{rows:,} rows, made by `stepdpo_trl`.\n\n| what | count |\n|---|---:|\n{table}\n"


def _costs(summary: Summary, pairs: int | None) -> list[tuple[str, str, str]]:
    made = pairs or max((counts["pairs"] for counts in summary.corrections.values()), default=0)
    rows = []
    for name, usage in summary.usage.items():
        for what in ("calls", "tokens", "prompt_tokens"):
            each = f"{usage[what] / made:,.1f}" if made else "-"
            rows.append((f"{name}, {what.replace('_', ' ')}", each, f"{usage[what]:,}"))
    return rows


def _flow(summary: Summary, pairs: int | None) -> str:
    boxes: list[tuple[str, int]] = [("problems", summary.problems), ("solutions", summary.outcomes.total())]
    boxes.append(("wrong", summary.outcomes["wrong"]))
    boxes += [("located", max(counts["located"] for counts in summary.verdicts.values()))] if summary.verdicts else []
    boxes += [("rectified", max(c["rectified"] for c in summary.corrections.values()))] if summary.corrections else []
    boxes += [("pairs", pairs)] if pairs is not None else []
    return f"<div class=flow>{''.join(f'<div><b>{count:,}</b>{name}</div>' for name, count in boxes)}</div>"


def _bars(counts: Counter[int]) -> str:
    most = max(counts.values(), default=1)
    return "".join(
        f"<div class=bar><span>step {step}</span><div style='width:{100 * counts[step] / most:.1f}%'></div>"
        f"<span>{counts[step]:,}</span></div>"
        for step in sorted(counts)
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["".join(f"<th>{_text(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(value: Any) -> str:
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
