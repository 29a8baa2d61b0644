"""
Requests, completions, sampling parameters, and the protocol that all inference backends implement.

This module uses the standard library only. The packages of an inference backend are imported when its generator is
created.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..data.messages import did_you_mean
from .addresses import check_address
from .vllm_arguments import parse_arguments

BACKENDS = ("transformers", "vllm", "openai")
DEFAULT_BATCH_SIZE = 32  # transformers
DEFAULT_CONCURRENT_REQUESTS = 32  # servers
MAX_TOKENS = 10**8  # of one request; a larger number is not a count


class GenerationError(Exception):
    """Error of an inference backend. The message says what failed and how to fix it."""


@dataclass(frozen=True)
class Request:
    """
    A request for one completion.

    Args:
        key (`str`):
            Unique name within the run. Answers are stored under it, so no key is requested twice.
        prompt (`str`, `tuple[int, ...]` or `tuple[dict, ...]`):
            Text to continue, the ids of its tokens, or messages to reply to.
        seed (`int`):
            Random seed of this completion.
    """

    key: str
    prompt: str | tuple[int, ...] | tuple[dict[str, str], ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """
    The answer to a request.

    Args:
        text (`str`):
            Generated text, without the prompt.
        finish_reason (`str`):
            `"stop"` if the model ended the text, `"length"` if it was cut at `max_new_tokens`, `"refused"` if a server
            rejected the prompt for its content or length, or filtered the answer.
        prompt_tokens (`int`):
            Number of tokens in the prompt. 0 if the server does not report it.
        tokens (`int`):
            Number of generated tokens. 0 if the server does not report it.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int


def token_count(reported: Any) -> int:
    """
    Return a number of tokens that a server has reported, or 0 (unknown) if it is not a number of tokens.

    Args:
        reported (`Any`):
            Part of the server's reply.

    Returns:
        `int`: The number.
    """
    return reported if type(reported) is int and 0 <= reported <= MAX_TOKENS else 0


@dataclass(frozen=True)
class Sampling:
    """
    Sampling parameters. The defaults are those of Step-DPO (https://huggingface.co/papers/2406.18629, section 4.1).

    Args:
        temperature (`float`, *optional*, defaults to `0.8`):
            Sampling temperature. 0 means greedy decoding.
        top_p (`float`, *optional*, defaults to `0.95`):
            Sample only from the most likely tokens whose probabilities add up to `top_p`.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Maximum number of generated tokens.
        top_k (`int`, *optional*, defaults to `0`):
            Sample only from the `top_k` most likely tokens, before `top_p` is applied. 0 disables it.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 1024
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be finite and not negative. Use 0 for greedy decoding, or 0.8 "
                "as in the Step-DPO paper."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1. Use 1 to disable it.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be an integer of at least 0. Use 0 to disable it.")


class Generator(Protocol):
    """A model that completes prompts in batches."""

    def render(self, user: str, response_prefix: str) -> str:
        """Render a user message with the chat template, followed by the first words of the assistant's turn."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """
        Complete the requests whose key is not in `done`, and yield the completions as they arrive.

        Requests that are done are passed as well: a resumed run then forms the same batches as an uninterrupted one,
        and so generates exactly the same completions.

        Args:
            requests (`Sequence[Request]`):
                All requests.
            sampling (`Sampling`):
                Sampling parameters.
            done (`Container[str]`):
                Keys of the requests that are answered already.

        Yields:
            `list[tuple[Request, Completion]]`: Requests with their completions.

        Raises:
            GenerationError: If generation fails.
        """


@runtime_checkable
class ServerGenerator(Protocol):
    """
    A model on a server that completes many prompts at the same time.

    The scheduler of runs calls `complete` in several threads, and the other methods in its own.

    Attributes:
        concurrent (`int`): Maximum number of requests at the same time.
    """

    concurrent: int

    def render(self, user: str, response_prefix: str) -> str:
        """Render a user message with the chat template, followed by the first words of the assistant's turn."""

    def prepare(self) -> None:
        """
        Check that the server can be used. Called before every request, and cheap after the first call.

        Raises:
            GenerationError: If the server cannot be reached or does not serve the model.
        """

    def complete(self, request: Request, sampling: Sampling) -> Completion:
        """
        Send one request until it is answered.

        Args:
            request (`Request`):
                The request.
            sampling (`Sampling`):
                Sampling parameters.

        Returns:
            `Completion`: The completion.

        Raises:
            GenerationError: If the server rejects the request, or does not answer it.
        """

    def accept(self, replies: Sequence[tuple[Request, Completion]]) -> list[tuple[Request, Completion]]:
        """
        Return the completions to store. Refusals are held back as long as the server has answered no other request.

        Args:
            replies (`Sequence[tuple[Request, Completion]]`):
                Requests with their completions.

        Returns:
            `list[tuple[Request, Completion]]`: Those to store, and earlier refusals.

        Raises:
            GenerationError: If the server has refused all of several requests.
        """

    def release(self) -> list[tuple[Request, Completion]]:
        """Return the refusals that `accept` has held back."""

    def interrupt(self) -> None:
        """Do not send requests again that fail from now on, and end pauses, since the run ends."""

    def abandon(self) -> None:
        """End all requests at once, without an answer."""


@runtime_checkable
class StartedServers(ServerGenerator, Protocol):
    """A model on servers that the generator has started itself."""

    def close(self) -> None:
        """Stop the servers."""


@dataclass(frozen=True)
class ModelSpec:
    """
    A model and the inference backend that runs it.

    Args:
        model (`str`):
            Hub id or folder of the model, or its name on the server.
        backend (`str`, *optional*, defaults to `"transformers"`):
            Inference backend: `"transformers"`, `"vllm"`, or `"openai"` for any OpenAI-compatible server.
        base_url (`str`, *optional*):
            Address of the server, such as `http://localhost:8000/v1`. Required for the backend `"openai"`, and not
            allowed for the others.
        tokenizer (`str`, *optional*):
            Hub id or folder of the tokenizer whose chat template renders the prompts. Defaults to `model`.
        batch_size (`int`, *optional*):
            Number of sequences per batch with transformers. Defaults to 32. Not allowed for vLLM and servers, which
            form their own batches.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the server's API key.
        adapter (`str`, *optional*):
            PEFT adapter to load on top of the model. Not allowed for servers.
        revision (`str`, *optional*):
            Branch, tag or commit of the model on the Hub. It also applies to the tokenizer, unless `tokenizer` is
            another repository. Not allowed for servers.
        max_concurrent_requests (`int`, *optional*):
            Maximum number of requests that a server receives at the same time. Defaults to 32, and for a server that
            vLLM starts to 256 or its `--max-num-seqs`. Not allowed for transformers.
        vllm_args (`str`, *optional*):
            Arguments of `vllm serve`, quoted as in a shell. Only for vLLM.

    Raises:
        ValueError: If an argument is invalid, or does not apply to the backend.
    """

    model: str
    backend: str = "transformers"
    base_url: str | None = None
    tokenizer: str | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    api_key_env: str = "OPENAI_API_KEY"
    adapter: str | None = None
    revision: str | None = None
    max_concurrent_requests: int | None = None
    vllm_args: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(
                f"The inference backend {self.backend!r} does not exist.{did_you_mean(self.backend, BACKENDS)} "
                f"Available: {', '.join(BACKENDS)}."
            )
        if self.base_url is not None:
            check_address(self.base_url)
        if (self.backend == "openai") != (self.base_url is not None):
            raise ValueError(
                f"The inference backend {self.backend!r} does not match base_url={self.base_url!r}. For a server, use "
                "the backend 'openai' with an address such as http://localhost:8000/v1. For the other backends, "
                "remove the address."
            )
        if self.adapter is not None and self.backend == "openai":
            raise ValueError(
                f"The inference backend 'openai' does not load the adapter {self.adapter!r}. Use another inference "
                "backend, or let the server load the adapter and pass the name under which it serves it."
            )
        self._check_options_of_backend()
        for name in ("batch_size", "max_concurrent_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    def _check_options_of_backend(self) -> None:
        if self.backend == "transformers" and self.max_concurrent_requests is not None:
            raise ValueError(
                f"max_concurrent_requests={self.max_concurrent_requests} has no effect on the inference backend "
                "'transformers'. It applies to vLLM and servers only. Remove it."
            )
        if self.backend == "vllm":
            parse_arguments(self.vllm_args)
        elif self.vllm_args is not None:
            raise ValueError(
                f"vllm_args={self.vllm_args!r} has no effect on the inference backend {self.backend!r}. Remove it, or "
                "use the backend 'vllm'."
            )
        if self.backend != "transformers" and self.batch_size is not None:
            raise ValueError(
                f"batch_size={self.batch_size} has no effect on vLLM or a server, which form their own batches. Use "
                "max_concurrent_requests to limit the number of requests at the same time."
            )
        if self.backend == "openai" and self.revision is not None:
            raise ValueError(
                f"revision={self.revision!r} has no effect on a server, which has already loaded its model. Remove "
                "it, and start the server with this revision."
            )

    @property
    def tokenizer_revision(self) -> str | None:
        """Hub revision of the tokenizer: that of the model, or `None` if `tokenizer` is another repository."""
        return self.revision if self.tokenizer in (None, self.model) else None
