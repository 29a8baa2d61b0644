"""
Scheduler: runs tasks concurrently and resumes each one as soon as its own replies have arrived.

The thread that calls the scheduler owns the tasks and the logs. It never waits for a particular reply: streaming
services answer in worker threads, see [`~stepdpo_trl.runs.workers`]. Threads rather than asyncio, because tasks and
judges are plain generator functions, and clients and answer checkers block.

Requests of tasks that started earlier are sent first, so that tasks end steadily and few results have to wait for an
earlier one. Only the last tasks of a stage take turns.

Services without streaming, such as a model in this process, answer in rounds. A round starts when nothing else can
happen: every task waits for such a service, and no reply is on its way. So its requests, and the batches that are made
of them, depend on the tasks and on stored replies, but not on the clock.
"""

import contextlib
import logging
import math
import queue
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .workers import StreamingService, Workers

if TYPE_CHECKING:
    from .tasks import Service, Task

T = TypeVar("T")
WINDOW = 1024  # maximum number of concurrent tasks
TASKS_PER_THREAD = 16  # the same with a streaming service, if that is more
AHEAD = 4  # windows of tasks that may start before the oldest one has ended: their results are kept in memory
# The last tasks of a stage, per thread, take turns: the very last ones would leave most threads idle. At most half of
# a stage does, or 2 per thread.
LAST_PER_THREAD, LEAST_PER_THREAD = 8, 2
GRACE = 1.0  # seconds after Ctrl-C in which answers may still arrive

logger = logging.getLogger(__name__)


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
            Function that is called often, with the number of tasks that have ended since the last call, and whether
            they needed stored replies only.
    """

    def __init__(
        self,
        tasks: "Iterable[Task[T]]",
        services: "Mapping[str, Service | StreamingService]",
        progress: Callable[[int, bool], None] | None = None,
    ) -> None:
        self._tasks = iter(tasks)
        self._services, self._progress = services, progress
        self._window = WINDOW
        self._threads = 0  # of streaming services
        self._started = self._active = 0  # tasks, and those of them that have not ended
        self._all_started = False
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
                self._threads = max(self._threads, service.threads)

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
        while (entry := self._ready.popleft() if self._ready else self._start()) is not None:
            index, task, replies = entry
            try:
                ask = task.send(replies)  # type: ignore[arg-type]
            except StopIteration as stop:
                self._results[index] = stop.value
                self._active -= 1
                self._report(1, stored=replies is not None and not self._has_answered())
                while self._next_result in self._results:
                    result = self._results.pop(self._next_result)
                    self._next_result += 1
                    yield result
            else:
                self._send(index, task, ask.service, ask.requests)
        self._report(0, stored=False)

    def _start(self) -> "tuple[int, Task[T], None] | None":
        """Return the next task, if there is one and it may start."""
        # The second limit must not depend on how many results wait, which depends on the clock
        if self._active >= self._window or self._started >= self._next_result + AHEAD * self._window:
            return None
        task = next(self._tasks, None)
        if task is None:
            self._all_started = True
            return None
        self._started += 1
        self._active += 1
        return self._started - 1, task, None

    def _report(self, ended: int, stored: bool) -> None:
        if self._progress is not None:
            self._progress(ended, stored)

    def _has_answered(self) -> bool:
        """Return whether a service has answered a request in this process."""
        return any(getattr(service, "answered", True) for service in self._services.values())

    def _order(self, index: int) -> float:
        """Return the order of a task's requests."""
        last = min(LAST_PER_THREAD * self._threads, max(self._started / 2, LEAST_PER_THREAD * self._threads))
        return math.inf if self._all_started and self._active <= last else index

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
                    self._workers[name].submit(request, self._order(index))
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
