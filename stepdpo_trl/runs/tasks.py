"""
Tasks whose requests to models and answer checkers run concurrently and are stored on disk.

A task is a generator function written as plain sequential code: it yields an [`Ask`], receives the replies by key, and
returns its result. Many tasks run at the same time, see [`~stepdpo_trl.runs.scheduler`].

Replies are stored on disk under their key before a task receives them, and a task requests the same keys whenever it
runs. An interrupted run is therefore resumed by running its tasks again: stored replies are read, and only the missing
ones are requested.
"""

import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Generator as Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..data.answers import AnswerChecker, Check, cause_of
from ..data.checkers import MATH, Checker
from ..generation import Completion, Generator, Request, Sampling, ServerGenerator
from .log import Log
from .scheduler import Scheduler
from .workers import StreamingService

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    """
    A local model or a person that answers the requests of tasks in rounds.

    A service may also have a method `answer_in_parts`, which yields the replies as they arrive, a method `stored`,
    which returns a reply that tasks may receive before the next round, and an attribute `answered`, the number of
    requests that this process has answered without a stored reply. Servers and answer checkers are instances of
    [`~stepdpo_trl.runs.workers.StreamingService`] instead.
    """

    def answer(self, requests: Sequence[Any]) -> Mapping[str, Any]:
        """
        Answer requests.

        Args:
            requests (`Sequence`):
                The requests. Each has an attribute `key`.

        Returns:
            `Mapping[str, Any]`: The replies, by key.
        """


def run_tasks(
    tasks: Iterable[Task[T]],
    services: Mapping[str, Service | StreamingService],
    progress: Callable[[int, bool], None] | None = None,
) -> Iterator[T]:
    """
    Run tasks to completion.

    If an error ends the run, the replies to all requests in flight are stored first. After Ctrl-C, those that arrive
    within a second are. Callers that use the results in a loop should close the iterator when the loop ends
    (`contextlib.closing`), for the same reason.

    Args:
        tasks (`Iterable[Task]`):
            The tasks.
        services (`Mapping[str, Service]`):
            The services that the tasks use, by name.
        progress (`Callable[[int, bool], None]`, *optional*):
            Function that is called often, with the number of tasks that have ended since the last call, and whether
            they needed stored replies only. Once this process has answered a request, such tasks are like the others.

    Yields:
        `Any`: The results, in the order of the tasks.
    """
    return Scheduler(tasks, services, progress).run()


def replay(task: Task[T], stored: Mapping[str, Callable[[Any], Any]]) -> T:
    """
    Run a task that has been completed before.

    Args:
        task (`Task`):
            The task.
        stored (`Mapping[str, Callable[[Any], Any]]`):
            For each service that the task uses, a function that returns the stored reply to a request.

    Returns:
        `Any`: The result.
    """
    replies = None
    try:
        while True:
            ask = task.send(replies)  # type: ignore[arg-type]
            replies = {request.key: stored[ask.service](request) for request in ask.requests}
    except StopIteration as stop:
        result: T = stop.value
        return result


def read_completion(log: Log, key: str) -> Completion:
    """Read a stored completion."""
    record = log[key]
    return Completion(**{name: record[name] for name in Completion.__dataclass_fields__})


def model_service(
    generator: Generator | ServerGenerator,
    sampling: Sampling,
    log: Log,
    stage: str,
    on_reply: Callable[[], None] | None = None,
) -> "RecordedModel | RecordedServer":
    """
    Make the service of a model. Its completions are stored, so that no request is sent twice.

    Args:
        generator (`Generator` or `ServerGenerator`):
            The model.
        sampling (`Sampling`):
            Sampling parameters.
        log (`Log`):
            Log for the completions.
        stage (`str`):
            Name of the pipeline stage. It is stored with each completion.
        on_reply (`Callable[[], None]`, *optional*):
            Function to call before completions are stored.

    Returns:
        `RecordedModel` or `RecordedServer`: The service.
    """
    kind = RecordedServer if isinstance(generator, ServerGenerator) else RecordedModel
    return kind(generator, sampling, log, stage, on_reply)


class _RecordedCompletions:
    """Completions of a model in a log, see [`model_service`]."""

    def __init__(
        self,
        generator: Any,
        sampling: Sampling,
        log: Log,
        stage: str,
        on_reply: Callable[[], None] | None = None,
    ) -> None:
        self.generator, self.sampling, self.log, self.stage, self.on_reply = generator, sampling, log, stage, on_reply
        self.answered = self.tokens = 0  # requests, and generated tokens, of this process

    def _store(self, replies: Sequence[tuple[Request, Completion]]) -> dict[str, Completion]:
        if replies and self.on_reply is not None:
            self.on_reply()
        if replies:
            self.log.extend((request.key, {"stage": self.stage, **vars(reply)}) for request, reply in replies)
        self.answered += len(replies)
        self.tokens += sum(completion.tokens for _, completion in replies)
        return {request.key: completion for request, completion in replies}

    def _read(self, key: str) -> Completion:
        return read_completion(self.log, key)


class RecordedModel(_RecordedCompletions):
    """
    Service of a model that generates in batches, see [`model_service`].

    Completions of other pipeline stages are read from the log. Requests that this stage completed before it was
    interrupted are passed to the generator as done, so that it forms the same batches as in an uninterrupted run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: set[str] = set()  # requests of earlier rounds and the current one

    def stored(self, request: Request) -> Completion | None:
        """Return a completion of another stage or of an earlier round, if there is one."""
        if request.key in self.log and (self._is_of_other_stage(request) or request.key in self.seen):
            return self._read(request.key)
        return None

    def _is_of_other_stage(self, request: Request) -> bool:
        return bool(self.log.get(request.key, {}).get("stage", self.stage) != self.stage)

    def answer_in_parts(self, requests: Sequence[Request]) -> Iterator[dict[str, Completion]]:
        """
        Complete requests, and read those that are completed already.

        Args:
            requests (`Sequence[Request]`):
                The requests.

        Yields:
            `dict[str, Completion]`: Completions, by key. They are stored.

        Raises:
            GenerationError: If the model fails. Earlier completions are stored.
        """
        batch = [r for r in requests if r.key not in self.seen and not self._is_of_other_stage(r)]
        self.seen.update(request.key for request in requests)
        yield {request.key: self._read(request.key) for request in requests if request.key in self.log}
        if any(request.key not in self.log for request in batch):
            for part in self.generator.generate(batch, self.sampling, self.log):
                yield self._store(part)

    def answer(self, requests: Sequence[Request]) -> dict[str, Completion]:
        """Complete requests as in [`RecordedModel.answer_in_parts`], and return all completions by key."""
        return {key: reply for part in self.answer_in_parts(requests) for key, reply in part.items()}


class RecordedServer(_RecordedCompletions, StreamingService):
    """Service of a model on a server, which answers many requests at the same time, see [`model_service`]."""

    @property
    def threads(self) -> int:  # type: ignore[override]
        """Number of requests that the server receives at the same time."""
        return int(self.generator.concurrent)

    def prepare(self) -> None:
        """Check that the server can be used."""
        self.generator.prepare()

    def stored(self, request: Request) -> Completion | None:
        """Return the completion of a request that was sent before."""
        return self._read(request.key) if request.key in self.log else None

    def work(self, requests: Sequence[Request]) -> list[Completion]:
        """Send requests."""
        return [self.generator.complete(request, self.sampling) for request in requests]

    def keep(self, replies: Sequence[tuple[Request, Completion]]) -> dict[str, Completion]:
        """Store completions, except refusals of which the generator is not sure yet."""
        return self._store(self.generator.accept(replies))

    def flush(self) -> dict[str, Completion]:
        """Store the refusals that were held back."""
        return self._store(self.generator.release())

    def interrupt(self) -> None:
        """Send no request again."""
        self.generator.interrupt()

    def abandon(self) -> None:
        """End all requests."""
        self.generator.abandon()


@dataclass(frozen=True)
class CheckRequest:
    """
    A solution to check.

    Args:
        key (`str`):
            Unique name within the run.
        problem (`Mapping[str, Any]`):
            The problem, as a row with the columns that the checker reads.
        text (`str`):
            The solution.
    """

    key: str
    problem: Mapping[str, Any]
    text: str


class RecordedChecks(StreamingService):
    """
    Service of the answer checker. Outcomes are stored, since checks can be slow and time-outs not reproducible.

    An outcome is stored with a digest of checker, problem and solution, and counts for these only: if a solution, the
    gold answer or the code of a checker changes, the solution is checked again.

    Args:
        pool (`AnswerChecker`):
            The processes that check.
        log (`Log`):
            Log for the outcomes.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker.
    """

    # One thread keeps the outcomes in the order of the requests. The checker itself uses several processes.
    threads = 1
    chunk = 256

    def __init__(self, pool: AnswerChecker, log: Log, checker: Checker = MATH) -> None:
        self.pool, self.log, self.checker = pool, log, checker
        self.answered = 0  # requests of this process
        self._failures: Counter[str] = Counter()
        self._example = ""
        self._stop = threading.Event()

    def stored(self, request: CheckRequest) -> Check | None:
        """Return the outcome of an earlier check of the same solution."""
        record = self.log.get(request.key)
        if record is None or record.get("digest") != self._digest(request):
            return None
        check = Check(**{name: value for name, value in record.items() if name != "digest"})
        self._count(request, check)
        return check

    def work(self, requests: Sequence[CheckRequest]) -> list[Check]:
        """Check solutions."""
        return self.pool.check([(request.problem, request.text) for request in requests], self.checker, self._stop)

    def keep(self, replies: Sequence[tuple[CheckRequest, Check]]) -> dict[str, Check]:
        """Store outcomes. After an interruption, those of failed checks are left out."""
        if self._stop.is_set():  # the signal may have ended the checking processes too
            replies = [(request, check) for request, check in replies if not check.failed]
        self.answered += len(replies)
        self.log.extend((request.key, self.record(request, check)) for request, check in replies)
        for request, check in replies:
            self._count(request, check)
        return {request.key: check for request, check in replies}

    def interrupt(self) -> None:
        """Stop checking. The solutions are checked when the run resumes."""
        self._stop.set()

    def report(self) -> None:
        """Warn about checks that failed."""
        if self._failures:
            counts = ", ".join(f"{count:,} times {reason}" for reason, count in self._failures.most_common())
            logger.warning(
                f"The checker {self.checker.name!r} failed on {self._failures.total():,} solutions, which count as "
                f"unreadable: {counts}. Example: {self._example}"
            )

    def _count(self, request: CheckRequest, check: Check) -> None:
        if check.failed:
            self._failures[cause_of(check.reason)] += 1
            self._example = self._example or f"{request.key}: {check.reason}"

    def record(self, request: CheckRequest, check: Check) -> dict[str, Any]:
        """Return the record of an outcome."""
        failed = {"failed": True} if check.failed else {}
        kept = {"outcome": check.outcome, "answer": check.answer, "reason": check.reason, **failed}
        return {**kept, "digest": self._digest(request)}

    def _digest(self, request: CheckRequest) -> str:
        read = request.problem if self.checker.custom else request.problem["answer"]
        checked = [self.checker.name, self.checker.digest, read, request.text]
        return hashlib.sha256(json.dumps(checked, sort_keys=True).encode()).hexdigest()[:16]


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
