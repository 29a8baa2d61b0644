"""Arguments of `vllm serve`: those of a user, those that this package sets, and how servers share the GPUs."""

import argparse
import os
import shlex
from dataclasses import dataclass
from typing import NoReturn

# Arguments that this package sets, with the option to use instead
_OWN = {
    "--model": "--model",
    "--tokenizer": "--tokenizer",
    "--revision": "--revision",
    "--tokenizer-revision": "--revision",
    "--dtype": "--dtype",
    "--lora-modules": "--model with the folder of an adapter",
    **dict.fromkeys(("--host", "--port", "--uds", "--api-key", "--served-model-name", "--headless"), ""),
    **dict.fromkeys(("--root-path", "--ssl-keyfile", "--ssl-certfile"), ""),
}
_REFUSED = {
    "--config": "The arguments in that file would not be checked, nor stored with the run. Write them here.",
    "--hf-token": "It would be written to the files of the run. Set the environment variable HF_TOKEN.",
}
# Arguments for hardware, memory, speed and logs. A run may resume with others: answers do not depend on them, apart
# from rounding and from texts that are too long for `--max-model-len`. `--no-NAME` belongs to `--NAME`.
OPERATIONAL = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--enable-expert-parallel", "-ep"),
    *("--data-parallel-size", "-dp", "--data-parallel-size-local", "-dpl", "--data-parallel-rank", "-dpn"),
    *("--data-parallel-start-rank", "-dpr", "--data-parallel-address", "-dpa", "--data-parallel-rpc-port", "-dpp"),
    *("--data-parallel-backend", "-dpb", "--data-parallel-hybrid-lb", "-dph", "--data-parallel-external-lb", "-dpe"),
    *("--decode-context-parallel-size", "-dcp", "--prefill-context-parallel-size", "-pcp", "--device-ids"),
    *("--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--master-port", "--numa-bind", "--numa-bind-nodes"),
    *("--numa-bind-cpus", "--api-server-count", "-asc", "--renderer-num-workers", "--distributed-executor-backend"),
    *("--distributed-timeout-seconds", "--disable-custom-all-reduce", "--max-parallel-loading-workers"),
    *("--all2all-backend", "--enable-eplb", "--eplb-config", "--enable-dbo", "--device", "--gpu-memory-utilization"),
    *("--device-memory-utilization", "--kv-cache-memory-bytes", "--num-gpu-blocks-override", "--swap-space"),
    *("--cpu-offload-gb", "--cpu-offload-params", "--kv-offloading-size", "--kv-offloading-backend", "--block-size"),
    *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--max-num-partial-prefills"),
    *("--long-prefill-token-threshold", "--enable-prefix-caching", "--prefix-caching-hash-algo"),
    *("--enable-chunked-prefill", "--async-scheduling", "--scheduling-policy", "--stream-interval", "--enforce-eager"),
    *("--optimization-level", "--compilation-config", "-cc", "--cudagraph-capture-sizes"),
    *("--max-cudagraph-capture-size", "--attention-backend", "--attention-config", "-ac", "--disable-cascade-attn"),
    *("--max-lora-rank", "--max-loras", "--max-cpu-loras", "--fully-sharded-loras", "--load-format"),
    *("--safetensors-load-strategy", "--download-dir", "--use-tqdm-on-load", "--disable-log-stats", "--log-level"),
    *("--aggregate-engine-logging", "--enable-log-requests", "--uvicorn-log-level", "--shutdown-timeout"),
)
_NAMES = {*_OWN, *_REFUSED, *OPERATIONAL}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"--vllm-args: {message}.")


@dataclass(frozen=True)
class VLLMArguments:
    """
    Arguments that a user passes to `vllm serve`.

    Args:
        words (`tuple[str, ...]`):
            The arguments.
        gpus (`int`):
            Number of GPUs that one copy of the model needs.
        shares_gpus (`bool`):
            Whether vLLM distributes copies or layers itself, so that one server gets all GPUs.
        copies (`int`):
            Copies of the model in one server.
        max_num_seqs (`int`, *optional*):
            Number of requests that one copy processes at the same time.
    """

    words: tuple[str, ...]
    gpus: int
    shares_gpus: bool
    copies: int
    max_num_seqs: int | None


def parse_arguments(text: str | None) -> VLLMArguments:
    """
    Parse the value of `--vllm-args`. vLLM checks the arguments that are not needed here.

    Args:
        text (`str`, *optional*):
            Arguments of `vllm serve`, quoted as in a shell.

    Returns:
        `VLLMArguments`: The arguments.

    Raises:
        ValueError: If the text cannot be split, an argument cannot be used here or is abbreviated, or a number of GPUs
            is invalid.
    """
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise ValueError(f"--vllm-args {text!r} cannot be split ({error}). Close the quotes in it.") from error
    words_with_dashes = _dashed(words)
    _check_names(words_with_dashes)
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("tensor", "pipeline", "data"):
        parser.add_argument(f"-{name[0]}p", f"--{name}-parallel-size", dest=name, type=_positive, default=1)
    parser.add_argument("--max-num-seqs", default="")
    parser.add_argument("--distributed-executor-backend")
    found, _ = parser.parse_known_args(words_with_dashes)
    shares_gpus = found.data > 1 or found.distributed_executor_backend == "ray"
    most = int(found.max_num_seqs) if found.max_num_seqs.isdigit() else None
    return VLLMArguments(tuple(words), found.tensor * found.pipeline, shares_gpus, found.data, most)


def _check_names(words: list[str]) -> None:
    for name in filter(None, map(_name, words)):
        if name in _OWN:
            hint = f"Use {_OWN[name]} of this command instead." if _OWN[name] else "Remove it: this command sets it."
            raise ValueError(f"--vllm-args contains {name}. {hint}")
        if name in _REFUSED:
            raise ValueError(f"--vllm-args contains {name}. {_REFUSED[name]}")
        # vLLM accepts abbreviations, which could not be told from other arguments here
        full = sorted(known for known in _NAMES if known.startswith(name) and name.startswith("--"))
        if name not in _NAMES and full:
            raise ValueError(f"--vllm-args contains {name}, an abbreviation. Write {' or '.join(full[:3])}.")


def _name(word: str) -> str | None:
    """Return the name of an argument, without `=VALUE`, `.KEY` and `no-`. `None` for a value, such as `-1`."""
    if not word.startswith("-") or word == "--" or word[1:2].isdigit():
        return None
    if word.startswith("-O"):  # -O3, -O=3, -O.level=3, -O 3
        return "--optimization-level"
    name = word.partition("=")[0].partition(".")[0]
    return f"--{name[5:]}" if name.startswith("--no-") else name


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _dashed(words: list[str]) -> list[str]:
    """Replace underscores in the names of arguments by dashes, as vLLM does."""
    parts = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words]
    return [name.replace("_", "-") + equals + value if name[:2] == "--" else name for name, equals, value in parts]


def answer_arguments(text: str | None) -> str | None:
    """
    Return the arguments that the answers of a model may depend on, such as `--quantization`.

    Args:
        text (`str`, *optional*):
            Arguments of `vllm serve`.

    Returns:
        `str` or `None`: The arguments without those that only concern hardware, memory and speed. `None` if there are
        none.
    """
    kept: list[str] = []
    operational = False
    for word in _dashed(shlex.split(text or "")):
        name = _name(word)
        if name is not None:
            operational = name in OPERATIONAL
        if not operational:
            option, _, value = word.partition("=") if name is not None else (word, "", "")
            kept += [option, value] if value else [option]
    return shlex.join(kept) or None


def visible_gpus() -> list[str]:
    """Return the names of the visible GPUs, as `CUDA_VISIBLE_DEVICES` lists them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    from torch.cuda import device_count

    return [str(number) for number in range(device_count())]


def gpu_groups(arguments: VLLMArguments, gpus: list[str]) -> list[list[str]]:
    """
    Divide GPUs among servers. GPUs that remain are not used.

    Args:
        arguments (`VLLMArguments`):
            Arguments of the servers.
        gpus (`list[str]`):
            The visible GPUs. Without any, there is one server, which finds its devices itself.

    Returns:
        `list[list[str]]`: The GPUs of each server.

    Raises:
        ValueError: If one copy of the model needs more GPUs than there are.
    """
    if not gpus or arguments.shares_gpus:
        return [gpus]
    if arguments.gpus > len(gpus):
        raise ValueError(
            f"--vllm-args asks for {arguments.gpus} GPUs (tensor-parallel-size x pipeline-parallel-size), but "
            f"{len(gpus)} are visible ({', '.join(gpus)}). Reduce them, or set CUDA_VISIBLE_DEVICES."
        )
    count = len(gpus) // arguments.gpus
    return [gpus[number * arguments.gpus : (number + 1) * arguments.gpus] for number in range(count)]
