"""What a back end is asked and answers. Standard library only; back ends are imported when they are made."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol
from urllib.parse import urlsplit


class GenerationError(Exception):
    """A back end cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Request:
    """
    Something to ask a model once.

    Args:
        key (`str`):
            Its name in the run: the same key is never asked twice.
        prompt (`str` or `tuple[dict, ...]`):
            A text to go on from, or messages to reply to.
        seed (`int`):
            Seed of this answer alone.
    """

    key: str
    prompt: str | tuple[dict[str, str], ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """
    An answer.

    Args:
        text (`str`):
            What follows the prompt.
        finish_reason (`str`):
            `"stop"` where the model ended it, `"length"` where it was cut, `"refused"` where a server does not take
            the prompt for what it says or for its length, or filters the answer.
        prompt_tokens (`int`):
            Tokens of the prompt.
        tokens (`int`):
            Tokens of the text.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """
    How to sample. The defaults are those of Step-DPO (arXiv 2406.18629, section 4.1).

    Args:
        temperature (`float`, *optional*, defaults to `0.8`):
            0 for greedy decoding.
        top_p (`float`, *optional*, defaults to `0.95`):
            Share of the probability mass to sample from.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of a completion.
        top_k (`int`, *optional*, defaults to `0`):
            Sample only from this many most likely tokens, before `top_p` is applied. 0 turns it off.

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
                f"`temperature={self.temperature}` must be finite and not negative. 0 is greedy, 0.8 the paper's."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p={self.top_p}` must be above 0 and at most 1.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens={self.max_new_tokens}` must be at least 1.")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"`top_k={self.top_k}` must be a whole number of at least 0. Use 0 to turn it off.")


class Generator(Protocol):
    """A model that answers."""

    def render(self, user: str, response_prefix: str) -> str:
        """Text of a conversation with one message of the user, to the end of the assistant's opening words."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """
        Answer the requests whose key is not in `done`, and hand answers out as they come.

        What is done is passed too, so that a run that goes on makes the same batches, and so the same answers to the
        last bit, as one that was never stopped.
        """


@dataclass(frozen=True)
class ModelSpec:
    """
    Which model to ask, and how.

    Args:
        model (`str`):
            Model id or folder; for a server the name under which it serves it.
        backend (`str`, *optional*, defaults to `"transformers"`):
            A name in [`BACKENDS`].
        base_url (`str`, *optional*):
            Address of an OpenAI-compatible server, such as `http://localhost:8000/v1`. Its key, if it needs one, is
            read from the environment variable `api_key_env`.
        tokenizer (`str`, *optional*):
            Tokenizer with the chat template for texts sent to a server, defaults to `model`.
        batch_size (`int`, *optional*):
            Number of sequences per batch (transformers), defaults to 32.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key.
        adapter (`str`, *optional*):
            PEFT adapter to load on top of the model (transformers).
        revision (`str`, *optional*):
            Branch, tag or commit of the model on the Hub, and of its tokenizer unless `tokenizer` names another
            repository (transformers and vLLM).
        max_concurrent_requests (`int`, *optional*):
            Maximum number of requests that a server gets at the same time, defaults to 32.

    Raises:
        ValueError: If the values do not fit together.
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

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            near = get_close_matches(self.backend, BACKENDS, n=1, cutoff=0)[0]
            raise ValueError(
                f"Back end {self.backend!r} is not known. Did you mean {near!r}? Known: {list(BACKENDS)}."
            )
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError("The server's address must look like http://localhost:8000/v1.")
            if url.username or url.password or url.query:
                raise ValueError(
                    "The server's address holds a user, a password or a query, which would be written into the run's "
                    f"files. Give it without, and the key in the environment variable {self.api_key_env}."
                )
        if (self.backend == "openai") != (self.base_url is not None):
            raise ValueError(
                f"Back end {self.backend!r} and base_url={self.base_url!r} do not fit: a server needs the back end "
                "'openai' and its address, such as http://localhost:8000/v1; the others take no address."
            )
        if self.adapter is not None and self.backend != "transformers":
            raise ValueError(
                f"Back end {self.backend!r} does not load the adapter {self.adapter!r}: take the back end "
                "'transformers', or merge the adapter into the model, or have the server serve it under a name."
            )
        if self.backend == "openai":
            if self.batch_size is not None:
                raise ValueError(
                    f"batch_size={self.batch_size} has no effect on a server, which makes its own batches. Use "
                    "max_concurrent_requests to limit how many requests it gets at the same time."
                )
            if self.revision is not None:
                raise ValueError(
                    f"revision={self.revision!r} has no effect on a server, which has loaded its model. Remove it and "
                    "start the server with that revision."
                )
        elif self.max_concurrent_requests is not None:
            raise ValueError(
                f"max_concurrent_requests={self.max_concurrent_requests} has no effect on the inference backend "
                f"{self.backend!r}. It is for servers. Remove it."
            )
        for name in ("batch_size", "max_concurrent_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    @property
    def tokenizer_revision(self) -> str | None:
        """Revision of the tokenizer: that of the model, unless the tokenizer comes from another repository."""
        return self.revision if self.tokenizer in (None, self.model) else None


BACKENDS = ("transformers", "vllm", "openai")
DEFAULT_BATCH_SIZE = 32  # transformers
DEFAULT_CONCURRENT_REQUESTS = 32  # servers
