"""The page of the human judge: stored labels, rendered text, and the page itself in a headless Chromium."""

import asyncio
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from stepdpo_trl.pipeline.judges import human_page
from stepdpo_trl.pipeline.judges.human import HumanRequest
from stepdpo_trl.pipeline.judges.human_markdown import to_markdown
from stepdpo_trl.pipeline.judges.human_page import Labeling, Person, ToLabel, label
from stepdpo_trl.pipeline.judges.local_only import LocalOnly
from stepdpo_trl.pipeline.records import Problem, Solution
from stepdpo_trl.runs.log import Log

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
        "of a",
    ),
    ToLabel(
        "b",
        "Is 1 < 2 & 3 > 2?",
        "yes",
        "",
        ("<script>document.title = 'broken'</script> **no**", "so no", "no"),
        "of b",
    ),
    ToLabel("c", "Count.", "12", "", tuple(f"{n}" for n in range(1, 13)), "of c"),
]


def read(path):
    """Read labels. Each is about the text of its solution."""
    records = dict(Log(path))
    assert all(record.pop("solution") == f"of {key}" for key, record in records.items())
    return records


def test_label_skip_undo_and_resume(tmp_path):
    path = tmp_path / "labels.jsonl"
    labeling = Labeling(ITEMS, Log(path))
    assert labeling.current().key == "a"
    labeling.add("a", {"step": 1})
    labeling.add("b", {"step": None, "skipped": True})
    assert (labeling.current().key, labeling.progress()) == ("c", "2 of 3 done, 1 skipped")
    labeling.undo()
    assert labeling.current().key == "b"
    again = Labeling(ITEMS, Log(path))  # after a restart
    assert (again.current().key, again.progress()) == ("b", "1 of 3 done, 0 skipped")
    again.undo()
    assert again.current().key == "a"
    again.undo()  # nothing to undo
    for key in "abc":
        again.add(key, {"step": 1})
    assert again.current() is None
    assert read(path) == {key: {"step": 1} for key in "abc"}


def test_an_outdated_page(tmp_path):
    """A click changes nothing if another page has labeled the solution."""
    labeling = Labeling(ITEMS, Log(tmp_path / "labels.jsonl"))
    shown = labeling.current().key
    labeling.add(shown, {"step": 1})
    labeling.add(shown, {"step": 2})
    assert read(tmp_path / "labels.jsonl") == {"a": {"step": 1}}


def test_labels_belong_to_a_problem_and_a_text(tmp_path, monkeypatch):
    """Neither another problem with the same solution nor another solution in its place gets a label."""

    def solution(problem, text):
        return Solution(f"{problem}/prefix/0", Problem(problem, "?", "1"), text, "wrong", "stop", style="line")

    def label_as(number):
        def label(items, labels, port=None):
            labeling = Labeling(items, labels)
            while (item := labeling.current()) is not None:
                asked.append(item.key)
                labeling.add(item.key, {"step": number})

        asked = []
        monkeypatch.setattr(human_page, "label", label)
        return asked

    def answer(*solutions):
        found = Person(Log(tmp_path / "labels.jsonl")).answer([HumanRequest(one.key, one) for one in solutions])
        return {key: record.get("step") for key, record in found.items()}

    first, second = solution("p", "a\nb"), solution("q", "a\nb")
    assert (label_as(1), answer(first)) == (["p/prefix/0"], {"p/prefix/0": 1})
    assert (label_as(2), answer(first, second)) == (["q/prefix/0"], {"p/prefix/0": 1, "q/prefix/0": 2})
    replaced = solution("p", "a\nc")
    monkeypatch.setattr(human_page, "label", lambda *_, **__: None)  # the page is closed
    assert answer(replaced, second) == {"p/prefix/0": None, "q/prefix/0": 2}
    assert (label_as(2), answer(replaced)) == (["p/prefix/0"], {"p/prefix/0": 2})
    Log(tmp_path / "labels.jsonl").append("r/prefix/0", {"step": 2})  # as earlier releases wrote it
    assert (label_as(1), answer(solution("r", "x\ny"))) == ([], {"r/prefix/0": 2})


def test_no_page_is_shown_if_all_are_labeled(tmp_path):
    log = Log(tmp_path / "labels.jsonl")
    log.extend((item.key, {"step": 1, "solution": item.digest}) for item in ITEMS)
    label(ITEMS, log)


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("$x$ and $y + 1$", ["x", "y + 1"]),
        ("$5 and $7", []),
        ("$5, and $x$.", ["x"]),
        ("$x +\ny$, $5\n\nor 7$", ["x + y"]),  # formulas may span lines, but not paragraphs
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
def test_formulas_that_are_rendered(text, formulas):
    assert re.findall(r"\\[(\[](.+?)\\[)\]]", to_markdown(text)) == formulas


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "localhost:8000"}, 200),  # forwarded by ssh -L
        ({"host": "evil.example:7860"}, 403),  # DNS rebinding
        ({"host": "evil.example:7860", "origin": "http://evil.example:7860"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403),  # cross-site request
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:1"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ({}, 403),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_requests_of_other_sites_are_refused(kind, headers, status):
    sent = []

    async def app(scope, receive, send):
        await send({"status": 200})

    async def send(message):
        sent.append(message.get("status", message.get("code")))

    scope = {"type": kind, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(LocalOnly(app)(scope, None, send))
    assert sent[0] == (1008 if (kind, status) == ("websocket", 403) else status)


@pytest.fixture
def browser():
    pytest.importorskip("gradio", reason="needs the extra human")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: `make browser`")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: `make browser`")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_in_the_browser(browser, tmp_path, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda *_, **__: False)
    path = tmp_path / "labels.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = threading.Thread(target=label, args=(ITEMS, Log(path), port), daemon=True)
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
    wait_for("2*3 + 4*5 = 26")  # not shown as emphasis
    wait_for("4 * 3 = 12 ![x](http://127.0.0.1:9/a.png)")  # no image is fetched
    wait_for("Costs $5 and $7, so")  # money
    wait_for(r"\[\rule{9999em}{9999em}\] is no")  # not rendered: it would cover the page
    wait_for(r"$a\) ![x](http://127.0.0.1:9/b.png) \(b$")
    # The formula of the problem, the one between dollars, x, and the tall one, which must not push others off the page
    page.locator(".katex").nth(3).wait_for()
    assert page.locator(".katex").count() == 4
    assert page.locator(".katex-error").count() == 0
    assert page.evaluate("document.documentElement.scrollHeight") < 2500
    assert not fetched
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    for name, value in (("Host", f"evil.example:{port}"), ("Origin", "http://evil.example")):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/config", headers={name: value})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)
    other = browser.new_page()
    other.goto(f"http://127.0.0.1:{port}")
    other.get_by_text("0 of 3 done").first.wait_for(timeout=20_000)
    page.click("#step-1")
    wait_for("1 of 3 done")
    assert read(path) == {"a": {"step": 1}}  # saved at once
    other.click("#step-2")  # still shows the first solution: its label is kept
    other.get_by_text("1 of 3 done").first.wait_for(timeout=20_000)
    assert read(path) == {"a": {"step": 1}}
    other.close()
    wait_for("Is 1 < 2 & 3 > 2?")
    wait_for("<script>")  # shown as text, not run
    assert page.title() == "First wrong step"
    page.keyboard.press("s")
    wait_for("2 of 3 done, 1 skipped")
    page.keyboard.press("u")
    wait_for("1 of 3 done, 0 skipped")
    page.keyboard.press("n")
    wait_for("2 of 3 done, 0 skipped")
    page.keyboard.press("1")  # waits for a second digit, since there are twelve steps
    page.keyboard.press("1")
    wait_for("All done")
    served.join(timeout=20)
    assert not served.is_alive()
    assert read(path) == {"a": {"step": 1}, "b": {"step": None, "no_error": True}, "c": {"step": 11}}
