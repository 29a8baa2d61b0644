"""Models and pairs for `benchmark_throughput.py`: random weights, and random words with realistic lengths."""

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
    # 10 million parameters. The vocabulary is small for the reason in `CPU_NOTE`
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
SIGMA = math.sqrt(math.log(1 + 0.5**2))  # log-normal scale for a coefficient of variation of 0.5


class Writer:
    """
    Generator of random words, with log-normally distributed lengths.

    Args:
        vocabulary (`int`):
            Vocabulary size of the model.
        seed (`int`):
            Random seed.
    """

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.vocabulary = vocabulary

    def length(self, median: int) -> int:
        """Draw a length in words, clipped to between a fifth and four times the median."""
        return int(np.clip(self.rng.lognormal(math.log(median), SIGMA), median / 5, median * 4))

    def words(self, number: int) -> str:
        """Return `number` random words, each with a leading space."""
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
        initial += writer.words(writer.length(55))  # another step than the preferred one
    return pairs


def _ultrafeedback(writer: Writer) -> list[dict[str, str]]:
    medians = {"prompt": 170, "chosen": 300, "rejected": 300}
    return [{name: writer.words(writer.length(median)) for name, median in medians.items()}]


# Each function returns the pairs of one problem
LENGTHS: dict[str, Callable[[Writer], list[dict[str, str]]]] = {
    "math-step-dpo": _math_step_dpo,
    "long": lambda writer: _math_step_dpo(writer, prefix=2000),
    "four-per-problem": _four_per_problem,
    "ultrafeedback": _ultrafeedback,
    "equal": lambda writer: [_step_pair(writer, 300, 60, 60)],
}


def write_pairs(lengths: str, number: int, vocabulary: int, seed: int) -> Dataset:
    """
    Create pairs of random words.

    Args:
        lengths (`str`):
            Distribution of the lengths, a key of `LENGTHS`.
        number (`int`):
            Number of pairs.
        vocabulary (`int`):
            Vocabulary size of the model.
        seed (`int`):
            Random seed.

    Returns:
        `Dataset`: The pairs. Pairs of the same problem are adjacent.
    """
    writer, pairs = Writer(vocabulary, seed), list[dict[str, str]]()
    while len(pairs) < number:
        pairs += LENGTHS[lengths](writer)
    return Dataset.from_list(pairs[:number])


def load_pairs(dataset: str, number: int, seed: int) -> Dataset:
    """
    Load pairs from the Hub or a file and draw a random sample.

    Args:
        dataset (`str`):
            Dataset id, or path of a JSON Lines or Parquet file.
        number (`int`):
            Number of pairs to draw.
        seed (`int`):
            Random seed.

    Returns:
        `Dataset`: The sampled pairs.

    Raises:
        SystemExit: If the dataset has fewer than `number` pairs.
    """
    if Path(dataset).is_file():
        kind = "parquet" if dataset.endswith(".parquet") else "json"
        pairs = load_dataset(kind, data_files=dataset, split="train")
    else:
        pairs = load_dataset(dataset, split="train")
    if len(pairs) < number:
        raise SystemExit(
            f"{dataset} has only {len(pairs)} pairs, but the benchmark needs rounds * (steps + 2) * batch size = "
            f"{number}. Decrease --rounds, --steps or --batch-size."
        )
    return pairs.shuffle(seed=seed).select(range(number))


def load_tokenizer(model: str | None, vocabulary: int) -> Any:
    """Load the tokenizer of `model`, or create one in which each word of a [`Writer`] is a token."""
    if model is not None:
        return AutoTokenizer.from_pretrained(model)
    special = {token: index for index, token in enumerate(SPECIAL_TOKENS.values())}
    words = {f"w{word}": word for word in range(len(special), vocabulary)}
    tokenizer = Tokenizer(WordLevel(special | words, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def load_config(name: str) -> PretrainedConfig:
    """Return an entry of `CONFIGS`, or load a `config.json` by its path or its folder."""
    return CONFIGS[name] if name in CONFIGS else AutoConfig.from_pretrained(name)


def load_model(model: str | None, config: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load `model` on the device, or create a model with random weights from `config`."""
    if model is not None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return loaded.to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(load_config(config), dtype=dtype)


def share_weights(model: PreTrainedModel) -> Any:
    """Copy a model without copying its parameters, which both models then share."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def count_linear(model: Any) -> int:
    """Count the parameters that every token is multiplied by, that is, all but the embeddings and the head."""
    ends = {id(end.weight): end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    return int(model.num_parameters()) - sum(weight.numel() for weight in ends.values())
