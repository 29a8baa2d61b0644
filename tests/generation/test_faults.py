"""What a server may send or do to the client, and how a run ends while it waits for a server."""

import gzip
import json
import os
import signal
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

pytest.importorskip("openai", reason="needs the extra openai")

from stepdpo_trl.generation import GenerationError, ModelSpec, Request, Sampling
from stepdpo_trl.generation.addresses import check_address
from stepdpo_trl.generation.http import MAX_REPLY_SIZE, retry_after
from stepdpo_trl.generation.openai import OpenAIGenerator
from stepdpo_trl.generation.protocol import token_count
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.run_directory import Log
from stepdpo_trl.runs.tasks import Ask, model_service, run_tasks

from .test_openai import KEY, Server, ask, send

RED = "\x1b[31mred\x1b]0;title\x07\x9b31m\u202e"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()


def spec_of(server, concurrent=2):
    return ModelSpec("m", "openai", server.url, str(MODEL_PATH), max_concurrent_requests=concurrent)


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- Pauses


def date_in(seconds):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("inf", float("inf")),
        ("100000", 100000),
        *((value, 0) for value in ("-5", "-inf", "nan", "", "soon", "1e999x", "\u0661st")),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Mon, 99 Foo 2020 00:00:00 GMT", 0),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after({"retry-after": value}) == seconds


def test_retry_after_of_a_date():
    assert 55 < retry_after({"retry-after": date_in(60)}) <= 60
    assert 55 < retry_after({"retry-after": date_in(60).replace("GMT", "-0000")}) <= 60
    assert retry_after({"retry-after": date_in(-60)}) == 0
    assert retry_after({}) == 0


@pytest.mark.parametrize(
    ("value", "pause"), [(None, 0.5), ("2", 2), ("inf", 300), ("100000", 300), ("-1", 0.5), ("soon", 0.5)]
)
def test_pauses_are_limited_and_logged(server, caplog, value, pause):
    headers = {} if value is None else {"retry_after": value}
    server.script = [lambda handler, body: handler.reply(429, b"{}", **headers)]
    found, pauses, error = ask(server, 1)
    assert (len(found), pauses, error) == (1, [pause], None)
    asked = f" (the server asked for {float(value):g} s)" if pause == 300 else ""
    assert f"Request '0': attempt 2 of 8 in {pause:g} s{asked}: HTTP 429" in caplog.text


# --- Replies


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_refused(server, status, monkeypatch):
    """Neither the prompt nor the key reaches the other host."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other = Server()
    location = other.url.replace("://", "://user:secret@") + "/completions?key=secret"
    server.script = [lambda handler, body: handler.reply(status, b"", location=location)]
    found, pauses, error = ask(server, 3, concurrent=1)
    other.http.shutdown()
    assert (found, pauses, other.bodies, other.listed) == ({}, [], [], 0)
    assert f"HTTP {status}" in error
    assert f"It redirects to {other.url.replace('://', '://***@')}/completions?***. Redirects are not" in error
    assert "secret" not in error
    assert KEY not in error


def test_a_redirect_of_the_model_list_is_not_followed(server):
    other = Server()
    handler = server.http.RequestHandlerClass
    handler.do_GET = lambda self: self.reply(307, b"", location=f"{other.url}/models")
    assert ask(server, 1)[2] is None
    other.http.shutdown()
    assert other.listed == 0


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_reply_is_not_read(server, declared):
    sent = []

    def huge(handler, body):
        handler.send_response(200)
        if declared:
            handler.send_header("content-length", str(100 * 2**20))
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" " * 2**20)
            sent.append(1)

    server.script = [huge]
    found, _, error = ask(server, 1, tries=1)
    assert found == {}
    assert f"a reply of more than {MAX_REPLY_SIZE:,} bytes" in error
    assert len(sent) < 50  # the rest of 10 MB is in the buffers of the system


def test_a_gzip_bomb_is_not_inflated(server):
    bomb = gzip.compress(b" " * 40 * 2**20, compresslevel=1)
    assert len(bomb) < 2**18
    server.script = [lambda handler, body: handler.reply(200, bomb, content_encoding="gzip")]
    assert f"a reply of more than {MAX_REPLY_SIZE:,} bytes" in ask(server, 1, tries=1)[2]


def test_encodings(server):
    zipped = [lambda handler, body: handler.reply(200, gzip.compress(handler.content(body)), content_encoding="gzip")]
    server.script = list(zipped)
    assert ask(server, 1)[0]["0"].text == "to 0"
    server.script = [lambda handler, body: handler.reply(200, b"x", content_encoding="br")]
    assert "a reply in the encoding 'br', which was not requested" in ask(server, 1, tries=1)[2]
    server.script = [lambda handler, body: handler.reply(200, b"not gzip", content_encoding="gzip")]
    assert "Error -3 while decompressing" in ask(server, 1, tries=1)[2]


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (200, DEEP, "an invalid reply (RecursionError"),
        (200, b'{"choices": ' + DEEP + b"}", "an invalid reply (RecursionError"),
        (500, b'{"error": {"message": ' + DEEP + b"}}", "HTTP 500"),
        (400, b'{"error": {"message": "no", "code": ' + DEEP + b"}}", "HTTP 400"),
        (400, b'{"error": {"message": "no", "code": ' + b"[" * 700 + b"]" * 700 + b"}}", "HTTP 400: Error code: 400"),
        (200, b'{"choices": [], "usage": ' + b"9" * 5000 + b"}", "(ValueError: Exceeds the limit (4300 digits)"),
    ],
)
def test_deeply_nested_and_huge_values(server, status, content, expected):
    server.script = [lambda handler, body: handler.reply(status, content)]
    found, _, error = ask(server, 1, tries=1)
    assert found == {}
    assert expected in error


def test_a_deeply_nested_list_of_models(server):
    for server.models in ((200, b'{"data": [' + DEEP + b"]}"), (404, DEEP)):
        assert ask(server, 1)[2] is None


def trickle(where):
    def reply(handler, body):
        head = b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\nx-" + b"a" * 5000
        if where == "body":
            handler.wfile.write(head + b": b\r\n\r\n")
        try:
            for _ in range(1000):
                handler.wfile.write(b"{" if where == "body" else b"a")
                time.sleep(0.02)
        except OSError:
            handler.server.disconnected.set()

    return reply


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_trickling_reply_is_given_up(server, where):
    """Each read succeeds, but the answer as a whole exceeds the time limit."""
    server.http.disconnected = threading.Event()
    server.script = [trickle(where)]
    start = time.monotonic()
    found, pauses, error = ask(server, 1, tries=1, timeout=0.4)
    assert time.monotonic() - start < 5
    assert (found, pauses) == ({}, [])
    assert "a time-out (no complete reply in 0.4 s)" in error
    assert server.http.disconnected.wait(5)


def test_control_characters_do_not_reach_messages(server, caplog):
    shown = []

    def reply(status, error):
        return lambda handler, body: handler.reply(status, json.dumps({"error": error}).encode())

    for status, error in (
        (400, {"message": RED, "code": RED}),
        (403, {"message": f"a{RED}", "code": "x"}),
        (500, {"message": RED, "code": RED}),
        (400, {"message": f"{RED} maximum context", "code": f"content_filter {RED}"}),
    ):
        server.script = [reply(status, error)] * 2
        shown.append(ask(server, 3, concurrent=1, tries=2)[2] or "")
    server.models = (200, [RED, "other"])
    shown.append(ask(server, 1)[2])
    text = "".join(shown) + caplog.text
    assert "red" in text
    assert not set(RED) & {c for c in text if not c.isprintable() and c != "\n"}
    assert "\\x1b[31mred\\x1b]0;title\\x07\\x9b31m\\u202e" in text


@pytest.mark.parametrize("reported", ["3", float("nan"), float("inf"), [3], {}, -1, True, 3.0, 10**12, None, "x" * 10])
def test_token_counts_that_are_none_are_unknown(server, reported):
    assert token_count(reported) == 0
    usage = {"prompt_tokens": reported, "completion_tokens": reported}

    def reply(handler, body):
        content = json.loads(handler.content(body))
        handler.reply(200, json.dumps({**content, "usage": usage}).encode())

    server.script = [reply]
    answer = ask(server, 1)[0]["0"]
    assert (answer.text, answer.prompt_tokens, answer.tokens) == ("to 0", 0, 0)


@pytest.mark.parametrize("usage", [None, [], "many", 7, {}, {"prompt_tokens": 4}])
def test_usage_of_another_form(server, usage):
    def reply(handler, body):
        handler.reply(200, json.dumps({**json.loads(handler.content(body)), "usage": usage}).encode())

    server.script = [reply]
    answer = ask(server, 1)[0]["0"]
    assert (answer.prompt_tokens, answer.tokens) == ((4, 0) if usage == {"prompt_tokens": 4} else (0, 0))
    assert [token_count(count) for count in (0, 5, 10**8)] == [0, 5, 10**8]


def test_the_number_of_connections_is_not_limited(server):
    """By default, requests beyond the 1,000th would wait for a connection without a word."""
    client = OpenAIGenerator(spec_of(server, 1500)).client
    assert client._client._transport._pool._max_connections > 10**6


# --- Addresses


@pytest.mark.parametrize(
    "address",
    [
        "http://user:secret@localhost:8000/v1",
        "https://secret@localhost/v1",
        "http://localhost:8000/v1?api_key=secret",
        "http://localhost:8000/v1#secret",
        "user:secret@localhost:8000/v1",
        "http://user:sec/ret@localhost:8000/v1",
        "http://user:secret@[::1/v1",
        "http://user:secret@localhost:port/v1",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_shown(address):
    from stepdpo_trl.cli.main import make_parser

    for check in (check_address, lambda text: ModelSpec("m", "openai", text)):
        with pytest.raises(ValueError, match=r"\*\*\*") as error:
            check(address)
        assert not any(word in str(error.value) for word in ("secret", "sec/ret", "ret@"))
    with pytest.raises(SystemExit):
        make_parser().parse_args(["collect", "--model", "m", "--base-url", address])


@pytest.mark.parametrize("command", ["collect", "data", "eval", "loop"])
def test_credentials_are_not_printed_by_the_commands(command, capfd, tmp_path):
    from stepdpo_trl.cli.main import main

    option = "--judge-base-url" if command in ("data", "loop") else "--base-url"
    address = "http://user:secret@localhost:8000/v1?key=secret"
    with pytest.raises(SystemExit):
        main([command, "--model", "m", "--problems", "p.jsonl", "--output-dir", str(tmp_path), option, address]
             + ["--output-file", "x.jsonl"] * (command == "data"))  # fmt: skip
    out, err = capfd.readouterr()
    assert f"argument {option}: The server's address 'http://***@localhost:8000/v1?***' contains" in err
    assert "secret" not in out + err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address",
    ["localhost:8000/v1", "ftp://host", "http://", "http:///v1", "http://h:99999", "http://h/\x1b", "http://[", ""],
)
def test_an_address_that_is_not_a_url_is_quoted(address):
    with pytest.raises(ValueError, match="is not a URL") as error:
        check_address(address)
    assert repr(address) in str(error.value)


# --- The end of a run


def test_a_server_that_restarts_in_time(server):
    """The run continues by itself."""
    servers = [server]

    def pause(seconds):
        if len(servers) == 1 and seconds >= 2:
            servers.append(Server(port))

    def stop(handler, body):
        threading.Thread(target=lambda: (server.http.shutdown(), server.http.server_close())).start()
        handler.close_connection = True

    port = server.http.server_address[1]
    server.script = ["ok", "ok", stop]
    generator = OpenAIGenerator(spec_of(server, 1), sleep=pause)
    found, error = send(generator, [Request(str(n), "text", n) for n in range(6)])
    servers[-1].http.shutdown()
    assert error is None
    assert {key: answer.text for key, answer in found.items()} == {str(n): f"to {n}" for n in range(6)}
    assert len(servers[-1].bodies) == 4


def test_a_server_that_restarts_too_late(server, tmp_path):
    """The run ends with an error, and the same command resumes it."""

    def task(number):
        replies = yield Ask("model", (Request(str(number), "text", number),))
        return replies[str(number)].text

    def run(pauses):
        generator = OpenAIGenerator(spec_of(server, 2), sleep=pauses.append)
        service = model_service(generator, Sampling(), Log(tmp_path / "answers.jsonl"), "s")
        return list(run_tasks(map(task, range(8)), {"model": service}))

    def stop(handler, body):
        server.http.socket.close()  # connections are refused from now on
        handler.close_connection = True

    port, pauses = server.http.server_address[1], []
    server.script = ["ok", "ok", "ok", stop, "nothing"]
    with pytest.raises(
        GenerationError, match=r"did not answer the request .* \(Connection refused\)\. Check the server"
    ):
        run(pauses)
    assert 7 <= len(pauses) <= 14
    stored = len(Log(tmp_path / "answers.jsonl"))
    assert 3 <= stored < 8
    again = Server(port)
    server.url = again.url
    assert run([]) == [f"to {n}" for n in range(8)]
    assert len(again.bodies) == 8 - stored
    again.http.shutdown()


@pytest.mark.parametrize("trouble", ["retry", "trickle", "hang"])
def test_ctrl_c_ends_the_wait_for_a_server(server, trouble, tmp_path, monkeypatch):
    """Answers that have arrived are kept, and connections are closed."""
    monkeypatch.setattr("stepdpo_trl.runs.scheduler.GRACE", 0.3)
    server.http.disconnected = threading.Event()
    replies = {
        "retry": lambda handler, body: handler.reply(429, b"{}", retry_after="300"),
        "trickle": trickle("body"),
        "hang": lambda handler, body: handler.connection.recv(1) or server.http.disconnected.set(),
    }
    server.script = ["ok", "ok", *[replies[trouble]] * 2]

    def task(key):
        yield Ask("model", (Request(key, "text", 0),))

    def press():
        wait_until(lambda: len(server.bodies) == 4)
        time.sleep(0.2)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    pressed, log = [], Log(tmp_path / "answers.jsonl")
    service = model_service(OpenAIGenerator(spec_of(server)), Sampling(), log, "s")
    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(map(task, "abcdefgh"), {"model": service}))
    assert time.monotonic() - pressed[0] < 3
    assert sorted(log) == ["a", "b"]
    assert trouble == "retry" or server.http.disconnected.wait(5)
    assert len(server.bodies) == 4


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_failures_of_the_caller(server, failure, tmp_path, monkeypatch):
    """An error of the code that uses the results keeps the answers in flight; Ctrl-C there does not wait for them."""
    monkeypatch.setattr("stepdpo_trl.runs.scheduler.GRACE", 0.2)
    server.script = ["ok", lambda handler, body: (time.sleep(0.6), handler.reply_ok(body))]

    def task(key):
        yield Ask("model", (Request(key, "text", 0),))

    log = Log(tmp_path / "answers.jsonl")
    service = model_service(OpenAIGenerator(spec_of(server)), Sampling(), log, "s")

    def use_results():
        with closing(run_tasks(map(task, "ab"), {"model": service})) as results:
            for _ in results:
                wait_until(lambda: len(server.bodies) == 2)
                raise failure

    with pytest.raises(failure):
        use_results()
    assert sorted(log) == (["a"] if failure is KeyboardInterrupt else ["a", "b"])


def test_an_error_keeps_answers_in_flight_but_sends_nothing_again(server, tmp_path, caplog):
    """Requests that wait for their next attempt are given up, so that the run ends within the time limit."""
    started = threading.Event()

    def rejected(handler, body):
        wait_until(lambda: len(server.bodies) == 3)
        time.sleep(0.2)
        started.set()
        handler.reply_401(body)

    def slow(handler, body):
        started.wait(5)
        time.sleep(0.5)
        handler.reply_ok(body)

    server.script = [rejected, slow, lambda handler, body: handler.reply(429, b"{}", retry_after="300")]

    def task(key):
        yield Ask("model", (Request(key, "text", 0),))

    log = Log(tmp_path / "answers.jsonl")
    service = model_service(OpenAIGenerator(spec_of(server, 3)), Sampling(), log, "s")
    start = time.monotonic()
    with pytest.raises(GenerationError, match="HTTP 401"):
        list(run_tasks(map(task, "abcdef"), {"model": service}))
    assert time.monotonic() - start < 10
    assert len(log) == 1
    assert "The run ends because of an error. Waiting for" in caplog.text
    # The generator can be used again
    server.script = ["500", "ok"]
    service.generator.sleep = lambda seconds: None
    list(run_tasks(map(task, "xy"), {"model": service}))
    assert {"x", "y"} <= set(log)


# --- The tokenizer


def test_the_server_is_asked_before_the_hub(monkeypatch):
    """A wrong address is reported at once, without a search for the tokenizer that is retried for a minute."""
    searched = []

    def load(name, local_files_only=False, **kwargs):
        searched.append(local_files_only)
        raise OSError("offline")

    monkeypatch.setattr("stepdpo_trl.generation.chat.AutoTokenizer.from_pretrained", load)
    generator = OpenAIGenerator(ModelSpec("org/model", "openai", "http://127.0.0.1:9/v1"))
    with pytest.raises(GenerationError, match="Cannot connect to the server at http://127"):
        generator.render("a", "b")
    assert searched == [True]


def test_stored_answers_need_no_server(monkeypatch):
    from transformers import AutoTokenizer

    local = AutoTokenizer.from_pretrained(MODEL_PATH)
    monkeypatch.setattr("stepdpo_trl.generation.chat.AutoTokenizer.from_pretrained", lambda name, **options: local)
    generator = OpenAIGenerator(ModelSpec("org/model", "openai", "http://127.0.0.1:9/v1"))
    assert generator.render("a", "b").endswith("b")
