"""Access to the labeling page: only from the page itself, in a browser on this machine."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]
_LOCAL = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d+)?")


class LocalOnly:
    """
    ASGI middleware that refuses requests of other sites.

    A site could otherwise send labels, or point its name at 127.0.0.1 (DNS rebinding) and read the problems.

    Args:
        app (`Callable`):
            The application.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Pass a request to the application, or answer it with status 403."""
        if scope["type"] == "lifespan" or is_local(dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"Open this page at http://127.0.0.1 on the same machine."})


def is_local(headers: dict[bytes, bytes]) -> bool:
    """
    Return whether a request comes from the page itself, or from the address bar of a browser.

    Args:
        headers (`dict[bytes, bytes]`):
            Headers of the request, with lowercase names.

    Returns:
        `bool`: Whether `Host` is this machine, and `Origin`, if present, is the same. Browsers send `Origin` with all
        requests to another site that could change something.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin", f"http://{host}".encode("latin-1")).decode("latin-1")
    return _LOCAL.fullmatch(host) is not None and origin == f"http://{host}"
