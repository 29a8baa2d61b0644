"""Local web page on which a person picks the first wrong step of solutions, with one click or key each."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...data.steps import split_steps
from ...runs.log import Log, RunError
from ..records import text_digest
from .human import HumanRequest
from .human_markdown import to_markdown
from .local_only import LocalOnly


@dataclass(frozen=True)
class ToLabel:
    """
    A solution to label.

    Args:
        key (`str`):
            Unique name within the run.
        problem (`str`):
            The problem.
        answer (`str`):
            The gold answer.
        solution (`str`):
            The gold solution. May be empty.
        steps (`tuple[str, ...]`):
            The steps of the incorrect solution.
        digest (`str`):
            Digest of the text of the incorrect solution.
    """

    key: str
    problem: str
    answer: str
    solution: str
    steps: tuple[str, ...]
    digest: str


class LabelStore(Protocol):
    """Append-only log of labels. The last record of a key counts, and is on disk when `append` returns."""

    def __getitem__(self, key: str) -> Mapping[str, Any]: ...
    def get(self, key: str, default: Mapping[str, Any], /) -> Mapping[str, Any]: ...  # noqa: D102
    def append(self, key: str, record: Mapping[str, Any]) -> None: ...  # noqa: D102


class Labeling:
    """
    Progress of labeling, shared by all open pages.

    Args:
        items (`Sequence[ToLabel]`):
            The solutions.
        labels (`LabelStore`):
            Earlier labels. New labels are appended.
    """

    def __init__(self, items: Sequence[ToLabel], labels: LabelStore) -> None:
        self.items = {item.key: item for item in items}
        self.labels = labels
        self.history = [item.key for item in items if self.is_labeled(item.key)]
        self.lock = threading.Lock()

    def is_labeled(self, key: str) -> bool:
        """Return whether a solution has a label that was not undone and is not about an earlier text."""
        record = self.labels.get(key, {"undone": True})
        # Labels of earlier releases have no digest
        return not record.get("undone") and record.get("solution") in (None, self.items[key].digest)

    def current(self) -> ToLabel | None:
        """Return the first solution without a label, or `None` if all have one."""
        return next((item for item in self.items.values() if not self.is_labeled(item.key)), None)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Store the label of a solution, unless another page has labeled it in the meantime."""
        with self.lock:
            if not self.is_labeled(key):
                self.labels.append(key, {**record, "solution": self.items[key].digest})
                self.history.append(key)

    def undo(self) -> None:
        """Undo the last label."""
        with self.lock:
            if self.history:
                self.labels.append(self.history.pop(), {"undone": True})

    def progress(self) -> str:
        """Return the progress as text, such as "12 of 340 done, 3 skipped"."""
        skipped = sum(bool(self.labels[key].get("skipped")) for key in self.history)
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
  // Wait for a second digit if there is such a step
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


def label(items: Sequence[ToLabel], labels: LabelStore, port: int | None = None) -> None:
    """
    Open the page in the browser and serve it until every solution has a label, or until Ctrl-C.

    A label is one of `{"step": k}`, `{"step": None, "skipped": True}` and `{"step": None, "no_error": True}`, with the
    digest of the solution's text as `"solution"`, or `{"undone": True}`.

    Args:
        items (`Sequence[ToLabel]`):
            The solutions.
        labels (`LabelStore`):
            Earlier labels. New labels are appended.
        port (`int`, *optional*):
            Port on 127.0.0.1. Defaults to the first free one from 7860.

    Raises:
        RunError: If Gradio is not installed.
    """
    labeling = Labeling(items, labels)
    if labeling.current() is None:
        return
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
        from starlette.middleware import Middleware
    except ImportError as error:
        raise RunError(
            "The judge 'human' requires the package gradio. Install it: pip install 'stepdpo_trl[human]'"
        ) from error
    done = threading.Event()
    page = _page(gradio, labeling, done)
    _, url, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        inbrowser=True,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        app_kwargs={"middleware": [Middleware(LocalOnly)]},
        head=_KEYS,
        css=_STYLE,
    )
    print(
        f"{labeling.progress()}. Pick the first wrong step of each solution at {url}. Press Ctrl-C to stop: "
        "labels are kept."
    )
    try:
        done.wait()
        time.sleep(2)  # lets the page show that all are done
    finally:
        page.close(verbose=False)


def _page(gradio: Any, labeling: Labeling, done: threading.Event) -> Any:
    def show_text(markdown: str) -> None:
        gradio.Markdown(markdown, latex_delimiters=_LATEX, elem_classes="shown")

    with gradio.Blocks(title="First wrong step", analytics_enabled=False) as page:
        turn = gradio.State(0)

        @gradio.render(inputs=turn, triggers=[page.load, turn.change])
        def show(number: int) -> None:
            item = labeling.current()
            gradio.Markdown(
                f"**{labeling.progress()}.** Which step is the first wrong one? Click its number or type it."
            )
            if item is None:
                gradio.Markdown("# All done\nThis page can be closed.")
                done.set()
                return
            show_text(f"### Problem\n{to_markdown(item.problem)}")
            with gradio.Accordion("Gold answer and solution", open=True):
                show_text(f"**{to_markdown(item.answer)}**\n\n{to_markdown(item.solution)}")

            def button(text: str, name: str, act: Any, **style: Any) -> None:
                # A change of the turn number makes Gradio render the next solution
                gradio.Button(text, elem_id=name, **style).click(lambda: (act(), number + 1)[1], outputs=turn)

            def pick(record: dict[str, Any]) -> Any:
                return lambda: labeling.add(item.key, record)

            for step, text in enumerate(item.steps, start=1):
                with gradio.Row(elem_classes="step"):
                    button(str(step), f"step-{step}", pick({"step": step}), variant="primary", scale=0, min_width=52)
                    show_text(to_markdown(text))
            with gradio.Row():
                button("No step is wrong (n)", "none", pick({"step": None, "no_error": True}))
                button("Skip (s)", "skip", pick({"step": None, "skipped": True}))
                button("Undo the last label (u)", "undo", labeling.undo)

    return page


class Person:
    """
    Service of a person, who labels all solutions of one call on one page. The labels are stored.

    Args:
        labels (`Log`):
            Log for the labels.
        port (`int`, *optional*):
            Port of the page. Defaults to the first free one from 7860.
    """

    def __init__(self, labels: Log, port: int | None = None) -> None:
        self.labels, self.port = labels, port

    def answer(self, requests: Sequence[HumanRequest]) -> dict[str, Mapping[str, Any]]:
        """
        Show the page for solutions without a label.

        Args:
            requests (`Sequence[HumanRequest]`):
                The solutions.

        Returns:
            `dict[str, Mapping]`: The labels, by key. Solutions that were not reached count as skipped.

        Raises:
            RunError: If Gradio is not installed.
        """
        items = []
        for request in requests:
            solution, problem = request.solution, request.solution.problem
            steps = split_steps(solution.text, solution.style).texts()
            digest = text_digest(solution.text)
            items.append(ToLabel(request.key, problem.problem, problem.answer, problem.solution, steps, digest))
        label(items, self.labels, port=self.port)
        labeling = Labeling(items, self.labels)
        return {key: self.labels[key] if labeling.is_labeled(key) else {"skipped": True} for key in labeling.items}
