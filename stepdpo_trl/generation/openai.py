"""Generation by an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, llama.cpp, hosted models."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import load_tokenizer, render
from .protocol import DEFAULT_CONCURRENT_REQUESTS, Completion, GenerationError, ModelSpec, Request, Sampling

TRIES = 8
TIMEOUT = 600.0  # seconds for one answer
REFUSED = 8  # refusals without any answer that are taken for a mistake in the settings
# What servers say where it is this one text that they do not take: for what it says, or for its length
_OF_THE_TEXT = re.compile(r"content.?(?:filter|policy|management)|context.?length|maximum context|too long", re.I)

logger = logging.getLogger(__name__)


class OpenAIGenerator:
    """
    A model behind an address. Texts go to `/completions`, messages to `/chat/completions`.

    Args:
        spec (`ModelSpec`):
            The address and the model's name there. At most `max_concurrent_requests` are on their way at a time.
        tries (`int`, *optional*, defaults to `8`):
            How often a request is tried before the run ends: after 429, 5xx, a time-out, a broken connection, or a
            reply that is none. The first pause is half a second, each further one twice as long, at most a minute, or
            what the server asks for.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for one answer.
        sleep (`Callable`, *optional*, defaults to `time.sleep`):
            How to pause.

    Raises:
        GenerationError: If the package `openai` is missing.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tries: int = TRIES,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise GenerationError(
                "Asking a server needs the package openai. Install it: pip install 'stepdpo_trl[openai]'"
            ) from error
        self._openai = openai
        self.spec, self.tries, self.sleep = spec, tries, sleep
        self.concurrent = spec.max_concurrent_requests or DEFAULT_CONCURRENT_REQUESTS
        self._stopping = threading.Event()
        self._key = os.environ.get(spec.api_key_env, "").strip()
        if not self._key.isascii() or not (self._key or "-").isprintable():
            raise GenerationError(f"The key in {spec.api_key_env} holds characters that no key has. Set it anew.")
        # Retries are ours: they also cover replies that are none, and the end of patience names the request
        self.client = openai.OpenAI(
            base_url=spec.base_url, api_key=self._key or "none", timeout=timeout, max_retries=0
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that makes texts of conversations; judges need none."""
        return load_tokenizer(self.spec.tokenizer or self.spec.model)

    def render(self, user: str, response_prefix: str) -> str:
        """Text of a conversation with one message of the user, to the end of the assistant's opening words."""
        text = render(self.tokenizer, [{"role": "user", "content": user}], response_prefix)
        bos = self.tokenizer.bos_token
        # Servers put the tokenizer's BOS in front by themselves
        adds_bos = bos and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds_bos else text

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """
        Answer, each as it comes. See [`~stepdpo_trl.generation.Generator`].

        Where a run ends, by an error or Ctrl-C, answers on their way are waited for and handed out first.
        """
        todo = iter([request for request in requests if request.key not in done])
        failed: BaseException | None = None
        refused: list[tuple[Request, Completion]] = []  # until it is known that others are answered
        answered = asked_all = False
        with ThreadPoolExecutor(self.concurrent) as pool:
            running: dict[Future[Completion], Request] = {}
            while True:
                while failed is None and len(running) < self.concurrent:
                    request = next(todo, None)
                    asked_all = request is None
                    if request is None:
                        break
                    running[pool.submit(self._ask, request, sampling)] = request
                if not running:
                    break
                try:
                    finished = wait(running, return_when=FIRST_COMPLETED).done
                except KeyboardInterrupt as stop:
                    if failed:
                        raise
                    failed = stop
                    self._stopping.set()
                    logger.warning(f"Stopping: waiting for {len(running)} answers on their way; Ctrl-C leaves them.")
                    continue
                arrived: list[tuple[Request, Completion]] = []
                for future in finished:
                    request, error = running.pop(future), future.exception()
                    if error is not None:
                        failed = failed or error
                        continue
                    answer = future.result()
                    (refused if answer.finish_reason == "refused" else arrived).append((request, answer))
                answered = answered or bool(arrived)
                if not answered and len(refused) >= REFUSED:
                    failed = failed or GenerationError(self._refused_all(refused[0]))
                elif answered or (asked_all and not running):
                    for request, reply in refused:
                        logger.warning(f"{request.key!r} is refused: {self._scrub(reply.text) or 'filtered'}")
                        arrived.append((request, replace(reply, text="")))
                    refused = []
                if arrived:
                    yield arrived
        if failed is not None:
            raise failed

    def _ask(self, request: Request, sampling: Sampling) -> Completion:
        for attempt in range(1, self.tries + 1):
            try:
                return self._ask_once(request, sampling)
            except self._openai.APIStatusError as error:
                said = f"{error.message} {error.code or ''}"[:300]
                if error.status_code in (400, 413, 422) and _OF_THE_TEXT.search(said):
                    return Completion(said, "refused", 0, 0)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise GenerationError(self._refused(request, error)) from None
                trouble, pause = f"HTTP {error.status_code}", _retry_after(error.response.headers)
            except self._openai.APIConnectionError as error:  # time-outs too
                trouble, pause = f"{type(error).__name__} ({error.__cause__ or error})", None
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, self._openai.APIError) as error:
                trouble, pause = f"a reply that is none ({type(error).__name__}: {error})", None
            if attempt < self.tries and not self._stopping.is_set():
                self.sleep(max(pause or 0.0, min(60.0, 0.5 * 2 ** (attempt - 1))))
            if self._stopping.is_set():  # also if Ctrl-C came in the pause
                break
        raise GenerationError(
            self._scrub(
                f"The server at {self.spec.base_url} did not answer {request.key!r} in {self.tries} tries; the last "
                f"ended with {trouble}. Look at the server and give the same command again: answers so far are kept."
            )
        )

    def _ask_once(self, request: Request, sampling: Sampling) -> Completion:
        options: dict[str, Any] = {
            "model": self.spec.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.seed % 2**31,
        }
        if sampling.top_k:  # not in OpenAI's own API, which refuses it
            options["extra_body"] = {"top_k": sampling.top_k}
        reply: Any
        if isinstance(request.prompt, str):
            reply = self.client.completions.create(prompt=request.prompt, **options)
            text = reply.choices[0].text
        else:
            reply = self.client.chat.completions.create(messages=list(request.prompt), **options)  # type: ignore
            text = reply.choices[0].message.content
        reason = reply.choices[0].finish_reason
        if reason == "content_filter":
            return Completion("", "refused", 0, 0)
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise ValueError(f"text {text!r:.60}, finish_reason {reason!r}")
        usage = reply.usage
        counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
        # Half a character, which JSON can hold, is no text that could be written to a file
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Completion(text, reason, *counts)

    def _refused(self, request: Request, error: Any) -> str:
        hints = {
            401: f"Set the environment variable {self.spec.api_key_env} to a valid key.",
            403: f"Set the environment variable {self.spec.api_key_env} to a key that may use the model.",
            404: "Check the address (it usually ends in /v1) and the model's name.",
        }
        hint = hints.get(error.status_code, "Check the model's name and whether it takes such requests.")
        return self._scrub(
            f"The server at {self.spec.base_url} refuses {request.key!r} for {self.spec.model!r}: HTTP "
            f"{error.status_code}, {str(error.message)[:300]}. {hint}"
        )

    def _refused_all(self, first: tuple[Request, Completion]) -> str:
        request, reply = first
        return self._scrub(
            f"The server at {self.spec.base_url} refuses the text of all of the first {REFUSED} requests; of "
            f"{request.key!r} it says: {reply.text or 'filtered'}. Check --max-new-tokens and the prompt."
        )

    def _scrub(self, text: str) -> str:
        """Without the key, which servers repeat in their errors."""
        if not self._key:
            return text
        # Some show its beginning and end alone
        words = (self._key, self._key[:8], self._key[-4:]) if len(self._key) >= 12 else (self._key,)
        for word in words:
            text = text.replace(word, "***")
        return text


def _retry_after(headers: Any) -> float | None:
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None
