"""The page for a person: what it keeps, and the page itself in a headless Chromium."""

import re
import shutil
import socket
import threading
import time

import pytest

from stepdpo_trl.pipeline.judges.human_page import Labelling, ToLabel, _text, label
from stepdpo_trl.runs.run_directory import Log

ITEMS = [
    ToLabel(
        "a",
        r"What is \(2 + 2 * 3\)?",
        "8",
        "Multiply first.",
        (
            "2*3 + 4*5 = 26",
            "4 * 3 = 12 ![x](http://127.0.0.1:9/a.png)",
            r"Costs $5 and $7, so $\frac{12}{2} < 7$ each",
            r"\[\rule{9999em}{9999em}\] is no \(x\), \(a { \rule{9999em}{9999em} \(b } c\)",
            r"$a\) ![x](http://127.0.0.1:9/b.png) \(b$",
            r"\[\begin{matrix}" + 500 * r"1\\" + r"\end{matrix}\]",
        ),
    ),
    ToLabel("b", "Is 1 < 2 & 3 > 2?", "yes", "", ("<script>document.title = 'broken'</script> **no**", "so no", "no")),
    ToLabel("c", "Count.", "12", "", tuple(f"{n}" for n in range(1, 13))),
]


def read(path):
    return dict(Log(path))


def test_answers_skips_undo_and_resume(tmp_path):
    path = tmp_path / "labels.jsonl"
    labelling = Labelling(ITEMS, Log(path))
    assert labelling.current().key == "a"
    labelling.answer("a", {"step": 1})
    labelling.answer("b", {"step": None, "skipped": True})
    assert (labelling.current().key, labelling.progress()) == ("c", "2 of 3 done, 1 skipped")
    labelling.undo()
    assert labelling.current().key == "b"
    again = Labelling(ITEMS, Log(path))  # the next day
    assert (again.current().key, again.progress()) == ("b", "1 of 3 done, 0 skipped")
    again.undo()
    assert again.current().key == "a"
    again.undo()  # nothing left to take back
    for key in "abc":
        again.answer(key, {"step": 1})
    assert again.current() is None
    assert read(path) == {key: {"step": 1} for key in "abc"}


def test_a_page_that_is_behind(tmp_path):
    """A click on what another page has answered changes nothing."""
    labelling = Labelling(ITEMS, Log(tmp_path / "labels.jsonl"))
    shown = labelling.current().key
    labelling.answer(shown, {"step": 1})
    labelling.answer(shown, {"step": 2})
    assert read(tmp_path / "labels.jsonl") == {"a": {"step": 1}}


def test_nothing_to_do_needs_no_page(tmp_path):
    log = Log(tmp_path / "labels.jsonl")
    log.extend((item.key, {"step": 1}) for item in ITEMS)
    label(ITEMS, log)


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("$x$ and $y + 1$", ["x", "y + 1"]),
        ("$5 and $7", []),
        ("$5, and $x$.", ["x"]),
        ("$x +\ny$, $5\n\nor 7$", ["x + y"]),  # over the end of a line, not of a paragraph
        (r"$\$5 + \$7$ and $50%$ and $1\%$", [r"\$5 + \$7", r"50\%", r"1\%"]),
        ("$$x$$ or \\[y\\] or \\(z\\)", ["x", "y", "z"]),
        (r"$\frac{1}{2}$.", [r"\frac{1}{2}"]),
        (r"\$3 and $4", []),
        (r"$\def\m{em}\rule{9\m}{9\m}$", []),
        ("$1\\kern 9999 em 2$", []),
        (r"$\hspace{9999.em}$ $\hspace{9\@firstoftwo{em}{}}$", []),
        (r"$\href{http://x}{y}$ $\url{x}$ $\includegraphics{x}$ $\htmlClass{x}{y}$", []),
        (r"$a { b$ $a\) b$ \[a \( b \) c\]", []),
        (r"$\defect$", [r"\defect"]),
    ],
)
def test_formulas(text, formulas):
    assert re.findall(r"\\[(\[](.+?)\\[)\]]", _text(text)) == formulas


@pytest.fixture
def browser():
    pytest.importorskip("gradio", reason="needs the extra human")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_in_the_browser(browser, tmp_path):
    path = tmp_path / "labels.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = threading.Thread(target=label, args=(ITEMS, Log(path), port, False), daemon=True)
    served.start()
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    fetched = []
    page.on("request", lambda request: fetched.append(request.url) if ".png" in request.url else None)
    for _ in range(100):
        try:
            page.goto(f"http://127.0.0.1:{port}")
            break
        except Exception:
            time.sleep(0.2)

    def wait_for(text):
        page.get_by_text(text).first.wait_for(timeout=20_000)

    wait_for("0 of 3 done")
    wait_for("2*3 + 4*5 = 26")  # not emphasis
    wait_for("4 * 3 = 12 ![x](http://127.0.0.1:9/a.png)")  # nor a picture that is fetched
    wait_for("Costs $5 and $7, so")  # money
    wait_for(r"\[\rule{9999em}{9999em}\] is no")  # would cover the page
    wait_for(r"$a\) ![x](http://127.0.0.1:9/b.png) \(b$")
    # The problem's formula, the one between dollars, x, and the tall one, which leaves room for others
    page.locator(".katex").nth(3).wait_for()
    assert page.locator(".katex").count() == 4
    assert page.locator(".katex-error").count() == 0
    assert page.evaluate("document.documentElement.scrollHeight") < 2500
    assert not fetched
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.click("#step-1")
    wait_for("1 of 3 done")
    assert read(path) == {"a": {"step": 1}}  # saved at once
    wait_for("Is 1 < 2 & 3 > 2?")
    wait_for("<script>")  # shown, not run
    assert page.title() == "First wrong step"
    page.keyboard.press("s")
    wait_for("2 of 3 done, 1 skipped")
    page.keyboard.press("u")
    wait_for("1 of 3 done, 0 skipped")
    page.keyboard.press("n")
    wait_for("2 of 3 done, 0 skipped")
    page.keyboard.press("1")  # of twelve steps: waits for a second digit
    page.keyboard.press("1")
    wait_for("All done")
    served.join(timeout=20)
    assert not served.is_alive()
    assert read(path) == {"a": {"step": 1}, "b": {"step": None, "no_error": True}, "c": {"step": 11}}
