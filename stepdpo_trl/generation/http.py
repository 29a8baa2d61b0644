"""
HTTP for clients of servers: limits on the time and the size of a reply, and requests that can be abandoned.

The requests of all threads run in one event loop. There, a request can be cancelled at any point (while connecting,
waiting or reading), which closes its connection. A thread that blocks in a socket could not be interrupted.
"""

import asyncio
import os
import ssl
import threading
import weakref
import zlib
from collections.abc import Awaitable
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

T = TypeVar("T")
CONNECT_TIMEOUT = 30.0  # seconds
MAX_REPLY_SIZE = 10 * 2**20  # bytes, decompressed
_DECODED = ("content-encoding", "content-length", "transfer-encoding")


class ReplyError(Exception):
    """A reply that is incomplete after the time limit, or exceeds the limit on its size."""


class EventLoop:
    """An event loop in a background thread, which starts with the first call."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()
        self._running: set[Future[Any]] = set()

    def call(self, awaitable: Awaitable[T], timeout: float) -> T:
        """
        Run an awaitable and wait for its result.

        Args:
            awaitable (`Awaitable`):
                The awaitable.
            timeout (`float`):
                Time limit in seconds.

        Returns:
            `Any`: The result.

        Raises:
            ReplyError: If the time limit is exceeded.
            concurrent.futures.CancelledError: If [`EventLoop.cancel`] was called.
        """
        future = asyncio.run_coroutine_threadsafe(_limit(awaitable, timeout), self._start())
        self._running.add(future)
        try:
            return future.result()
        finally:
            future.cancel()  # Ctrl-C while waiting
            self._running.discard(future)

    def cancel(self) -> None:
        """Cancel all running calls."""
        for future in list(self._running):
            future.cancel()

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_run, args=(self._loop,), daemon=True)
                thread.start()
                weakref.finalize(self, _stop, self._loop, thread)
            return self._loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.run_until_complete(_cancel_tasks())
    loop.close()


async def _cancel_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(1)  # otherwise asyncio would complain about cancelled requests


async def _limit(awaitable: Awaitable[T], timeout: float) -> T:
    try:
        return await asyncio.wait_for(awaitable, timeout)
    except TimeoutError:
        raise ReplyError(f"a time-out (no complete reply in {timeout:g} s)") from None


def make_http_client(openai: Any, connections: int) -> Any:
    """
    Make the HTTP client of an `AsyncOpenAI`.

    It reads the whole reply, up to `MAX_REPLY_SIZE`, and does not follow redirects: a request contains the API key and
    the prompt, which another host must not receive.

    Args:
        openai (`module`):
            The package.
        connections (`int`):
            Number of idle connections to keep.

    Returns:
        `AsyncClient`: The client, of the HTTP package that this release of `openai` uses.
    """

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            response = await super().send(request, stream=True, **options)
            try:
                content = await _read(response)
            finally:
                await response.aclose()
            headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _DECODED]
            return type(response)(
                response.status_code,
                headers=headers,
                content=content,
                request=response.request,
                extensions=response.extensions,
            )

    # Its callers limit the number of requests
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=None, max_keepalive_connections=connections)
    return Client(limits=limits, follow_redirects=False, headers={"accept-encoding": "gzip"})


async def _read(response: Any) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise ReplyError(f"a reply in the encoding {encoding[:20]!r}, which was not requested")
    # The decoders of the HTTP package would inflate a chunk without a limit
    gzip = zlib.decompressobj(zlib.MAX_WBITS | 16) if encoding == "gzip" else None
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += gzip.decompress(chunk, MAX_REPLY_SIZE - len(content) + 1) if gzip else chunk
        if len(content) > MAX_REPLY_SIZE:
            raise ReplyError(f"a reply of more than {MAX_REPLY_SIZE:,} bytes, which is not read to its end")
    return bytes(content)


def reason_of(error: BaseException) -> str:
    """Return the innermost reason of an error of the HTTP package, such as `"Connection refused"`."""
    while not isinstance(error, ReplyError):
        inner = error.__cause__ or error.__context__ or next(iter(getattr(error, "exceptions", ())), None)
        if inner is None:
            break
        error = inner
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)  # asyncio has messages of its own
    return str(error) or type(error).__name__


def retry_after(headers: Any) -> float:
    """
    Return the pause that a server asks for by the header `Retry-After`.

    Args:
        headers (`Mapping[str, str]`):
            Headers of the reply.

    Returns:
        `float`: Seconds. 0 if there is no such header, or it is neither a number nor a date.
    """
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return 0.0
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return seconds if seconds > 0 else 0.0  # not for NaN
