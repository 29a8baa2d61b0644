"""
Scheduler of tasks whose requests to models are batched across tasks and stored on disk.

A task is a generator function written as plain sequential code: it yields an [`Ask`], receives the replies by key, and
returns its result. The requests of all waiting tasks are answered together.

Replies are stored on disk under their key before a task receives them, and a task requests the same keys whenever it
runs. An interrupted run is therefore resumed by running its tasks again: stored replies are read, and only the missing
ones are requested.
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
WINDOW = 1024  # maximum number of concurrent tasks


@dataclass(frozen=True)
class Ask:
    """
    Requests of a task to a service.

    Args:
        service (`str`):
            Name of the [`Service`].
        requests (`tuple`):
            The requests. Each has an attribute `key`.
    """

    service: str
    requests: tuple[Any, ...]


Task = Coroutine[Ask, Mapping[str, Any], T]


class Service(Protocol):
    """A model, an answer checker or a person that answers the requests of tasks."""

    def answer(self, requests: Sequence[Any]) -> Mapping[str, Any]:
        """
        Answer requests.

        Args:
            requests (`Sequence`):
                The requests. Each has an attribute `key`.

        Returns:
            `Mapping[str, Any]`: The replies, by key.
        """


def run_tasks(tasks: Iterable[Task[T]], services: Mapping[str, Service]) -> Iterator[T]:
    """
    Run tasks to completion, at most [`WINDOW`] of them concurrently.

    Args:
        tasks (`Iterable[Task]`):
            The tasks.
        services (`Mapping[str, Service]`):
            The services that the tasks use, by name.

    Yields:
        `Any`: The results of the tasks, as soon as they are available. Their order is deterministic.
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
            requested: dict[str, dict[str, Any]] = defaultdict(dict)
            for _, ask in waiting:
                requested[ask.service].update({request.key: request for request in ask.requests})
            answers = {
                service: services[service].answer(list(requests.values())) for service, requests in requested.items()
            }
            replies = [
                (task, {request.key: answers[ask.service][request.key] for request in ask.requests})
                for task, ask in waiting
            ]


class RecordedModel:
    """
    Service of a model. Its completions are stored, so that no request is sent twice.

    Completions of other pipeline stages are read from the log. Requests that this stage completed before it was
    interrupted are passed to the generator as done, so that it forms the same batches as in an uninterrupted run.

    Args:
        generator (`Generator`):
            The model.
        sampling (`Sampling`):
            Sampling parameters.
        log (`Log`):
            Log for the completions.
        name (`str`):
            Name of the progress bar.
        stage (`str`):
            Name of the pipeline stage. It is stored with each completion.
    """

    def __init__(self, generator: Generator, sampling: Sampling, log: Log, name: str, stage: str) -> None:
        self.generator, self.sampling, self.log, self.name, self.stage = generator, sampling, log, name, stage
        self.seen: set[str] = set()

    def answer(self, requests: Sequence[Request]) -> dict[str, Completion]:
        """
        Complete requests, and read those that are completed already.

        Args:
            requests (`Sequence[Request]`):
                The requests.

        Returns:
            `dict[str, Completion]`: The completions, by key.

        Raises:
            GenerationError: If the model fails. Earlier completions are stored.
        """
        batch = [
            request
            for request in requests
            if request.key not in self.seen
            and self.log.get(request.key, {"stage": self.stage}).get("stage") == self.stage
        ]
        self.seen.update(request.key for request in requests)
        missing = sum(request.key not in self.log for request in batch)
        if missing:
            with progress_bar(total=missing, desc=f"  {self.name}", unit=" samples", leave=False, position=1) as bar:
                tokens = 0
                for part in self.generator.generate(batch, self.sampling, self.log):
                    self.log.extend((request.key, {"stage": self.stage, **vars(reply)}) for request, reply in part)
                    tokens += sum(completion.tokens for _, completion in part)
                    bar.update(len(part))
                    bar.set_postfix({"tokens/s": round(tokens / max(bar.format_dict["elapsed"], 1e-9))})
        fields = Completion.__dataclass_fields__
        return {r.key: Completion(**{name: self.log[r.key][name] for name in fields}) for r in requests}


@dataclass(frozen=True)
class CheckRequest:
    """
    A solution to compare with a gold answer.

    Args:
        key (`str`):
            Unique name within the run.
        gold (`str`):
            The gold answer.
        text (`str`):
            The solution.
    """

    key: str
    gold: str
    text: str


class RecordedChecks:
    """
    Service of the answer checker. Outcomes are stored, since checks can be slow and time-outs not reproducible.

    Args:
        checker (`AnswerChecker`):
            The answer checker.
        log (`Log`):
            Log for the outcomes.
    """

    def __init__(self, checker: AnswerChecker, log: Log) -> None:
        self.checker, self.log = checker, log

    def answer(self, requests: Sequence[CheckRequest]) -> dict[str, Check]:
        """
        Check solutions, and read the outcomes of those that are checked already.

        Args:
            requests (`Sequence[CheckRequest]`):
                The solutions.

        Returns:
            `dict[str, Check]`: The outcomes, by key.
        """
        todo = [request for request in requests if request.key not in self.log]
        for start in range(0, len(todo), 256):
            part = todo[start : start + 256]
            checks = self.checker.check((request.gold, request.text) for request in part)
            self.log.extend((request.key, vars(check)) for request, check in zip(part, checks, strict=True))
        return {request.key: Check(**self.log[request.key]) for request in requests}


def seed_of(seed: int, key: str) -> int:
    """
    Derive the random seed of a request.

    Args:
        seed (`int`):
            Seed of the run.
        key (`str`):
            Key of the request.

    Returns:
        `int`: The seed, below 2**56.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")
