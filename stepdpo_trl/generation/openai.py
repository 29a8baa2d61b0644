"""Generation by an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, llama.cpp, hosted models."""

import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import load_tokenizer, render
from .protocol import Completion, GenerationError, ModelSpec, Request, Sampling

TRIES = 8
TIMEOUT = 600.0  # seconds for one answer


class OpenAIGenerator:
    """
    A model behind an address. Texts go to `/completions`, messages to `/chat/completions`.

    Args:
        spec (`ModelSpec`):
            The address and the model's name there. `batch_size` requests are on their way at a time.
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
        self._key = os.environ.get(spec.api_key_variable, "").strip()
        if not self._key.isascii() or not (self._key or "-").isprintable():
            raise GenerationError(f"The key in {spec.api_key_variable} holds characters that no key has. Set it anew.")
        # Retries are ours: they also cover replies that are none, and the end of patience names the request
        self.client = openai.OpenAI(
            base_url=spec.base_url, api_key=self._key or "none", timeout=timeout, max_retries=0
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that makes texts of conversations; judges need none."""
        return load_tokenizer(self.spec.tokenizer or self.spec.model)

    def render(self, user: str, opening: str) -> str:
        """Text of a conversation with one message of the user, to the end of the assistant's opening words."""
        text = render(self.tokenizer, [{"role": "user", "content": user}], opening)
        bos = self.tokenizer.bos_token
        # Servers put the tokenizer's BOS in front by themselves
        adds_bos = bos and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds_bos else text

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """Answer, each as it comes. See [`~stepdpo_trl.generation.Generator`]."""
        todo = iter([request for request in requests if request.key not in done])
        failed: BaseException | None = None
        with ThreadPoolExecutor(self.spec.batch_size) as pool:
            running: dict[Future[Completion], Request] = {}
            while True:
                while failed is None and len(running) < self.spec.batch_size:
                    request = next(todo, None)
                    if request is None:
                        break
                    running[pool.submit(self._ask, request, sampling)] = request
                if not running:
                    break
                arrived = []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    request = running.pop(future)
                    if future.exception() is None:
                        arrived.append((request, future.result()))
                    else:
                        failed = failed or future.exception()
                if arrived:
                    yield arrived  # those on their way when one failed are kept too
        if failed is not None:
            raise failed

    def _ask(self, request: Request, sampling: Sampling) -> Completion:
        for attempt in range(1, self.tries + 1):
            try:
                return self._ask_once(request, sampling)
            except self._openai.APIStatusError as error:
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise GenerationError(self._refused(request, error)) from None
                trouble, pause = f"HTTP {error.status_code}", _retry_after(error.response.headers)
            except self._openai.APIConnectionError as error:  # time-outs too
                trouble, pause = f"{type(error).__name__} ({error.__cause__ or error})", None
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, self._openai.APIError) as error:
                trouble, pause = f"a reply that is none ({type(error).__name__}: {error})", None
            if attempt < self.tries:
                self.sleep(max(pause or 0.0, min(60.0, 0.5 * 2 ** (attempt - 1))))
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
        reply: Any
        if isinstance(request.prompt, str):
            reply = self.client.completions.create(prompt=request.prompt, **options)
            text = reply.choices[0].text
        else:
            reply = self.client.chat.completions.create(messages=list(request.prompt), **options)  # type: ignore
            text = reply.choices[0].message.content
        reason = reply.choices[0].finish_reason
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise ValueError(f"text {text!r:.60}, finish_reason {reason!r}")
        usage = reply.usage
        counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
        return Completion(text, reason, *counts)

    def _refused(self, request: Request, error: Any) -> str:
        hints = {
            401: f"Set the environment variable {self.spec.api_key_variable} to a valid key.",
            403: f"Set the environment variable {self.spec.api_key_variable} to a key that may use the model.",
            404: "Check the address (it usually ends in /v1) and the model's name.",
        }
        hint = hints.get(error.status_code, "Check the model's name and whether it takes such requests.")
        return self._scrub(
            f"The server at {self.spec.base_url} refuses {request.key!r} for {self.spec.model!r}: HTTP "
            f"{error.status_code}, {str(error.message)[:300]}. {hint}"
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
