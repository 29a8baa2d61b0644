"""Models and pairs for `benchmark_throughput.py`: random weights, random words, lengths as in real data."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CONFIGS = {
    # 10 million parameters. A large vocabulary would flatter whoever scores fewer positions, see `CPU_NOTE`
    "small": Qwen2Config(
        vocab_size=2000,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    ),
}
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
SIGMA = math.sqrt(math.log(1 + 0.5**2))  # of the logarithm, for a coefficient of variation of 0.5


class Writer:
    """
    Writes random words, in amounts that are log-normal around a median.

    Args:
        vocabulary (`int`): Tokens of the model.
        seed (`int`): Seed.
    """

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.vocabulary = vocabulary

    def length(self, median: int) -> int:
        """Draw a length, between a fifth and four times the median."""
        return int(np.clip(self.rng.lognormal(math.log(median), SIGMA), median / 5, median * 4))

    def words(self, number: int) -> str:
        """Write so many words, each with a space in front."""
        return "".join(f" w{word}" for word in self.rng.integers(len(SPECIAL_TOKENS), self.vocabulary, number))


def _step_pair(writer: Writer, prefix: int, chosen: int, rejected: int) -> dict[str, str]:
    problem = 2 * prefix // 5
    return {
        "prompt": writer.words(problem),
        "initial_reason_steps": writer.words(prefix - problem),
        "chosen": writer.words(chosen),
        "rejected": writer.words(rejected),
    }


def _math_step_dpo(writer: Writer, prefix: int = 250) -> list[dict[str, str]]:
    return [_step_pair(writer, writer.length(prefix), writer.length(55), writer.length(55))]


def _four_per_problem(writer: Writer) -> list[dict[str, str]]:
    problem, initial, pairs = writer.words(writer.length(150)), "", []
    for _ in range(4):
        steps = {name: writer.words(writer.length(55)) for name in ("chosen", "rejected")}
        pairs.append({"prompt": problem, "initial_reason_steps": initial, **steps})
        initial += writer.words(writer.length(55))  # a right step, but not the one that the pair prefers
    return pairs


def _ultrafeedback(writer: Writer) -> list[dict[str, str]]:
    medians = {"prompt": 170, "chosen": 300, "rejected": 300}
    return [{name: writer.words(writer.length(median)) for name, median in medians.items()}]


# What each writes is the pairs of one problem
LENGTHS: dict[str, Callable[[Writer], list[dict[str, str]]]] = {
    "math-step-dpo": _math_step_dpo,
    "long": lambda writer: _math_step_dpo(writer, prefix=2000),
    "four-per-problem": _four_per_problem,
    "ultrafeedback": _ultrafeedback,
    "equal": lambda writer: [_step_pair(writer, 300, 60, 60)],
}


def write_pairs(lengths: str, number: int, vocabulary: int, seed: int) -> Dataset:
    """
    Write pairs of random words.

    Args:
        lengths (`str`): One of `LENGTHS`.
        number (`int`): How many pairs.
        vocabulary (`int`): Tokens of the model.
        seed (`int`): Seed.

    Returns:
        `Dataset`: The pairs, those of one problem next to each other.
    """
    writer, pairs = Writer(vocabulary, seed), list[dict[str, str]]()
    while len(pairs) < number:
        pairs += LENGTHS[lengths](writer)
    return Dataset.from_list(pairs[:number])


def load_pairs(dataset: str, number: int, seed: int) -> Dataset:
    """
    Load pairs from the Hub or a file, and draw some.

    Raises:
        SystemExit: If there are fewer.
    """
    if Path(dataset).is_file():
        kind = "parquet" if dataset.endswith(".parquet") else "json"
        pairs = load_dataset(kind, data_files=dataset, split="train")
    else:
        pairs = load_dataset(dataset, split="train")
    if len(pairs) < number:
        raise SystemExit(f"{dataset} has {len(pairs)} pairs, but rounds * (steps + 2) * batch size are {number}.")
    return pairs.shuffle(seed=seed).select(range(number))


def load_tokenizer(model: str | None, vocabulary: int) -> Any:
    """Load a model's tokenizer, or make one to which each word of a [`Writer`] is a token."""
    if model is not None:
        return AutoTokenizer.from_pretrained(model)
    special = {token: index for index, token in enumerate(SPECIAL_TOKENS.values())}
    words = {f"w{word}": word for word in range(len(special), vocabulary)}
    tokenizer = Tokenizer(WordLevel(special | words, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def load_config(name: str) -> PretrainedConfig:
    """Look up one of `CONFIGS`, or read a `config.json` or the folder that it is in."""
    return CONFIGS[name] if name in CONFIGS else AutoConfig.from_pretrained(name)


def load_model(model: str | None, config: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load `model`, or make one from its config, with random weights, where it is to be."""
    if model is not None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return loaded.to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(load_config(config), dtype=dtype)


def share_weights(model: PreTrainedModel) -> Any:
    """Copy a model but for its parameters, which both then hold."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def count_linear(model: Any) -> int:
    """Count the parameters by which every token is multiplied: all but embeddings and head."""
    ends = {id(end.weight): end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    return int(model.num_parameters()) - sum(weight.numel() for weight in ends.values())
