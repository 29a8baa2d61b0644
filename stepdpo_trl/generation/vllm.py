"""Generation with vLLM: one `vllm serve` per group of GPUs, queried by the client of all other servers."""

import functools
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from .chat import encode, load_tokenizer, render
from .openai import OpenAIGenerator
from .protocol import Completion, GenerationError, ModelSpec, Request, Sampling
from .vllm_arguments import gpu_groups, parse_arguments, visible_gpus
from .vllm_command import serve_command, served_model
from .vllm_server import VLLMServer, find_vllm, free_ports, stop_orphans, stop_servers

CONCURRENT = 256  # requests per copy of the model, vLLM's default for `--max-num-seqs` on most GPUs
_SECONDS_BETWEEN_LINES = 30.0  # of progress without a terminal


class VLLMGenerator:
    """
    Generator that starts vLLM servers and sends each request to the one with the fewest requests in flight.

    The servers start with the first request, so a run without missing answers starts none. Prompts are sent as token
    ids, so that the server adds no BOS token.

    Args:
        spec (`ModelSpec`):
            The model.
        folder (`Path`, *optional*, defaults to the current folder):
            Folder for the logs. Servers that a killed process has left running in this folder are stopped.

    Raises:
        GenerationError: If vLLM is not installed, or the tokenizer cannot be loaded.
        ValueError: If there are too few GPUs.
    """

    def __init__(self, spec: ModelSpec, folder: Path = Path()) -> None:
        arguments = parse_arguments(spec.vllm_args)
        self.spec, self.folder = spec, folder
        self.groups = gpu_groups(arguments, visible_gpus())
        copies = len(self.groups) * arguments.copies
        self.concurrent = (spec.max_concurrent_requests or arguments.max_num_seqs or CONCURRENT) * copies
        find_vllm()
        self.tokenizer = load_tokenizer(served_model(spec).tokenizer, revision=spec.tokenizer_revision)
        stop_orphans(folder)
        self._servers: list[VLLMServer] = []
        self._clients: list[OpenAIGenerator] = []
        self._in_flight = [0] * len(self.groups)
        self._lock = threading.Lock()
        weakref.finalize(self, _stop_all, self._servers)

    def render(self, user: str, response_prefix: str) -> str:
        """Render a user message with the chat template, followed by the first words of the assistant's turn."""
        return render(self.tokenizer, [{"role": "user", "content": user}], response_prefix)

    def prepare(self) -> None:
        """Start the servers before the first request."""
        if not self._clients:
            try:
                self._start()
            except BaseException:
                self.close()
                raise
        for client in self._clients:
            client.prepare()

    def _start(self) -> None:
        ports = free_ports(len(self.groups))
        commands = [serve_command(self.spec, port) for port in ports]
        _exempt_from_proxies("127.0.0.1")
        for group, port, command in zip(self.groups, ports, commands, strict=True):
            self._servers.append(VLLMServer(command, group, port, self.folder))
        _wait_until_ready(self._servers, served_model(self.spec).name)
        pauses = [functools.partial(_pause, server) for server in self._servers]
        self._clients = [
            OpenAIGenerator(spec, sleep=pause) for spec, pause in zip(self.server_specs(), pauses, strict=True)
        ]

    def server_specs(self) -> list[ModelSpec]:
        """Return the model at each of the running servers."""
        model = served_model(self.spec)
        share = self.concurrent // len(self.groups)
        return [
            # No key: those in the environment are meant for other servers
            ModelSpec(
                model.name,
                "openai",
                server.address,
                tokenizer=model.tokenizer,
                api_key_env="",
                max_concurrent_requests=share,
            )
            for server in self._servers
        ]

    def complete(self, request: Request, sampling: Sampling) -> Completion:
        """Send a request, see [`~stepdpo_trl.generation.ServerGenerator`]."""
        with self._lock:  # tokenizers are not thread-safe
            request = replace(request, prompt=tuple(encode(self.tokenizer, request)))
            chosen = self._in_flight.index(min(self._in_flight))
            self._in_flight[chosen] += 1
        server, client = self._servers[chosen], self._clients[chosen]
        try:
            return client.complete(request, sampling)
        except GenerationError:
            if not server.is_running():
                raise server.failure() from None
            raise
        finally:
            with self._lock:
                self._in_flight[chosen] -= 1

    def accept(self, replies: Sequence[tuple[Request, Completion]]) -> list[tuple[Request, Completion]]:
        """Return the completions to store, see [`~stepdpo_trl.generation.ServerGenerator`]."""
        return self._clients[0].accept(replies)

    def release(self) -> list[tuple[Request, Completion]]:
        """Return the refusals that were held back."""
        return self._clients[0].release() if self._clients else []

    def interrupt(self) -> None:
        """Give up on requests that fail from now on."""
        for client in self._clients:
            client.interrupt()

    def abandon(self) -> None:
        """End all requests at once."""
        for client in self._clients:
            client.abandon()

    def close(self) -> None:
        """Stop the servers. The next request starts them again."""
        self._clients = []
        _stop_all(self._servers)


def _stop_all(servers: list[VLLMServer]) -> None:
    stop_servers(servers)
    servers.clear()


def _pause(server: VLLMServer, seconds: float) -> None:
    """Wait before a request is sent again, unless the server has ended."""
    end = time.monotonic() + seconds
    while server.is_running():
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.5))
    raise server.failure()


def _exempt_from_proxies(host: str) -> None:
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if host not in exempt.split(","):
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [exempt, host]))


def _wait_until_ready(servers: Sequence[VLLMServer], name: str) -> None:
    """Wait until all servers accept requests, and print what they do."""
    started = printed = time.monotonic()
    logs = ", ".join(str(server.log) for server in servers)
    count = "a vLLM server" if len(servers) == 1 else f"{len(servers)} vLLM servers"
    tqdm.write(f"Starting {count} with {name}. Log: {logs}", file=sys.stderr)
    with tqdm(bar_format="{desc}", leave=False, disable=None) as bar:
        while waiting := [server for server in servers if not server.is_ready()]:
            for server in servers:
                if not server.is_running():
                    raise server.failure()
            now = time.monotonic()
            ready = f"{len(servers) - len(waiting)} of {len(servers)} ready, {now - started:.0f} s"
            line = f"vLLM: {ready}: {waiting[0].last_line()}"
            line = line[: shutil.get_terminal_size((120, 24)).columns - 1]
            bar.set_description_str(line)
            if bar.disable and now - printed >= _SECONDS_BETWEEN_LINES:
                printed = now
                tqdm.write(line, file=sys.stderr)
            time.sleep(0.2)
    tqdm.write(f"vLLM is ready after {time.monotonic() - started:.0f} s.", file=sys.stderr)
