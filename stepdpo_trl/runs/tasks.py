"""
Many tasks side by side: each asks and waits in plain sequential code, and what all of them ask at a time is asked at
once.

A task is a generator function: it yields an [`Ask`], is sent the replies by key, and returns its result. Replies of
models are on disk before a task sees them, under their key, and a task asks for the same keys whenever it is run. So a
run that was stopped is simply run again: what had been answered is read, the rest is asked.
"""

import hashlib
from collections import defaultdict
from collections.abc import Generator as Coroutine
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from ..data.answers import AnswerChecker, Check
from ..generation import Completion, Generator, Request, Sampling
from .progress import progress_bar
from .run_directory import Log

T = TypeVar("T")
WINDOW = 1024  # tasks side by side


@dataclass(frozen=True)
class Ask:
    """
    What a task asks.

    Args:
        service (`str`):
            Name of a [`Service`].
        requests (`tuple`):
            The requests, each with a `key`.
    """

    service: str
    requests: tuple[Any, ...]


Task = Coroutine[Ask, Mapping[str, Any], T]


class Service(Protocol):
    """Somebody to ask."""

    def answer(self, requests: Sequence[Any]) -> Mapping[str, Any]:
        """Answer requests, by key."""


def run_tasks(tasks: Iterable[Task[T]], services: Mapping[str, Service]) -> Iterator[T]:
    """
    Run tasks to their ends, in rounds of at most [`WINDOW`] at a time.

    Args:
        tasks (`Iterable[Task]`):
            The tasks.
        services (`Mapping[str, Service]`):
            Whom they can ask.

    Returns:
        `Iterator`: Their results, as they are ready. The order depends on the tasks alone.
    """
    tasks = iter(tasks)
    while window := list(islice(tasks, WINDOW)):
        replies: list[tuple[Task[T], Mapping[str, Any] | None]] = [(task, None) for task in window]
        while replies:
            waiting: list[tuple[Task[T], Ask]] = []
            for task, reply in replies:
                try:
                    waiting.append((task, task.send(reply)))  # type: ignore[arg-type]
                except StopIteration as stop:
                    yield stop.value
            asked: dict[str, dict[str, Any]] = defaultdict(dict)
            for _, ask in waiting:
                asked[ask.service].update({request.key: request for request in ask.requests})
            answers = {
                service: services[service].answer(list(requests.values())) for service, requests in asked.items()
            }
            replies = [
                (task, {request.key: answers[ask.service][request.key] for request in ask.requests})
                for task, ask in waiting
            ]


class RecordedModel:
    """
    A model whose answers are kept on disk and never asked for twice.

    What earlier stages and rounds asked is read. What this stage asked before it was stopped is handed to the
    generator all the same, as done, so that batches are those of an unbroken run.

    Args:
        generator (`Generator`):
            The model.
        sampling (`Sampling`):
            How it is sampled.
        log (`Log`):
            Where its answers are kept.
        name (`str`):
            What to write beside the progress bar.
        stage (`str`):
            Name of the stage.
    """

    def __init__(self, generator: Generator, sampling: Sampling, log: Log, name: str, stage: str) -> None:
        self.generator, self.sampling, self.log, self.name, self.stage = generator, sampling, log, name, stage
        self.asked: set[str] = set()

    def answer(self, requests: Sequence[Request]) -> dict[str, Completion]:
        """Answer requests, from the disk where they have been answered."""
        anew = [
            request
            for request in requests
            if request.key not in self.asked
            and self.log.get(request.key, {"stage": self.stage}).get("stage") == self.stage
        ]
        self.asked.update(request.key for request in requests)
        missing = sum(request.key not in self.log for request in anew)
        if missing:
            with progress_bar(total=missing, desc=f"  {self.name}", unit=" samples", leave=False, position=1) as bar:
                tokens = 0
                for answered in self.generator.generate(anew, self.sampling, self.log):
                    records = ((request.key, {"stage": self.stage, **vars(answer)}) for request, answer in answered)
                    self.log.extend(records)
                    tokens += sum(completion.tokens for _, completion in answered)
                    bar.update(len(answered))
                    bar.set_postfix({"tokens/s": round(tokens / max(bar.format_dict["elapsed"], 1e-9))})
        fields = Completion.__dataclass_fields__
        return {r.key: Completion(**{name: self.log[r.key][name] for name in fields}) for r in requests}


@dataclass(frozen=True)
class CheckRequest:
    """A solution to compare with a gold answer."""

    key: str
    gold: str
    text: str


class RecordedChecks:
    """
    Checks answers; outcomes are kept on disk, as checks may be slow and one that ran out of time might not again.

    Args:
        checker (`AnswerChecker`):
            Who checks.
        log (`Log`):
            Where outcomes are kept.
    """

    def __init__(self, checker: AnswerChecker, log: Log) -> None:
        self.checker, self.log = checker, log

    def answer(self, requests: Sequence[CheckRequest]) -> dict[str, Check]:
        """Check, what has not been checked yet."""
        todo = [request for request in requests if request.key not in self.log]
        for start in range(0, len(todo), 256):
            part = todo[start : start + 256]
            checks = self.checker.check((request.gold, request.text) for request in part)
            self.log.extend((request.key, vars(check)) for request, check in zip(part, checks, strict=True))
        return {request.key: Check(**self.log[request.key]) for request in requests}


def seed_of(seed: int, key: str) -> int:
    """Seed of one request of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")
