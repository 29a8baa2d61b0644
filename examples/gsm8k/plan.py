"""Settings of the comparison, the methods, and the command lines that train and evaluate them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepdpo_trl.quickstart import MODEL_PATH

# Over two decades. Full fine-tuning needs smaller steps than an adapter
LORA_RATES = (3e-6, 3e-5, 3e-4)
FULL_RATES = (1e-7, 1e-6, 1e-5)
MICRO_BATCH = 2  # pairs in memory at the same time


@dataclass(frozen=True)
class Method:
    """
    Training method.

    Args:
        title (`str`):
            Name in the tables.
        data (`str`):
            Name of its file in the folder `data`.
        is_sft (`bool`, *optional*, defaults to `False`):
            Whether it is supervised fine-tuning, which has no beta.
        is_staged (`bool`, *optional*, defaults to `False`):
            Whether it is sDPO, whose data has a column `stage`.
    """

    title: str
    data: str
    is_sft: bool = False
    is_staged: bool = False


BASE, LOOP, STEP, RANDOM = "base", "loop", "step-dpo", "step-dpo-random"
METHODS = {
    "sft": Method("SFT on right solutions", "right", is_sft=True),
    "dpo-whole": Method("DPO on whole solutions of the pairs", "whole"),
    "dpo-pairs": Method("DPO on independent solutions, as many pairs", "independent-pairs"),
    "dpo-tokens": Method("DPO on independent solutions, as many sampled tokens", "independent-tokens"),
    STEP: Method("Step-DPO", "step"),
    "sdpo": Method("sDPO in two stages, easy to hard", "staged", is_staged=True),
    RANDOM: Method("Step-DPO, steps located at random", "random"),
}
TITLES = {BASE: "before training", **{name: method.title for name, method in METHODS.items()}}
TITLES[LOOP] = "Step-DPO and one more iteration"


@dataclass(frozen=True)
class Settings:
    """
    Settings that must not change when the comparison is resumed.

    Args:
        model (`str`, *optional*):
            Model id or folder.
        train (`str`, *optional*, defaults to `"gsm8k"`), test (`str`, *optional*, defaults to `"gsm8k"`):
            Training and test problems: a name of `stepdpo data` and `stepdpo eval`, or a file.
        train_limit (`int`, *optional*), test_limit (`int`, *optional*):
            Number of problems, from the first. Defaults to all.
        held_out (`int`, *optional*, defaults to `473`):
            Number of training problems, from the last, that are used for tuning only.
        prompt (`str`, *optional*, defaults to `"qwen2-boxed"`):
            Prompt of `stepdpo data` and `stepdpo eval`.
        num_samples, temperature, top_p, max_new_tokens, judge, num_rollouts, max_attempts (*optional*):
            Options of `stepdpo data`.
        shards (`int`, *optional*, defaults to `40`):
            Number of parts of the training problems. They are sampled one after the other until there are enough
            pairs.
        pairs (`int`, *optional*, defaults to `1000`):
            Number of step pairs to train on.
        rates (`tuple[float, ...]`, *optional*), betas (`tuple[float, ...]`, *optional*, defaults to `(0.1, 0.5)`):
            Grid of learning rates and values of beta. SFT tries as many learning rates as there are combinations.
        epochs (`float`, *optional*, defaults to `1.0`):
            Number of epochs.
        batch (`int`, *optional*, defaults to `8`):
            Number of pairs per update.
        full (`bool`, *optional*, defaults to `False`):
            Whether to train all weights instead of an adapter.
        rank (`int`, *optional*, defaults to `16`):
            Rank of the adapter.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Data type of the weights. Full fine-tuning keeps them in float32 and computes in this type.
        eval_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens of a solution in evaluations.
        eval_temperature (`float`, *optional*, defaults to `0.7`):
            Temperature of the second evaluation, which samples one solution per problem.
        backend (`str`, *optional*, defaults to `"transformers"`):
            Inference backend of the evaluations.
        runs (`tuple[str, ...]`, *optional*, defaults to `()`):
            Folders of existing runs of `stepdpo data`, to use instead of sampling.
    """

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    train: str = "gsm8k"
    test: str = "gsm8k"
    train_limit: int | None = None
    test_limit: int | None = None
    held_out: int = 473
    prompt: str = "qwen2-boxed"
    num_samples: int = 4
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 400
    judge: str = "arithmetic,rollout"
    num_rollouts: int = 4
    max_attempts: int = 8
    shards: int = 40
    pairs: int = 1000
    rates: tuple[float, ...] = LORA_RATES
    betas: tuple[float, ...] = (0.1, 0.5)
    epochs: float = 1.0
    batch: int = 8
    full: bool = False
    rank: int = 16
    dtype: str = "bfloat16"
    eval_tokens: int = 512
    eval_temperature: float = 0.7
    backend: str = "transformers"
    runs: tuple[str, ...] = ()

    def trials(self, method: Method) -> list[tuple[float, float]]:
        """Return the learning rates and values of beta to try, in ascending order. All methods have as many."""
        if not method.is_sft:
            return [(rate, beta) for rate in sorted(self.rates) for beta in sorted(self.betas)]
        count, low, high = len(self.rates) * len(self.betas), min(self.rates), max(self.rates)
        ratios = [index / (count - 1) for index in range(count)] if count > 1 else [0.0]
        return [(float(f"{low * (high / low) ** ratio:.2g}"), 0.0) for ratio in ratios]


def quick_settings(settings: Settings) -> Settings:
    """Return settings with which the whole comparison takes about ten minutes, without useful results."""
    return replace(
        settings,
        model=str(MODEL_PATH),
        train="arithmetic",
        test="arithmetic",
        train_limit=40,
        test_limit=16,
        held_out=8,
        prompt="plain",
        num_samples=3,
        temperature=1.0,
        max_new_tokens=96,
        judge="arithmetic",
        shards=2,
        pairs=4,
        rates=(3e-3,),  # a few updates must change some solutions
        betas=(0.1,),
        epochs=4.0,
        batch=2,
        rank=4,
        dtype="float32",
        eval_tokens=96,
    )


@dataclass(frozen=True)
class Connection:
    """
    Where models run. It may change when the comparison is resumed.

    Args:
        base_url (`str`, *optional*):
            Server of the initial model, for sampling solutions.
        served_model (`str`, *optional*):
            Name of the model on the server.
        concurrency (`int`, *optional*):
            Number of requests that the server receives at the same time.
        vllm_args (`str`, *optional*):
            Arguments of `vllm serve`, with the backend vllm.
    """

    base_url: str | None = None
    served_model: str | None = None
    concurrency: int | None = None
    vllm_args: str | None = None


def backend_options(settings: Settings, connection: Connection) -> list[str]:
    """Return the options of the inference backend that loads the models itself."""
    vllm = ["--vllm-args", connection.vllm_args] if settings.backend == "vllm" and connection.vllm_args else []
    return ["--backend", settings.backend, "--dtype", settings.dtype, *vllm]


def policy_options(settings: Settings, connection: Connection) -> list[str]:
    """Return the options of `stepdpo data` and `stepdpo collect` for the initial model."""
    if connection.base_url is None:
        return ["--model", settings.model, *backend_options(settings, connection)]
    model = connection.served_model or settings.model
    count = ["--max-concurrent-requests", str(connection.concurrency)] if connection.concurrency else []
    return ["--model", model, "--base-url", connection.base_url, "--tokenizer", settings.model, *count]


def sampling_options(settings: Settings) -> list[str]:
    """Return the options of `stepdpo data` and `stepdpo collect` for sampling, without the number of samples."""
    named = ("prompt", "temperature", "top_p", "max_new_tokens")
    return [word for name in named for word in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]


def data_options(settings: Settings, exclude: Sequence[Path]) -> list[str]:
    """Return the options of `stepdpo data` that are not about models and files."""
    words = [*sampling_options(settings), "--num-samples", str(settings.num_samples), "--judge", settings.judge]
    words += ["--num-rollouts", str(settings.num_rollouts)] if "rollout" in settings.judge else []
    words += ["--max-attempts", str(settings.max_attempts)]
    return words + [word for file in exclude for word in ("--exclude", str(file))]


def training_options(settings: Settings, rate: float, seed: int, on_cpu: bool) -> list[str]:
    """Return the options that `stepdpo train` and `trl sft` share, without model, data and output folder."""
    micro_batch = MICRO_BATCH if settings.batch % MICRO_BATCH == 0 else 1
    options: dict[str, Any] = {
        "learning_rate": rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": settings.batch // micro_batch,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "seed": seed,
        "dtype": "float32" if settings.full else settings.dtype,
        "bf16": settings.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "save_steps": 0.2,
        "save_total_limit": 1,
        "logging_steps": 5,
        "report_to": "none",
    }
    if not settings.full:
        options |= {"use_peft": True, "lora_r": settings.rank, "lora_alpha": 2 * settings.rank, "lora_dropout": 0.0}
        options |= {"lora_target_modules": "all-linear"}
    return [word for name, value in options.items() for word in (f"--{name}", str(value).lower())]


def preference_options(method: Method, beta: float) -> list[str]:
    """Return the options of `stepdpo train` that `trl sft` does not have."""
    return [
        "--beta",
        str(beta),
        "--precompute_ref_log_probs",
        "true",
        *(["--sdpo", "true"] if method.is_staged else []),
    ]


def eval_options(settings: Settings, temperature: float) -> list[str]:
    """Return the options of `stepdpo eval` that are not about models and files."""
    words = ["--prompt", settings.prompt, "--max-new-tokens", str(settings.eval_tokens)]
    return [*words, "--temperature", str(temperature)]
