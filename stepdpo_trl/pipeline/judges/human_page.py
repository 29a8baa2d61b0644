"""A local page in the browser on which a person picks the first wrong step: one click or one key."""

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...data.steps import split_steps
from ...runs.run_directory import Log, RunError
from .human import HumanRequest


@dataclass(frozen=True)
class ToLabel:
    """
    A solution to look at.

    Args:
        key (`str`):
            Its name.
        problem (`str`):
            The problem.
        answer (`str`):
            The gold answer.
        solution (`str`):
            The gold solution, may be empty.
        steps (`tuple[str, ...]`):
            The steps of the wrong solution.
    """

    key: str
    problem: str
    answer: str
    solution: str
    steps: tuple[str, ...]


class LabelStore(Protocol):
    """An append-only log. The last record of a key counts; each is on disk when `append` returns."""

    def __contains__(self, key: object) -> bool: ...
    def __getitem__(self, key: str) -> Mapping[str, Any]: ...
    def append(self, key: str, record: Mapping[str, Any]) -> None: ...  # noqa: D102


class Labelling:
    """
    What is answered and what comes next, for any number of pages.

    Args:
        items (`Sequence[ToLabel]`):
            The solutions.
        answers (`LabelStore`):
            What was answered before, and where answers go.
    """

    def __init__(self, items: Sequence[ToLabel], answers: LabelStore) -> None:
        self.items = {item.key: item for item in items}
        self.answers = answers
        self.history = [item.key for item in items if self.answered(item.key)]
        self.lock = threading.Lock()

    def answered(self, key: str) -> bool:
        """Whether a solution has an answer that was not taken back."""
        return key in self.answers and not self.answers[key].get("undone")

    def current(self) -> ToLabel | None:
        """The first solution without an answer."""
        return next((item for item in self.items.values() if not self.answered(item.key)), None)

    def answer(self, key: str, record: Mapping[str, Any]) -> None:
        """Write down an answer to the solution that was shown; another page may have answered it meanwhile."""
        with self.lock:
            if not self.answered(key):
                self.answers.append(key, record)
                self.history.append(key)

    def undo(self) -> None:
        """Take the last answer back."""
        with self.lock:
            if self.history:
                self.answers.append(self.history.pop(), {"undone": True})

    def progress(self) -> str:
        """Such as "12 of 340 done, 3 skipped"."""
        skipped = sum(bool(self.answers[key].get("skipped")) for key in self.history)
        return f"{len(self.history)} of {len(self.items)} done, {skipped} skipped"


_KEYS = """
<script>
let typed = "", timer;
const press = id => { const b = document.getElementById(id); if (b) b.click(); };
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  if ("nsu".includes(event.key)) return press({n: "none", s: "skip", u: "undo"}[event.key]);
  if (!/^[0-9]$/.test(event.key)) return;
  clearTimeout(timer);
  typed += event.key;
  const pick = () => { press("step-" + Number(typed)); typed = ""; };
  // A second digit may follow where there are so many steps
  if (document.getElementById("step-" + 10 * Number(typed))) timer = setTimeout(pick, 700); else pick();
});
</script>
"""
_STYLE = """
.gradio-container {max-width: 60rem !important; width: 100%; margin: auto}
.step {align-items: center; border-top: 1px solid var(--border-color-primary); padding: .2rem 0}
.step button {min-width: 3.2rem; max-width: 3.2rem}
.shown {max-height: 40rem; overflow: auto; contain: paint}
footer {display: none !important}
"""
_LATEX = [{"left": r"\[", "right": r"\]", "display": True}, {"left": r"\(", "right": r"\)", "display": False}]


def label(items: Sequence[ToLabel], answers: LabelStore, port: int | None = None, open_browser: bool = True) -> None:
    """
    Serve the page until every solution has an answer, or until Ctrl-C.

    Records: `{"step": k}`, `{"step": None, "skipped": True}`, `{"step": None, "no_error": True}`, `{"undone": True}`.

    Args:
        items (`Sequence[ToLabel]`):
            The solutions.
        answers (`LabelStore`):
            What was answered before, and where answers go.
        port (`int`, *optional*):
            Port on 127.0.0.1. By default the first free one from 7860.
        open_browser (`bool`, *optional*, defaults to `True`):
            Whether to open the page.

    Raises:
        RunError: If Gradio is missing.
    """
    labelling = Labelling(items, answers)
    if labelling.current() is None:
        return
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise RunError(
            "Judge 'human' needs the package gradio. Install it: pip install 'stepdpo_trl[human]'"
        ) from error
    done = threading.Event()
    page = _page(gradio, labelling, done)
    _, url, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        head=_KEYS,
        css=_STYLE,
    )
    print(f"{labelling.progress()}. Pick the first wrong step of each at {url} (Ctrl-C stops; answers are kept).")
    try:
        done.wait()
        time.sleep(2)  # until the page has said so
    finally:
        page.close(verbose=False)


def _page(gradio: Any, labelling: Labelling, done: threading.Event) -> Any:
    def written(markdown: str) -> None:
        gradio.Markdown(markdown, latex_delimiters=_LATEX, elem_classes="shown")

    with gradio.Blocks(title="First wrong step", analytics_enabled=False) as page:
        turn = gradio.State(0)

        @gradio.render(inputs=turn, triggers=[page.load, turn.change])
        def show(number: int) -> None:
            item = labelling.current()
            gradio.Markdown(f"**{labelling.progress()}.** Which step is the first wrong one? (click, or its key)")
            if item is None:
                gradio.Markdown("# All done\nThis page can be closed.")
                done.set()
                return
            written(f"### Problem\n{_text(item.problem)}")
            with gradio.Accordion("Gold answer and solution", open=True):
                written(f"**{_text(item.answer)}**\n\n{_text(item.solution)}")

            def button(text: str, name: str, act: Any, **style: Any) -> None:
                # The number of turns says that there is something new to show
                gradio.Button(text, elem_id=name, **style).click(lambda: (act(), number + 1)[1], outputs=turn)

            def picks(record: dict[str, Any]) -> Any:
                return lambda: labelling.answer(item.key, record)

            for step, text in enumerate(item.steps, start=1):
                with gradio.Row(elem_classes="step"):
                    button(str(step), f"step-{step}", picks({"step": step}), variant="primary", scale=0, min_width=52)
                    written(_text(text))
            with gradio.Row():
                button("No step is wrong (n)", "none", picks({"step": None, "no_error": True}))
                button("Skip (s)", "skip", picks({"step": None, "skipped": True}))
                button("Undo the last (u)", "undo", labelling.undo)

    return page


# A single dollar opens a formula where no space follows it, and closes it where none is before and no digit behind it
# (Pandoc's tex_math_dollars): "$5 and $7" is money
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"
    r"|(?<![\\$\w])\$(?![\s$])((?:\\.|(?!\n\s*\n)[^$\\])+?)(?<!\s)\$(?![\d$])",
    re.S,
)
# What has a size, such as \rule{999em}{999em}, may cover the page; a macro may hide that. Links and pictures are none,
# as KaTeX is not told to trust. A delimiter inside would end the formula, and what follows would be obeyed
_NOT_SET = re.compile(
    r"\\(?:rule|includegraphics|href|url|html[A-Z]\w*|[gex]?def|let|futurelet|(?:re)?newcommand|providecommand|tmspace)"
    r"(?![A-Za-z])|\\[A-Za-z]*@|\\[\[\])]"
    r"|\d\.?\s*(?:em|ex|mu|pt|pc|px|mm|cm|in|bp|dd|cc|nd|nc|sp)(?![a-z])"
)


def _text(text: str) -> str:
    """As it is written, formulas set: what would be Markdown or HTML is shown, not obeyed."""
    shown, end = [], 0
    for match in _FORMULA.finditer(text):
        display, formula = bool(match[1] or match[2]), next(group for group in match.groups() if group is not None)
        shown.append(_escape(text[end : match.start()]))
        shown.append(_formula(formula, display) if _can_be_set(formula) else _escape(match[0]))
        end = match.end()
    shown.append(_escape(text[end:]))
    return re.sub(r"\n[ \t]*", "  \n", "".join(shown))


def _can_be_set(formula: str) -> bool:
    braces = re.sub(r"\\.", "", formula, flags=re.S)  # one that is open would swallow what follows the formula
    return not _NOT_SET.search(formula) and braces.count("{") == braces.count("}")


def _escape(text: str) -> str:
    text = re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", text)
    # KaTeX looks for \( and \[ in what is on the page; it does not look across elements
    return text.replace("&#92;", "&#92;<wbr>")


def _formula(formula: str, display: bool) -> str:
    formula = re.sub(r"\\.|%", lambda match: r"\%" if match[0] == "%" else match[0], formula, flags=re.S)  # no comment
    formula = formula.replace("<", r"\lt ").replace(">", r"\gt ").replace("\n", " ")
    return rf"\[{formula}\]" if display else rf"\({formula}\)"


class Person:
    """
    A person as somebody to ask: about all that is asked at a time, on one page.

    Args:
        labels (`Log`):
            Where answers are kept.
        port (`int`, *optional*):
            Port of the page.
    """

    def __init__(self, labels: Log, port: int | None = None) -> None:
        self.labels, self.port = labels, port

    def answer(self, requests: Sequence[HumanRequest]) -> dict[str, Mapping[str, Any]]:
        """Ask, where there is no answer yet."""
        items = []
        for request in requests:
            solution, problem = request.solution, request.solution.problem
            steps = split_steps(solution.text, solution.style).texts()
            items.append(ToLabel(request.key, problem.problem, problem.answer, problem.solution, steps))
        label(items, self.labels, port=self.port)
        return {request.key: self.labels.get(request.key, {"skipped": True}) for request in requests}
