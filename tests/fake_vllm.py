"""
A command `vllm` for tests, which uses the standard library only: `install` puts it into a folder for PATH.

It answers by the seed of a request (even seeds get the right answer 42) and appends its command line and every request
to `records.jsonl` in the folder that FAKE_VLLM_DIR names. FAKE_VLLM names how it fails, if it does.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RIGHT = " 6 * 7 = 42\nStep 2: 42 = 42\nThe answer is \\boxed{42}."
WRONG = " 6 * 7 = 41\nStep 2: 41 = 41\nThe answer is \\boxed{41}."
FAILURE = os.environ.get("FAKE_VLLM", "")
LOCK = threading.Lock()
REJECTED = """\
usage: vllm [-h] [-v]
            {chat,complete,serve,launch,bench,collect-env}
            ...
vllm: error: unrecognized arguments: --no-such-argument 3
"""
OUT_OF_MEMORY = """\
(EngineCore pid=7) ERROR 11-25 01:14:06 [core.py:1234] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-25 01:14:06 [core.py:1234] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-25 01:14:06 [core.py:1234]   File "core.py", line 1, in <module>
(EngineCore pid=7) ERROR 11-25 01:14:06 [core.py:1234] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB.
(EngineCore pid=7) Process EngineCore:
(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB.
(APIServer pid=6) Traceback (most recent call last):
(APIServer pid=6)   File "entry.py", line 1, in <module>
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
DEAD_ENGINE = """\
(APIServer pid=6) ERROR 11-25 01:14:06 [async_llm.py:906]     raise self._format_exception(outputs) from None
(APIServer pid=6) ERROR 11-25 01:14:06 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore \
encountered an issue. See stack trace (above) for the root cause.
INFO:     Shutting down
"""


def install(folder: Path) -> Path:
    """Write the command into `folder/bin` and return that folder."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "vllm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} "$@"\n')
    command.chmod(0o755)
    return command.parent


def session_of(leader: int) -> list[int]:
    """Return the ids of the processes in the session of a server, without zombies."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (OSError, psutil.Error):
            continue
    return found


def left_processes(folder: Path) -> list[int]:
    """Return the ids of all processes of all servers that run."""
    return [pid for started in records(folder, "started") for pid in session_of(started["pid"])]


def leave_server(model: str, folder: Path, kill_leader: bool = False):
    """Start a server in a run folder as a command that is gone has, and return it."""
    from stepdpo_trl.generation import ModelSpec, make_generator

    generator = make_generator(ModelSpec(model, "vllm"), folder)
    generator.prepare()
    file = folder / "vllm-0.pid"
    starter = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    starter.wait()
    file.write_text(json.dumps({**json.loads(file.read_text()), "owner": starter.pid}))
    server = generator._servers.pop()
    if kill_leader:
        server.process.kill()
        server.process.wait()
    return server


def records(folder: Path, kind: str) -> list[dict]:
    """Return the records of a kind, `started` or `asked`."""
    file = folder / "records.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def record(kind, **values):
    with LOCK, (Path(os.environ["FAKE_VLLM_DIR"]) / "records.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "pid": os.getpid(), **values}) + "\n")


def end_with(message, status):
    sys.stderr.write(message)
    sys.stderr.flush()
    os._exit(status)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self):
        if self.path == "/health":
            self.reply(200, {})
        else:
            self.reply(
                200,
                {"object": "list", "data": [{"id": name, "object": "model", "max_model_len": 512} for name in NAMES]},
            )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with LOCK:
            Handler.asked += 1
            number = Handler.asked
        record("asked", path=self.path, authorization=self.headers.get("authorization"), **body)
        if FAILURE == "killed" and number > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if FAILURE == "dead engine" and number > 3:
            self.reply(500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}})
            time.sleep(0.3)
            end_with(DEAD_ENGINE, 0)
        if FAILURE == "hangs" and number > 3:
            time.sleep(600)
        time.sleep(0.02)
        text = RIGHT if body["seed"] % 2 == 0 else WRONG
        choice = {"index": 0, "finish_reason": "stop", "text": text}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 9, "total_tokens": 9}
        kind = {"id": "1", "object": "text_completion", "created": 1, "model": body["model"]}
        self.reply(200, {**kind, "choices": [choice], "usage": usage})

    def reply(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def main():
    words = sys.argv[1:]
    record("started", words=words, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), key=os.environ.get("VLLM_API_KEY"))
    if "--no-such-argument" in words:
        end_with(REJECTED, 2)
    if FAILURE == "out of memory":
        end_with(OUT_OF_MEMORY, 1)
    subprocess.Popen([sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)", "VLLM::Worker"])
    print("(APIServer pid=6) INFO 11-25 01:14:06 [entry.py:1] Loading weights", flush=True)
    if FAILURE == "never ready":
        time.sleep(600)
    ThreadingHTTPServer.request_queue_size = 512
    server = ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # leaves its worker to the one who stops it
    server.serve_forever(0.01)


if __name__ == "__main__":
    NAMES = [sys.argv[2]]
    if "--lora-modules" in sys.argv:
        NAMES.append(json.loads(sys.argv[sys.argv.index("--lora-modules") + 1])["name"])
    main()
