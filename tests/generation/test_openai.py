"""Generation by a local OpenAI-compatible server, which also fails in all the ways that servers do."""

import json
import os
import signal
import socket
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the extra openai")

from stepdpo_trl.generation import Completion, GenerationError, ModelSpec, Request, Sampling
from stepdpo_trl.generation.openai import OpenAIGenerator
from stepdpo_trl.quickstart import MODEL_PATH
from stepdpo_trl.runs.log import Log
from stepdpo_trl.runs.tasks import Ask, model_service, run_tasks

KEY = "sk-abcdefghijklmnop1234567890"


class Server:
    """
    Answers each request as the next entry of `script` says, and correctly once it is empty. An entry may also be a
    function of the handler and the body of the request.

    `models` is the reply to `GET /v1/models` (or another `prefix`): a status, and a body or a list of names.
    """

    def __init__(self, port=0):
        self.script, self.bodies, self.running, self.most_running = [], [], 0, 0
        self.prefix, self.models, self.listed = "/v1", (200, ["m"]), 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.listed += 1
                known = self.path == f"{outer.prefix}/models"
                status, models = outer.models if known else (404, b'{"detail": "Not Found"}')
                if status is None:
                    self.close_connection = True
                elif isinstance(models, list):
                    data = [{"id": name, "object": "model", "created": 1, "owned_by": "me"} for name in models]
                    self.reply(status, json.dumps({"object": "list", "data": data}).encode())
                else:
                    self.reply(status, models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.bodies.append((self.path, body, self.headers.get("authorization")))
                    outer.running += 1
                    outer.most_running = max(outer.most_running, outer.running)
                    reply = outer.script.pop(0) if outer.script else "ok"
                threading.Event().wait(0.02)
                with outer.lock:
                    outer.running -= 1
                reply(self, body) if callable(reply) else getattr(self, f"reply_{reply}")(body)

            def reply(self, status, content, length=None, **headers):
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(length or len(content)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def content(self, body):
                text = f"to {body['seed']}"
                text = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
                choice = {"index": 0, "finish_reason": "stop", **text}
                usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
                kind = "chat.completion" if "messages" in body else "text_completion"
                reply = {"id": "1", "object": kind, "created": 1, "model": "m", "choices": [choice], "usage": usage}
                return json.dumps(reply).encode()

            def reply_ok(self, body):
                self.reply(200, self.content(body))

            def reply_429(self, body):
                self.reply(429, b'{"error": {"message": "slow down"}}', retry_after="7")

            def reply_500(self, body):
                self.reply(500, b"oh no")

            def reply_nonsense(self, body):
                self.reply(200, b"<html>hello</html>")

            def reply_empty(self, body):
                self.reply(200, b'{"choices": []}')

            def reply_null(self, body):
                self.reply(200, b'{"choices": [{"text": null, "finish_reason": "stop", "index": 0}]}')

            def reply_filtered(self, body):
                self.reply(400, b'{"error": {"message": "blocked", "code": "content_filter"}}')

            def reply_half_filtered(self, body):
                self.reply(200, self.content(body).replace(b'"stop"', b'"content_filter"'))

            def reply_long(self, body):
                self.reply(400, b'{"error": {"message": "maximum context length is 64 tokens"}}')

            def reply_half_character(self, body):
                self.reply(200, self.content(body).replace(b'"to ', b'"\\ud83d '))

            def reply_nothing(self, body):
                self.close_connection = True

            def reply_half(self, body):
                content = self.content(body)
                self.reply(200, content[: len(content) // 2], length=len(content))
                self.close_connection = True

            def reply_401(self, body):
                self.reply(401, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode())

            def reply_hang(self, body):
                threading.Event().wait(3)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()


def send(generator, requests, sampling=None, done=()):
    """Send requests as a run does. Return the answers that are kept, and the error if there was one."""

    def task(request):
        yield Ask("model", (request,))

    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "answers.jsonl")
        log.extend((key, vars(Completion("done", "stop", 1, 1))) for key in done)
        error = None
        try:
            list(run_tasks(map(task, requests), {"model": model_service(generator, sampling or Sampling(), log, "s")}))
        except (GenerationError, KeyboardInterrupt) as failure:
            error = failure
        kept = {key: record for key, record in Log(log.path).items() if key not in done}
    fields = Completion.__dataclass_fields__
    return {key: Completion(**{name: kept[key][name] for name in fields}) for key in kept}, error


def ask(server, count=6, concurrent=2, done=(), prompt="text", top_k=0, url=None, **options):
    """Return the answers, the pauses, and the error message if there was an error."""
    pauses = []
    spec = ModelSpec("m", "openai", url or server.url, str(MODEL_PATH), max_concurrent_requests=concurrent)
    generator = OpenAIGenerator(spec, sleep=pauses.append, **options)
    requests = [Request(str(n), prompt, n) for n in range(count)]
    found, error = send(generator, requests, Sampling(0.5, 0.9, 7, top_k), done)
    assert error is None or isinstance(error, GenerationError)
    return found, pauses, error and str(error)


def test_texts_and_messages(server):
    found, pauses, error = ask(server, 3)
    assert (pauses, error) == ([], None)
    assert {key: answer.text for key, answer in found.items()} == {str(n): f"to {n}" for n in range(3)}
    assert vars(found["0"]) == {"text": "to 0", "finish_reason": "stop", "prompt_tokens": 3, "tokens": 2}
    path, body, _ = server.bodies[0]
    assert path == "/v1/completions"
    options = {"model": "m", "temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    assert body == {"prompt": "text", "seed": body["seed"], **options}
    messages = ({"role": "user", "content": "hello"},)
    assert ask(server, 1, prompt=messages)[0]["0"].text == "to 0"
    path, body, _ = server.bodies[-1]
    assert (path, body["messages"]) == ("/v1/chat/completions", list(messages))


def test_bounded_concurrency(server):
    ask(server, 12, concurrent=3)
    assert server.most_running == 3


def test_top_k_is_sent_if_it_is_used(server):
    ask(server, 1, top_k=20)
    assert server.bodies[-1][1]["top_k"] == 20


def test_models_are_listed_once(server):
    generator = OpenAIGenerator(ModelSpec("m", "openai", server.url, str(MODEL_PATH)))
    send(generator, [Request("0", "text", 0)], done={"0"})
    assert server.listed == 0  # no request, no check
    for key in "abc":
        send(generator, [Request(key, "text", 0)])
    assert server.listed == 1


def immediate_error(server, url=None):
    start = time.monotonic()
    found, pauses, error = ask(server, url=url)
    assert time.monotonic() - start < 2
    assert (found, pauses, server.bodies) == ({}, [], [])
    assert "\n" not in error
    return error


def test_connection_refused_is_reported_immediately(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    error = immediate_error(server, url)
    assert error.startswith(f"Cannot connect to the server at {url} (")
    assert "Connection refused). Start the server, or fix the address." in error


def test_an_unknown_host_is_reported_immediately(server, monkeypatch):
    def fail(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    error = immediate_error(server, "http://no-such-host.invalid:8000/v1")
    assert error.startswith("Cannot connect to the server at http://no-such-host.invalid:8000/v1 (")
    assert "Name or service not known). Start the server, or fix the address." in error


def test_a_model_that_is_not_served_is_reported_immediately(server):
    server.models = (200, ["qwen-72b", "me"])
    assert immediate_error(server) == (
        f"The server at {server.url} does not serve 'm'. Did you mean 'me'? It serves: 'qwen-72b', 'me'."
    )
    server.models = (200, [f"model-{number}" for number in range(30)])
    error = immediate_error(server)
    assert error.endswith("'model-8', 'model-9' ....")


def test_a_wrong_path_is_reported_immediately(server):
    root = server.url.removesuffix("/v1")
    for url in (root, f"{root}/", f"{root}/api"):
        assert immediate_error(server, url) == (
            f"The server at {url} has no API at this path (HTTP 404 for /models). The address probably lacks /v1. "
            f"Try {url.rstrip('/')}/v1."
        )


@pytest.mark.parametrize(
    "models",
    [
        (404, b'{"error": {"message": "Not found", "type": "invalid_request_error"}}'),
        (404, b"<html>Not found</html>"),  # the path contains /v1, so only this endpoint may be missing
        (405, b"Method not allowed"),
        (501, b"Not implemented"),
        (403, b'{"error": {"message": "This key may not list models"}}'),
        (500, b"oh no"),
        (200, b"<html>hello</html>"),
        (200, b"{}"),
        (200, []),
        (None, b""),
    ],
)
def test_servers_that_do_not_list_their_models_are_used(server, models):
    server.models = models
    found, pauses, error = ask(server, 3)
    assert (len(found), pauses, error) == (3, [], None)


def test_a_server_that_does_not_list_its_models_may_be_at_any_path(server):
    server.prefix, server.models = "/api", (404, b'{"error": {"message": "Not found"}}')
    assert ask(server, 1, url=server.url.replace("/v1", "/api"))[2] is None


def test_each_retry_is_logged(server, caplog):
    server.script = ["500", "429", "nonsense"]
    ask(server, 1)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[:2] == [
        "Request '0': attempt 2 of 8 in 0.5 s: HTTP 500",
        "Request '0': attempt 3 of 8 in 7 s: HTTP 429",
    ]
    assert warnings[2].startswith("Request '0': attempt 4 of 8 in 2 s: an invalid reply (")
    assert len(warnings) == 3


def test_completed_requests_are_not_sent(server):
    assert set(ask(server, 4, done={"1", "2"})[0]) == {"0", "3"}
    assert len(server.bodies) == 2


@pytest.mark.parametrize("trouble", ["429", "500", "nonsense", "empty", "null", "nothing", "half"])
def test_temporary_trouble(server, trouble):
    """Requests are sent again after a pause, and no answer is lost or duplicated."""
    server.script = [trouble, trouble]
    found, pauses, error = ask(server, 5, concurrent=1)
    assert error is None
    assert {key: answer.text for key, answer in found.items()} == {str(n): f"to {n}" for n in range(5)}
    assert pauses == ([7.0, 7.0] if trouble == "429" else [0.5, 1.0])


@pytest.mark.parametrize("trouble", ["429", "500", "nonsense", "nothing", "half"])
def test_permanent_trouble(server, trouble):
    """The error names the request and the cause, and earlier answers are returned."""
    server.script = ["ok", "ok"] + [trouble] * 50
    found, pauses, error = ask(server, 5, concurrent=1, tries=4)
    assert set(found) == {"0", "1"}
    assert len(pauses) == 3
    assert "did not answer the request '2' in 4 attempts. The last one failed with " in error
    assert "rerun the same command to resume" in error
    assert {"429": "HTTP 429", "500": "HTTP 500", "nonsense": "an invalid reply"}.get(trouble, "Connection") in error


def test_a_server_that_does_not_answer(server):
    server.script = ["hang"] * 2
    _, pauses, error = ask(server, 1, tries=2, timeout=0.3)
    assert len(pauses) == 1
    assert "The last one failed with a time-out (no complete reply in 0.3 s)." in error


def test_ctrl_c_during_a_pause_ends_the_attempts(server):
    server.script = ["500"]
    generator = OpenAIGenerator(
        ModelSpec("m", "openai", server.url, str(MODEL_PATH)), sleep=lambda pause: generator._stopping.set()
    )
    with pytest.raises(GenerationError, match="HTTP 500"):
        generator.complete(Request("0", "text", 0), Sampling())
    assert len(server.bodies) == 1


def test_a_rejected_key_is_reported_immediately_and_not_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script = ["401"]
    found, pauses, error = ask(server, 3, concurrent=1)
    assert (found, pauses) == ({}, [])
    assert server.bodies[0][2] == f"Bearer {KEY}"
    assert "HTTP 401" in error
    assert "OPENAI_API_KEY" in error
    assert KEY not in error
    assert KEY[:8] not in error


def test_the_key_is_in_no_file(server, monkeypatch, tmp_path, capfd):
    from stepdpo_trl.runs.run_directory import RunDirectory

    def task():
        yield Ask("model", (Request("a", "text", 1),))

    monkeypatch.setenv("OTHER_KEY", KEY)
    spec = ModelSpec("m", "openai", server.url, str(MODEL_PATH), api_key_env="OTHER_KEY")
    with RunDirectory(tmp_path) as run:
        log = run.log("generations")
        list(run_tasks([task()], {"model": model_service(OpenAIGenerator(spec), Sampling(), log, "collect")}))
        run.keep_settings("collect", vars(spec))
    assert server.bodies[0][2] == f"Bearer {KEY}"
    assert all(KEY not in file.read_text() for file in tmp_path.iterdir())
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("trouble", ["filtered", "half_filtered", "long"])
def test_one_refused_text_does_not_end_the_run(server, trouble):
    server.script = [trouble]
    found, pauses, error = ask(server, 5)
    assert (len(found), pauses, error) == (5, [], None)
    assert sorted(answer.finish_reason for answer in found.values()) == ["refused"] + ["stop"] * 4


def test_the_run_ends_if_all_texts_are_refused(server):
    server.script = ["long"] * 30
    found, _, error = ask(server, 30)
    assert not found
    assert "maximum context length is 64 tokens" in error
    assert len(server.bodies) < 12


def test_a_lone_surrogate_is_replaced(server):
    server.script = ["half_character"]
    assert ask(server, 1)[0]["0"].text.encode().decode() == "\ufffd 0"


def test_requests_in_flight_are_kept_at_ctrl_c(server, caplog):
    def interrupt():
        while len(server.bodies) < 4:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    generator = OpenAIGenerator(ModelSpec("m", "openai", server.url, str(MODEL_PATH), max_concurrent_requests=2))
    threading.Thread(target=interrupt).start()
    kept, error = send(generator, [Request(str(n), "text", n) for n in range(20)])
    assert isinstance(error, KeyboardInterrupt)
    assert 4 <= len(kept) == len(server.bodies) < 20
    assert "Stopping: waiting up to 1 s for" in caplog.text
