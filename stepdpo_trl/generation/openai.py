"""Generation by an OpenAI-compatible server, such as vLLM, SGLang, `transformers serve`, llama.cpp or a hosted API."""

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from transformers import PreTrainedTokenizerBase

from ..data.messages import did_you_mean, printable
from .addresses import without_secrets
from .chat import load_tokenizer, render
from .http import CONNECT_TIMEOUT, EventLoop, ReplyError, make_http_client, reason_of, retry_after
from .protocol import (
    DEFAULT_CONCURRENT_REQUESTS,
    Completion,
    GenerationError,
    ModelSpec,
    Request,
    Sampling,
    token_count,
)

TRIES = 8
TIMEOUT = 600.0  # seconds for one answer
CHECK_TIMEOUT = 10.0  # seconds for the list of models
MAX_PAUSE = 300.0  # seconds between two attempts, whatever the server asks for
REFUSED = 8  # rejected texts without a single answer after which the settings are considered wrong
# Errors that concern the text of one request: its content or its length
_REJECTED_TEXT = re.compile(r"content.?(?:filter|policy|management)|context.?length|maximum context|too long", re.I)

logger = logging.getLogger(__name__)


class OpenAIGenerator:
    """
    Generator that sends texts to the endpoint `/completions` of a server, and messages to `/chat/completions`.

    Before the first request, the generator asks the server for its models and reports a wrong address or a wrong model
    name immediately. See [`OpenAIGenerator.check_server`].

    Args:
        spec (`ModelSpec`):
            The server's address and the name of the model there. At most `spec.max_concurrent_requests` are sent at
            the same time. Redirects are not followed.
        tries (`int`, *optional*, defaults to `8`):
            Number of attempts per request. A request is sent again after HTTP 408, 409, 429 or 5xx, a time-out, a
            broken connection or an invalid reply. The first pause is 0.5 s and each one doubles, up to 60 s, unless
            the server asks for a longer one, of up to 300 s.
        timeout (`float`, *optional*, defaults to `600.0`):
            Time limit for one answer in seconds, from connecting to the last byte.
        sleep (`Callable`, *optional*):
            Function that pauses between attempts. By default a pause that ends with [`OpenAIGenerator.interrupt`].

    Raises:
        GenerationError: If the package `openai` is not installed, or the API key contains invalid characters.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tries: int = TRIES,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise GenerationError(
                "The inference backend 'openai' requires the package openai. Install it: "
                "pip install 'stepdpo_trl[openai]'"
            ) from error
        self._openai = openai
        self.spec, self.tries, self.timeout = spec, tries, timeout
        self.concurrent = spec.max_concurrent_requests or DEFAULT_CONCURRENT_REQUESTS
        self._checked = False
        self.max_length: int | None = None  # of a prompt with its completion, if the server lists it with its models
        self._answered = False
        self._refused: dict[str, tuple[Request, Completion]] = {}  # held back until another request is answered
        self._stopping = threading.Event()
        self.sleep = sleep or self._stopping.wait
        self._key = os.environ.get(spec.api_key_env, "").strip()
        if not self._key.isascii() or not (self._key or "-").isprintable():
            raise GenerationError(
                f"The API key in the environment variable {spec.api_key_env} has invalid characters. Set it again."
            )
        self._loop = EventLoop()
        # The client's own retries would not cover invalid replies, and their errors would not name the request
        self.client = openai.AsyncOpenAI(
            base_url=spec.base_url,
            api_key=self._key or "none",
            timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT),
            max_retries=0,
            http_client=make_http_client(openai, self.concurrent),
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer that renders prompts. Loaded on first use, since requests with messages do not need it."""
        name = self.spec.tokenizer or self.spec.model
        if Path(name).is_dir():
            return load_tokenizer(name)
        try:
            self.prepare()  # a wrong address is reported before a slow search on the Hub
        except GenerationError as error:
            try:
                return load_tokenizer(name, local_files_only=True)  # enough if all answers are stored
            except GenerationError:
                raise error from None
        return load_tokenizer(name)

    def render(self, user: str, response_prefix: str) -> str:
        """Render a user message with the chat template, followed by the first words of the assistant's turn."""
        text = render(self.tokenizer, [{"role": "user", "content": user}], response_prefix)
        return text.removeprefix(self._added_bos)

    @cached_property
    def _added_bos(self) -> str:
        """BOS token, if servers prepend it because the tokenizer does."""
        adds_bos = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return str(self.tokenizer.bos_token) if self.tokenizer.bos_token and adds_bos else ""

    def check_server(self) -> None:
        """
        Check that the server is reachable and serves the model, by its endpoint `/models`.

        Servers without this endpoint, or that do not answer it in time, pass the check.

        Raises:
            GenerationError: If the server cannot be reached, does not serve the model, or has no API at this path.
        """
        try:
            listed = self._loop.call(self.client.models.list(timeout=CHECK_TIMEOUT), 2 * CHECK_TIMEOUT)
            served = [model.id for model in listed.data if isinstance(model.id, str)]
            lengths = [getattr(model, "max_model_len", None) for model in listed.data if model.id == self.spec.model]
            self.max_length = next((length for length in lengths if isinstance(length, int) and length > 0), None)
        except (self._openai.APIConnectionError, ReplyError) as error:
            self._check_connection(error)
            return
        except self._openai.NotFoundError as error:
            if not _is_openai_error(error.response) and not re.search(r"/v\d", urlsplit(str(self.spec.base_url)).path):
                address = f"{str(self.spec.base_url).rstrip('/')}/v1"
                raise GenerationError(
                    f"The server at {self.spec.base_url} has no API at this path (HTTP 404 for /models). The address "
                    f"probably lacks /v1. Try {address}."
                ) from None
            return
        except (self._openai.OpenAIError, ValueError, TypeError, AttributeError, RecursionError) as error:
            # Keys may be allowed to use models, but not to list them. Other errors recur with the first request.
            logger.debug(f"{self.spec.base_url} does not list its models: {self._scrub(str(error))}")
            return
        if served and self.spec.model not in served:
            served = [name[:100] for name in served]
            shown = ", ".join(repr(name) for name in served[:10]) + (" ..." if len(served) > 10 else "")
            raise GenerationError(
                f"The server at {self.spec.base_url} does not serve {self.spec.model!r}."
                f"{did_you_mean(self.spec.model, served)} It serves: {shown}."
            )

    def _check_connection(self, error: Exception) -> None:
        reason = self._scrub(reason_of(error))
        kind = type(error.__cause__).__name__  # by name, since releases of openai use different HTTP packages
        if kind == "ConnectTimeout":
            raise GenerationError(
                f"The server at {self.spec.base_url} does not accept connections (no reply in {CHECK_TIMEOUT:g} s). "
                "Check the address and the network."
            ) from None
        if kind == "ConnectError":
            raise GenerationError(
                f"Cannot connect to the server at {self.spec.base_url} ({reason}). Start the server, or fix the "
                "address."
            ) from None
        # The server is there, but busy or restarting. Requests are sent several times.
        logger.warning(f"The server at {self.spec.base_url} does not list its models ({reason}). Continuing.")

    def prepare(self) -> None:
        """Check the server before the first request, see [`OpenAIGenerator.check_server`]."""
        self._stopping.clear()  # an earlier run may have been interrupted
        if not self._checked:
            self.check_server()
            self._checked = True

    def accept(self, replies: Sequence[tuple[Request, Completion]]) -> list[tuple[Request, Completion]]:
        """
        Hold back refusals until another request is answered, see [`~stepdpo_trl.generation.ServerGenerator`].

        If the first requests are all refused, the settings are probably wrong. Nothing is stored then.
        """
        accepted = [(request, reply) for request, reply in replies if reply.finish_reason != "refused"]
        self._refused.update({r.key: (r, reply) for r, reply in replies if reply.finish_reason == "refused"})
        self._answered = self._answered or bool(accepted)
        if self._answered:
            return accepted + self.release()
        if len(self._refused) >= REFUSED:
            error = self._all_refused(*next(iter(self._refused.values())))
            self._refused.clear()
            raise GenerationError(error)
        return []

    def release(self) -> list[tuple[Request, Completion]]:
        """Return the refusals that were held back, with empty texts."""
        for request, completion in self._refused.values():
            reason = self._scrub(completion.text) or "filtered"
            logger.warning(f"The server refused the request {request.key!r}: {reason}")
        released = [(request, replace(completion, text="")) for request, completion in self._refused.values()]
        self._refused.clear()
        return released

    def interrupt(self) -> None:
        """Give up on requests that fail from now on, and on those that wait for their next attempt."""
        self._stopping.set()

    def abandon(self) -> None:
        """Give up on all requests, and close their connections."""
        self._stopping.set()
        self._loop.cancel()

    def complete(self, request: Request, sampling: Sampling) -> Completion:
        """
        Send a request until it is answered.

        The text of a refused completion is the server's reason, see [`~stepdpo_trl.generation.ServerGenerator`].
        """
        for attempt in range(1, self.tries + 1):
            wanted = 0.0
            try:
                return self._send(request, sampling)
            except self._openai.APIStatusError as error:
                code = error.code if isinstance(error.code, str) else ""
                message = self._scrub(f"{error.message[:9000]} {code}")[:300]
                if error.status_code in (400, 413, 422) and _REJECTED_TEXT.search(message):
                    return Completion(message, "refused", 0, 0)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise GenerationError(self._rejected(request, error)) from None
                trouble, wanted = f"HTTP {error.status_code}", retry_after(error.response.headers)
            except self._openai.APIConnectionError as error:
                trouble = f"{type(error).__name__} ({reason_of(error)})"
            except ReplyError as error:
                trouble = str(error)
            except Exception as error:  # anything that parsing the reply can raise
                trouble = f"an invalid reply ({type(error).__name__}: {error})"
            trouble = self._scrub(trouble)[:300]
            if attempt < self.tries and not self._stopping.is_set():
                pause = min(MAX_PAUSE, max(wanted, min(60.0, 0.5 * 2 ** (attempt - 1))))
                longer = f" (the server asked for {wanted:g} s)" if wanted > pause else ""
                logger.warning(
                    f"Request {request.key!r}: attempt {attempt + 1} of {self.tries} in {pause:g} s{longer}: {trouble}"
                )
                self.sleep(pause)
            if self._stopping.is_set():  # Ctrl-C may also have come during the pause
                break
        raise GenerationError(
            f"The server at {self.spec.base_url} did not answer the request {request.key!r} in {attempt} attempts. "
            f"The last one failed with {trouble}. Check the server and rerun the same command to resume: completed "
            "answers are kept."
        )

    def _send(self, request: Request, sampling: Sampling) -> Completion:
        options: dict[str, Any] = {
            "model": self.spec.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.seed % 2**31,
        }
        if sampling.top_k:  # not part of OpenAI's own API, which would reject it
            options["extra_body"] = {"top_k": sampling.top_k}
        reply: Any
        if isinstance(request.prompt, str) or isinstance(request.prompt[0], int):
            prompt: Any = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
            reply = self._loop.call(self.client.completions.create(prompt=prompt, **options), self.timeout)
            text = reply.choices[0].text
        else:
            messages: Any = list(request.prompt)
            reply = self._loop.call(self.client.chat.completions.create(messages=messages, **options), self.timeout)
            text = reply.choices[0].message.content
        reason = reply.choices[0].finish_reason
        if reason == "content_filter":
            return Completion("", "refused", 0, 0)
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise ValueError(f"text {text!r:.60}, finish_reason {reason!r}")
        counts = (token_count(getattr(reply.usage, f"{which}_tokens", 0)) for which in ("prompt", "completion"))
        # JSON allows lone surrogates, which cannot be encoded as UTF-8
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Completion(text, reason, *counts)

    def _rejected(self, request: Request, error: Any) -> str:
        hints = {
            401: f"Set the environment variable {self.spec.api_key_env} to a valid API key.",
            403: f"Set the environment variable {self.spec.api_key_env} to an API key that may use the model.",
            404: "Check the address, which usually ends in /v1, and the name of the model.",
        }
        hint = hints.get(error.status_code, "Check the name of the model and whether it supports such requests.")
        if location := error.response.headers.get("location"):
            target = without_secrets(urljoin(str(error.request.url), location))[:200]
            hint = (
                f"It redirects to {target}. Redirects are not followed, since that server would receive the prompts. "
                "Check it, and pass its address."
            )
        return self._scrub(
            f"The server at {self.spec.base_url} rejected the request {request.key!r} for {self.spec.model!r} with "
            f"HTTP {error.status_code}: {self._scrub(error.message)[:300]}. {hint}"
        )

    def _all_refused(self, request: Request, completion: Completion) -> str:
        return self._scrub(
            f"The server at {self.spec.base_url} refused the text of each of the first {REFUSED} requests. Its reason "
            f"for {request.key!r}: {completion.text or 'filtered'}. Check --max-new-tokens and the prompt."
        )

    def _scrub(self, text: str) -> str:
        """Remove the API key, which servers repeat in their errors, and control characters from a text."""
        text = text[:10_000]
        if not self._key:
            return printable(text)
        # Some servers repeat only the beginning and the end of the key
        words = (self._key, self._key[:8], self._key[-4:]) if len(self._key) >= 12 else (self._key,)
        for word in words:
            text = text.replace(word, "***")
        return printable(text)


def _is_openai_error(response: Any) -> bool:
    try:
        return "error" in response.json()
    except (ValueError, TypeError, RecursionError):
        return False
