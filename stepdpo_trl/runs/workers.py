"""Worker threads that answer the requests of tasks to servers and answer checkers."""

import heapq
import itertools
import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any


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
    Threads that answer the requests to a streaming service.

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
        self._waiting: list[tuple[float, int, Any]] = []  # heap of the requests that no thread has taken yet
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # for the heap
        # One entry per request, and `False` at the end. Ctrl-C can interrupt `put` without leaving a lock behind
        self._queue: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._threads = 0
        self._stopped = False

    def submit(self, request: Any, order: float = 0.0) -> None:
        """Queue a request. Those with a lower `order` are answered first, and of the same, those submitted first."""
        with self._lock:
            heapq.heappush(self._waiting, (order, next(self._numbers), request))
        self._queue.put(True)
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
        self._queue.put(False)

    def _take(self, most: int) -> list[Any]:
        with self._lock:
            return [heapq.heappop(self._waiting)[2] for _ in range(min(most, len(self._waiting)))]

    def _run(self) -> None:
        while self._queue.get():
            requests = self._take(self.service.chunk)
            if not requests:  # another thread has taken several
                continue
            replies: Any = None
            if not self._stopped:
                try:
                    replies = self.service.work(requests)
                except BaseException as error:
                    replies, self._stopped = error, True
            self.arrived.append((requests, replies))
            self._wake.put(None)
        self._queue.put(False)  # for the other threads
