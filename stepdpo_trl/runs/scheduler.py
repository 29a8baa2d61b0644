"""
Scheduler: runs tasks concurrently and resumes each one as soon as its own replies have arrived.

The thread that calls the scheduler owns the tasks and the logs. It never waits for a particular reply: streaming
services answer in worker threads, which take requests from a queue and put replies into another one. Threads rather
than asyncio, because tasks and judges are plain generator functions, and clients and answer checkers block.

Services without streaming, such as a model in this process, answer in rounds. A round starts when nothing else can
happen: every task waits for such a service, and no reply is on its way. So its requests, and the batches that are made
of them, depend on the tasks and on stored replies, but not on the clock.
"""

import contextlib
import logging
import math
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from .tasks import Service, Task

T = TypeVar("T")
WINDOW = 1024  # maximum number of concurrent tasks
# With a streaming service: tasks per thread. The tasks that start last are alone at the end of a stage, and too few to
# use all threads. So most of a stage should be under way before that.
TASKS_PER_THREAD = 64
GRACE = 1.0  # seconds after Ctrl-C in which answers may still arrive

logger = logging.getLogger(__name__)


class StreamingService:
    """
    Base class of services that answer each request as soon as possible, in worker threads.

    `work` runs in these threads, everything else in the thread of the scheduler.

    Attributes:
        threads (`int`): Maximum number of concurrent calls of `work`.
        chunk (`int`): Maximum number of requests per call.
    """

    threads = 1
    chunk = 1

    def prepare(self) -> None:
        """Get ready for the first request."""

    def stored(self, request: Any) -> Any:
        """Return the stored reply to a request, or `None`."""
        raise NotImplementedError

    def work(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Answer requests, without storing the replies."""
        raise NotImplementedError

    def keep(self, replies: Sequence[tuple[Any, Any]]) -> Mapping[str, Any]:
        """Store requests with their replies, and return the replies that tasks may see, by key."""
        raise NotImplementedError

    def flush(self) -> Mapping[str, Any]:
        """Store and return the replies that `keep` has held back. Called when no request is in flight."""
        return {}

    def interrupt(self) -> None:
        """Complete the requests in flight as fast as possible, since the run ends."""

    def abandon(self) -> None:
        """End the requests in flight at once. Their replies are not needed any more."""

    def report(self) -> None:
        """Log what the user should know at the end of a stage."""


class Workers:
    """
    Threads that answer the requests to a streaming service, in the order of submission.

    They are daemons, so that the process can end even if a call never returns.

    Args:
        service ([`StreamingService`]):
            The service.
        wake (`queue.SimpleQueue`):
            Queue that receives an entry with each arrival.
    """

    def __init__(self, service: StreamingService, wake: "queue.SimpleQueue[None]") -> None:
        self.service, self._wake = service, wake
        self.in_flight: dict[str, Any] = {}  # requests that are queued or being answered, by key
        # Requests and their replies. The exception of a failed call takes the place of the replies. No more requests
        # are answered then: those that are queued have the replies `None`.
        self.arrived: deque[tuple[list[Any], Any]] = deque()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = 0
        self._stopped = False

    def submit(self, request: Any) -> None:
        """Queue a request."""
        self._queue.put(request)
        self.in_flight[request.key] = request
        if self._threads < min(self.service.threads, len(self.in_flight)):
            self._threads += 1
            threading.Thread(target=self._run, daemon=True).start()

    def discard(self) -> None:
        """Remove the requests that no thread has taken yet."""
        self._stopped = True
        for request in self._take(len(self.in_flight)):
            self.in_flight.pop(request.key, None)

    def close(self) -> None:
        """End the threads, each after the requests that it has taken."""
        self._queue.put(None)

    def _take(self, most: int) -> list[Any]:
        taken: list[Any] = []
        try:
            while len(taken) < most:
                taken.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return taken

    def _run(self) -> None:
        while True:
            taken = [self._queue.get(), *self._take(self.service.chunk - 1)]
            requests = [request for request in taken if request is not None]
            if len(requests) < len(taken):
                self._queue.put(None)  # for the other threads
            if not requests:
                return
            replies: Any = None
            if not self._stopped:
                try:
                    replies = self.service.work(requests)
                except BaseException as error:
                    replies, self._stopped = error, True
            self.arrived.append((requests, replies))
            self._wake.put(None)


@dataclass
class _Waiting(Generic[T]):
    """A task that waits for replies."""

    task: "Task[T]"
    missing: set[str]
    replies: dict[str, Any]


class Scheduler(Generic[T]):
    """
    Execution of tasks, see [`~stepdpo_trl.runs.tasks.run_tasks`].

    Args:
        tasks (`Iterable[Task]`):
            The tasks.
        services (`Mapping[str, Service]`):
            The services, by name.
        progress (`Callable`, *optional*):
            Function that is called with the number of tasks that have ended since the last call.
    """

    def __init__(
        self,
        tasks: "Iterable[Task[T]]",
        services: "Mapping[str, Service | StreamingService]",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._tasks = enumerate(tasks)
        self._services, self._progress = services, progress
        self._window = WINDOW
        self._active = 0  # tasks that have started and not ended
        self._ready: deque[tuple[int, Task[T], Mapping[str, Any] | None]] = deque()
        self._waiting: dict[int, _Waiting[T]] = {}
        self._askers: dict[tuple[str, str], list[int]] = {}
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._workers: dict[str, Workers] = {}
        self._unsaved: dict[str, dict[str, tuple[Any, Any]]] = defaultdict(dict)  # replies by service and key
        self._asked: dict[str, dict[str, tuple[tuple[int, int], Any]]] = defaultdict(dict)  # for the next rounds
        self._round: Iterator[Mapping[str, Any]] | None = None
        self._service_of_round = ""
        self._results: dict[int, T] = {}
        self._next_result = 0
        for name, service in services.items():
            if isinstance(service, StreamingService):
                self._workers[name] = Workers(service, self._wake)
                self._window = max(self._window, TASKS_PER_THREAD * service.threads)

    def run(self) -> Iterator[T]:
        """Yield the results of the tasks, in the order of the tasks."""
        try:
            while True:
                yield from self._advance()
                if self._receive(block=self._round is None) or (self._round is None and self._flush()):
                    continue
                if self._round is None and not self._start_round():
                    return
                self._continue_round()
        except BaseException as error:
            self._keep_in_flight(_is_interrupt(error))
            raise
        finally:
            for workers in self._workers.values():
                workers.close()

    def _advance(self) -> Iterator[T]:
        """Run every task as far as possible, and start others in place of those that end."""
        ended = 0
        while True:
            if self._ready:
                index, task, replies = self._ready.popleft()
            elif self._active < self._window and (entry := next(self._tasks, None)) is not None:
                (index, task), replies = entry, None
                self._active += 1
            else:
                break
            try:
                ask = task.send(replies)  # type: ignore[arg-type]
            except StopIteration as stop:
                self._results[index] = stop.value
                self._active -= 1
                ended += 1
                while self._next_result in self._results:
                    result = self._results.pop(self._next_result)
                    self._next_result += 1
                    yield result
            else:
                self._send(index, task, ask.service, ask.requests)
        if self._progress is not None:
            self._progress(ended)

    def _send(self, index: int, task: "Task[T]", name: str, requests: Sequence[Any]) -> None:
        service = self._services[name]
        stored = getattr(service, "stored", None)
        waiting = _Waiting(task, set(), {})
        for number, request in enumerate(requests):
            reply = stored(request) if stored is not None else None
            if reply is not None:
                waiting.replies[request.key] = reply
                continue
            if request.key in waiting.missing:
                continue
            waiting.missing.add(request.key)
            askers = self._askers.setdefault((name, request.key), [])
            askers.append(index)
            if name in self._workers:
                if len(askers) == 1:
                    self._workers[name].service.prepare()
                    self._workers[name].submit(request)
            elif len(askers) == 1 or request.key in self._asked[name]:
                # The earliest task decides on the place, whichever asks first
                place, _ = self._asked[name].get(request.key, ((index, number), None))
                self._asked[name][request.key] = min(place, (index, number)), request
        if waiting.missing:
            self._waiting[index] = waiting
        else:
            self._ready.append((index, task, waiting.replies))

    def _deliver(self, name: str, replies: Mapping[str, Any]) -> None:
        for key, reply in replies.items():
            for index in self._askers.pop((name, key), ()):
                waiting = self._waiting[index]
                waiting.replies[key] = reply
                waiting.missing.discard(key)
                if not waiting.missing:
                    del self._waiting[index]
                    self._ready.append((index, waiting.task, waiting.replies))

    def _in_flight(self) -> int:
        return sum(len(workers.in_flight) for workers in self._workers.values())

    def _receive(self, block: bool) -> bool:
        """Store and deliver the replies that have arrived. Return whether there were any."""
        if block:
            self._wait()
        error = self._gather()
        delivered = self._store()
        if error is not None:
            raise error
        return delivered

    def _wait(self, deadline: float = math.inf) -> None:
        """Wait until a reply has arrived, no request is in flight, or the time `deadline` has come."""
        while self._in_flight() and not any(workers.arrived for workers in self._workers.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=None if left == math.inf else left)

    def _gather(self) -> BaseException | None:
        """Take the replies that have arrived, and return the first error among them."""
        failed: BaseException | None = None
        for name, workers in self._workers.items():
            while workers.arrived:
                # Removed last, since Ctrl-C may interrupt this at any point and must not lose a reply
                requests, replies = workers.arrived[0]
                if isinstance(replies, BaseException):
                    failed = failed or replies
                elif replies is not None:
                    pairs = zip(requests, replies, strict=True)
                    self._unsaved[name].update({request.key: (request, reply) for request, reply in pairs})
                for request in requests:
                    workers.in_flight.pop(request.key, None)
                workers.arrived.popleft()
        return failed

    def _store(self) -> bool:
        stored = False
        for name, replies in self._unsaved.items():
            if replies:
                kept = self._workers[name].service.keep(list(replies.values()))
                replies.clear()
                self._deliver(name, kept)
                stored = True
        return stored

    def _flush(self) -> bool:
        flushed = {name: workers.service.flush() for name, workers in self._workers.items()}
        for name, replies in flushed.items():
            self._deliver(name, replies)
        return any(flushed.values())

    def _start_round(self) -> bool:
        """Let the first service that has requests answer all of them."""
        for name, service in self._services.items():
            asked = self._asked.pop(name, None)
            if asked:
                requests = [request for _, request in sorted(asked.values(), key=lambda entry: entry[0])]
                in_parts = getattr(service, "answer_in_parts", None)
                self._service_of_round = name
                self._round = iter([service.answer(requests)] if in_parts is None else in_parts(requests))  # type: ignore[union-attr]
                return True
        return False

    def _continue_round(self) -> None:
        assert self._round is not None
        part = next(self._round, None)
        if part is None:
            self._round = None
        else:
            self._deliver(self._service_of_round, part)

    def _keep_in_flight(self, interrupted: bool) -> None:
        """Send no more requests, and store the replies to those in flight. After Ctrl-C, wait for `GRACE` s only."""
        for workers in self._workers.values():
            workers.discard()
            workers.service.interrupt()
        if count := self._in_flight():
            logger.warning(
                f"Stopping: waiting up to {GRACE:g} s for {count} requests in flight."
                if interrupted
                else f"The run ends because of an error. Waiting for {count} requests in flight. Press Ctrl-C to "
                "discard them."
            )
        try:
            self._drain(GRACE if interrupted else math.inf)
        except KeyboardInterrupt:
            if interrupted:
                raise
            self._drain(GRACE)  # and report the error
        finally:
            for workers in self._workers.values():
                workers.service.abandon()

    def _drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._in_flight() and time.monotonic() < deadline:
            self._wait(deadline)
            self._gather()
            self._store()


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C ends the run, here or in the code that uses the results."""
    while isinstance(error, GeneratorExit):  # raised while the caller handles its own exception
        error = error.__context__
    return isinstance(error, KeyboardInterrupt)
