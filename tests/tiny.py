"""Tiny models, tokenizers and datasets, created on the fly."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["Let's think step by step.\nStep 1: 12 + 30 = 42\nStep 2: the answer is therefore 42 - 7 = 35."] * 3


def byte_level_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Create a byte-level BPE tokenizer as in GPT-2, Qwen and Llama 3, optionally with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS)
    backend.train_from_iterator(CORPUS, trainer)
    eos = "<|im_end|>" if chat_template else "</s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token="<pad>", chat_template=chat_template
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer as in Llama 2: "▁" for spaces and before every text, byte fallback, and a BOS token."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted({c for text in CORPUS for c in text if c not in "\n "} | {"▁"})
    merges = [("S", "t"), ("St", "e"), ("Ste", "p"), ("▁", "Step"), ("▁", "="), ("▁", "▁"), ("▁", "+"), ("▁", "t")]
    merges += [("1", "2"), ("4", "2"), ("▁", "1"), ("▁", "4"), (":", "▁")]
    tokens = ["<unk>", *SPECIAL_TOKENS, *byte_tokens, *characters, *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Create a character tokenizer: `characters[i]` has id `i`, followed by `<pad>` and `</s>`."""
    vocab = {character: index for index, character in enumerate([*characters, "<pad>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "chat": lambda: byte_level_tokenizer(CHATML),
}


def tiny_model(vocab_size: int, seed: int = 0) -> Qwen2ForCausalLM:
    """Create a two-layer Qwen2 whose weights are large enough for clearly different probabilities."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).float()


def save_tiny_model(path: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> str:
    """Save a tiny model and its tokenizer, and return the path."""
    tiny_model(len(tokenizer), seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def step_rows(number: int = 8) -> list[dict[str, str]]:
    """Create step pairs of different lengths, some with an empty prefix."""
    rows = []
    for i in range(number):
        steps = "".join(f"Step {k + 1}: {i} + {k} = {i + k}\n" for k in range(i % 3))
        rows.append(
            {
                "prompt": f"What is {i} + {i % 3}?" + " Please." * (i % 4),
                "initial_reason_steps": f"Let's think step by step.\n{steps}Step {i % 3 + 1}:" if i % 4 else "",
                "chosen": f" {i} + {i % 3} = {i + i % 3}" + " indeed" * (i % 2),
                "rejected": f" {i} + {i % 3} = {i + i % 3 + 1}",
            }
        )
    return rows


def plain_rows(number: int = 8) -> list[dict[str, str]]:
    """Create ordinary preference pairs."""
    return [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in step_rows(number)
    ]
