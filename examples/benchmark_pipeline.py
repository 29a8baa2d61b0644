"""
Share of a server's slots that the data pipeline keeps busy, measured with a simulated server.

    python examples/benchmark_pipeline.py                      # all settings below, about 40 minutes
    python examples/benchmark_pipeline.py --slots 64 --ms 5 --problems 800 --num_samples 2 --tail 0.02

The server answers as many requests at the same time as it has slots. An answer takes its number of tokens times
`--ms`, and with `--tail 0.02`, 2% of the answers take twenty times as long. The share counts from the first request of
a stage to its last answer, so it includes the wait for the last answers, when there is nothing left to send.

The column "bound" is the limit for a client that needs no time itself: a stage takes at least the total time of its
answers divided by the slots, and at least as long as the longest chain of answers of one task that depend on each
other. The column "half" is the progress at half of the time, without the tasks whose answers were all stored before.

The answers depend on the seeds of the requests only. 30% are right. The others contain one false equation, so that
`rectify` can use the verdicts of the judge `arithmetic`, independently of `localize` with the judge `rollout`.
"""

import argparse
import asyncio
import contextlib
import heapq
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SETTINGS = [  # slots, milliseconds per token, tail, problems, samples per problem
    (64, 5.0, 0.0, 800, 2),
    (64, 5.0, 0.02, 800, 2),
    (256, 20.0, 0.0, 400, 2),
    (256, 20.0, 0.02, 400, 2),
    (256, 20.0, 0.0, 400, 16),
]


def write_answer(seed: int, written: int) -> tuple[str, int]:
    """Return the text of an answer that follows `written` steps, and its number of tokens."""
    rng = random.Random(seed)
    steps = max(1, rng.randrange(4, 10) - written)
    right = rng.random() < 0.3
    false_step = None if right else rng.randrange(steps)
    lines = []
    for index in range(steps):
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        lines.append(f" {a} + {b} = {a + b + (index == false_step)}.\nStep {written + index + 1}:")
    answer = 42 if right else rng.randrange(100, 1000)
    return "".join(lines) + f" The answer is \\boxed{{{answer}}}.", steps * 40 + int(rng.expovariate(1 / 40))


def answer_seconds(seed: int, tokens: int, ms: float, tail: float) -> float:
    """Return the time that an answer takes."""
    slow = random.Random(seed + 1).random() < tail
    return tokens * ms / 1000 * (20 if slow else 1)


class SimulatedServer:
    """
    OpenAI-compatible server with simulated latency.

    Args:
        slots (`int`):
            Number of answers at the same time. Other requests wait.
        ms (`float`):
            Milliseconds per token.
        tail (`float`, *optional*, defaults to `0.0`):
            Share of answers that take twenty times as long.
    """

    def __init__(self, slots: int, ms: float, tail: float = 0.0) -> None:
        self.slots, self.ms, self.tail = slots, ms, tail
        self.free = asyncio.Semaphore(slots)
        self.started = self.ended = self.busy = 0.0
        self.answers = 0

    async def complete(self, request: dict) -> dict:
        """Answer a request in a free slot."""
        self.started = self.started or time.monotonic()
        text, tokens = write_answer(request["seed"], request["prompt"].count("Step "))
        seconds = answer_seconds(request["seed"], tokens, self.ms, self.tail)
        async with self.free:
            await asyncio.sleep(seconds)
        self.busy += seconds
        self.ended = time.monotonic()
        self.answers += 1
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens}
        return {"id": "0", "object": "text_completion", "created": 0, "model": "simulated"} | {
            "choices": [choice],
            "usage": usage,
        }

    def statistics(self) -> dict:
        """Return the statistics since the last call."""
        seconds = self.ended - self.started
        found = {"answers": self.answers, "seconds": seconds, "busy": self.busy / (self.slots * (seconds or 1))}
        self.started = self.ended = self.busy = 0.0
        self.answers = 0
        return found

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split("\r\n")[0] or 0)
                body = await reader.readexactly(length)
                path = head.split(" ", 2)[1]
                if path.endswith("/models"):
                    reply = {"object": "list", "data": [{"id": "simulated", "object": "model"}]}
                elif path.endswith("/statistics"):
                    reply = self.statistics()
                else:
                    reply = await self.complete(json.loads(body))
                content = json.dumps(reply).encode()
                header = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
                writer.write(header.encode() + content)
                await writer.drain()
        writer.close()


async def serve(slots: int, ms: float, tail: float) -> None:
    """Serve on a free port, and print it."""
    server = await asyncio.start_server(SimulatedServer(slots, ms, tail).serve, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def simulated_server(slots: int, ms: float, tail: float = 0.0) -> Iterator[str]:
    """Start a simulated server in another process, and yield its address."""
    options = ["--slots", str(slots), "--ms", str(ms), "--tail", str(tail), "--serve"]
    with subprocess.Popen([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


class UnlimitedSlots:
    """
    Run tasks in simulated time, at a server with a slot for each request, and with a client that needs no time.

    Args:
        answer (`Callable`):
            Function that returns the reply to a request and its duration in seconds.
    """

    def __init__(self, answer: Callable[[Any], tuple[Any, float]]) -> None:
        self.answer = answer
        self.collected: dict[str, Any] = {}  # answers of the first stage, which the others find in their run folders
        self.time = self.total = 0.0

    def bound(self, slots: int) -> float:
        """Return the highest possible share of busy slots of the last stage."""
        return self.total / max(self.total, slots * self.time)

    def run_tasks(self, tasks: Iterable[Any], services: Any, progress: Any = None) -> Iterator[Any]:
        """Run tasks, in place of [`~stepdpo_trl.runs.tasks.run_tasks`]."""
        self.time = self.total = 0.0
        started = list(tasks)
        results: dict[int, Any] = {}
        asked: dict[int, Any] = {}  # what each task waits for
        askers: dict[str, list[int]] = {}
        replies = dict(self.collected)
        running: list[tuple[float, str, Any]] = []  # end, key and answer of each request

        def advance(index: int, received: Any) -> None:
            """Run a task until it has to wait."""
            try:
                ask = started[index].send(received)
                while ask.service == "check" or all(request.key in replies for request in ask.requests):
                    check = ask.service == "check"
                    found = {r.key: check_solution(r.text) if check else replies[r.key] for r in ask.requests}
                    ask = started[index].send(found)
            except StopIteration as stop:
                results[index] = stop.value
                return
            asked[index] = ask.requests
            for request in ask.requests:
                if request.key not in replies:
                    if request.key not in askers:
                        answer, seconds = self.answer(request)
                        self.total += seconds
                        heapq.heappush(running, (self.time + seconds, request.key, answer))
                    askers.setdefault(request.key, []).append(index)

        for index in range(len(started)):
            advance(index, None)
        while running:
            self.time, key, answer = heapq.heappop(running)
            replies[key] = answer
            for index in askers.pop(key):
                if all(request.key in replies for request in asked[index]):
                    advance(index, {request.key: replies[request.key] for request in asked[index]})
        self.collected = self.collected or replies
        yield from (results[index] for index in sorted(results))


class Ends:
    """Times at which the tasks of a stage end."""

    def half(self) -> float:
        """Return the share of the tasks that have ended at half of the time."""
        middle = (self.start + self.times[-1]) / 2
        return sum(end <= middle for end in self.times) / len(self.times)

    def run_tasks(self, tasks: Iterable[Any], services: Any, progress: Callable[[int, bool], None]) -> Iterator[Any]:
        """Run tasks, in place of [`~stepdpo_trl.runs.tasks.run_tasks`]."""
        from stepdpo_trl.runs.tasks import run_tasks

        self.start, self.times = 0.0, list[float]()

        def record(ended: int, stored: bool) -> None:
            progress(ended, stored)
            if not stored:
                self.start = self.start or time.monotonic()
                self.times += [time.monotonic()] * ended

        yield from run_tasks(tasks, services, record)


def check_solution(text: str) -> Any:
    """Check a solution of the simulated server."""
    from stepdpo_trl.data.answers import RIGHT, WRONG, Check

    return Check(RIGHT if text.endswith("\\boxed{42}.") else WRONG, "")


def run_stages(session: Any, folder: Path, model: Any, problems: list, num_samples: int) -> Iterator[str]:
    """Run the stages, and yield the name of each after it has ended."""
    from stepdpo_trl.data.prompts import StepPrompt
    from stepdpo_trl.generation import Sampling
    from stepdpo_trl.pipeline.judge_options import JudgeOptions

    prompt = StepPrompt("{{ problem }}", "Step 1:")
    changes = {"base_url": model.base_url, "max_concurrent_requests": model.max_concurrent_requests}
    run, other = folder / "run", folder / "other"
    session.collect(run, problems, "simulated", model, prompt, Sampling(), num_samples)
    yield "collect"
    shutil.copytree(run, other)
    session.localize(run, "rollout", JudgeOptions(), changes)
    yield "localize rollout"
    session.localize(other, "arithmetic", JudgeOptions(), changes)
    session.rectify(other, model=changes)
    yield "rectify"


def measure(slots: int, ms: float, tail: float, num_problems: int, num_samples: int) -> None:
    """Print the table of one setting."""
    from stepdpo_trl.generation import Completion, ModelSpec
    from stepdpo_trl.pipeline.records import Problem
    from stepdpo_trl.pipeline.session import Session
    from stepdpo_trl.quickstart import MODEL_PATH
    from stepdpo_trl.runs import runner

    def answer(request: Any) -> tuple[Completion, float]:
        seed = request.seed % 2**31  # as the client sends it
        text, tokens = write_answer(seed, request.prompt.count("Step "))
        return Completion(text, "stop", 100, tokens), answer_seconds(seed, tokens, ms, tail)

    problems = [Problem(str(number), f"Problem {number}?", "42") for number in range(num_problems)]
    with simulated_server(slots, ms, tail) as address, tempfile.TemporaryDirectory() as folder, Session() as session:
        model = ModelSpec("simulated", "openai", address, str(MODEL_PATH), max_concurrent_requests=slots)
        unlimited, ends = UnlimitedSlots(answer), Ends()
        with mock.patch.object(runner, "run_tasks", unlimited.run_tasks):
            stages = run_stages(session, Path(folder) / "simulated", model, problems, num_samples)
            bounds = {stage: unlimited.bound(slots) for stage in stages}
        with mock.patch.object(runner, "run_tasks", ends.run_tasks):
            for stage in run_stages(session, Path(folder) / "real", model, problems, num_samples):
                with urllib.request.urlopen(f"{address}/statistics") as reply:
                    found = json.load(reply)
                print(
                    f"{slots:>5} {ms:>9g} {tail:>6.0%} {num_problems:>9} {num_samples:>8}  {stage:<18}"
                    f"{found['answers']:>8,}{found['seconds']:>9.1f}{found['busy']:>9.1%}{bounds[stage]:>9.1%}"
                    f"{ends.half():>7.0%}",
                    flush=True,
                )


def main() -> None:
    """Read the arguments, and measure or serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, help="answers at the same time")
    parser.add_argument("--ms", type=float, default=5.0, help="milliseconds per token (%(default)s)")
    parser.add_argument("--tail", type=float, default=0.0, help="share of slow answers (%(default)s)")
    parser.add_argument("--problems", type=int, default=800, help="(%(default)s)")
    parser.add_argument("--num_samples", type=int, default=2, help="samples per problem (%(default)s)")
    parser.add_argument("--serve", action="store_true", help="only start the server, and print its port")
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.slots or 64, args.ms, args.tail))
        return
    os.environ.setdefault("TQDM_DISABLE", "1")
    settings = [(args.slots, args.ms, args.tail, args.problems, args.num_samples)] if args.slots else SETTINGS
    print("slots  ms/token   tail  problems  samples  stage              answers  seconds     busy    bound   half")
    for setting in settings:
        measure(*setting)


if __name__ == "__main__":
    main()
