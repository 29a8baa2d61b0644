"""Generation with transformers, in batches of similar length. Runs on any device."""

import logging
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .chat import encode, load_tokenizer, render
from .protocol import DEFAULT_BATCH_SIZE, Completion, GenerationError, ModelSpec, Request, Sampling

logger = logging.getLogger(__name__)

# This many of the most likely tokens nearly always cover the probability mass of top-p
MOST_LIKELY = 1024


class SeededSampling(LogitsProcessor):
    """
    Sample each row of a batch with its own seed, independently of the other rows.

    For each position, one uniform number is drawn from the row's seed. The sampled token is the one where this number
    falls on the cumulative distribution (inverse transform sampling). All other tokens get a score of `-inf`, so that
    greedy decoding returns the sampled token.

    Args:
        seeds (`list[int]`):
            One seed per row.
        sampling (`Sampling`):
            Sampling parameters. The temperature must not be 0.
        prompt_length (`int`):
            Length of the padded prompts in tokens.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, prompt_length: int) -> None:
        self.sampling, self.prompt_length = sampling, prompt_length
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniform = torch.stack([torch.rand(sampling.max_new_tokens, generator=g) for g in generators])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Sample one token per row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`):
                Prompts and the tokens generated so far.
            scores (`torch.FloatTensor` of shape `(batch, vocab)`):
                Logits of the next token.

        Returns:
            `torch.FloatTensor` of shape `(batch, vocab)`: 0 for the sampled token, `-inf` for all others.
        """
        probabilities = (scores.float() / self.sampling.temperature).softmax(-1)
        # Sorting a whole vocabulary takes longer than a small model's forward pass
        sorted_, order = probabilities.topk(min(self.sampling.top_k or MOST_LIKELY, probabilities.shape[-1]))
        if self.sampling.top_k:
            sorted_ = sorted_ / sorted_.sum(-1, keepdim=True)
        elif (sorted_.sum(-1) < self.sampling.top_p).any():
            sorted_, order = probabilities.sort(descending=True)
        cumulative = sorted_.cumsum(-1)
        kept = cumulative - sorted_ < self.sampling.top_p  # includes the token that reaches top_p
        mass = (sorted_ * kept).sum(-1, keepdim=True)
        drawn = self.uniform[:, input_ids.shape[1] - self.prompt_length, None].to(scores.device) * mass
        last = kept.sum(-1, keepdim=True) - 1
        token = order.gather(-1, torch.minimum((cumulative <= drawn).sum(-1, keepdim=True), last))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0)  # type: ignore[return-value]


class CheckedScores(LogitsProcessor):
    """
    Check that the scores of a model are numbers. A model with NaN would otherwise end in an error about an index.

    Args:
        name (`str`):
            Name of the model for the error message.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Return the scores.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`):
                Prompts and the tokens generated so far.
            scores (`torch.FloatTensor` of shape `(batch, vocab)`):
                Logits of the next token.

        Raises:
            GenerationError: If the highest score of a row is not finite.
        """
        if not scores.amax(-1).isfinite().all():
            raise GenerationError(
                f"The scores of the model {self.name!r} are not a number (NaN or infinite). Its training may have "
                "diverged, or its numbers exceed the range of --dtype float16. Use another model, or another dtype."
            )
        return scores


class TransformersGenerator:
    """
    Generator that runs a model in transformers.

    Args:
        model (`PreTrainedModel`):
            The model. Its `generation_config` is replaced by one without penalties and filters, so that completions
            come from the distribution that is trained.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of sequences per batch.

    Raises:
        GenerationError: If neither the model nor the tokenizer has an EOS token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = DEFAULT_BATCH_SIZE
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends = [ends] if isinstance(ends, int) else list(ends or [])
        if not self.ends:
            raise GenerationError(
                "Neither the model nor the tokenizer has an EOS token, so completions would never end. Set "
                "`tokenizer.eos_token`."
            )
        self.pad = self.ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._warned = False
        model.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)

    @classmethod
    def load(cls, spec: ModelSpec) -> "TransformersGenerator":
        """
        Load a model, on a GPU if available.

        Args:
            spec (`ModelSpec`):
                The model.

        Returns:
            `TransformersGenerator`: The generator.

        Raises:
            GenerationError: If the model, its tokenizer or its adapter cannot be loaded.
        """
        tokenizer = load_tokenizer(spec.tokenizer or spec.model, revision=spec.tokenizer_revision)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "float32" if spec.dtype == "auto" and device == "cpu" else spec.dtype
        try:
            model = AutoModelForCausalLM.from_pretrained(
                spec.model, revision=spec.revision, dtype=dtype, device_map=device
            )
        except Exception as error:  # of any type for damaged files, or pickles that would run code
            raise GenerationError(f"The model {spec.model!r} cannot be loaded: {error}") from error
        if spec.adapter is not None:
            model = _load_adapter(model, spec)
        return cls(model, tokenizer, spec.batch_size or DEFAULT_BATCH_SIZE)

    def render(self, user: str, response_prefix: str) -> str:
        """Render a user message with the chat template, followed by the first words of the assistant's turn."""
        return render(self.tokenizer, [{"role": "user", "content": user}], response_prefix)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, done: Container[str]
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """
        Complete requests in batches, see [`~stepdpo_trl.generation.Generator`].

        A batch with at least one unanswered request is generated as a whole.
        """
        ids = {request.key: self._encode(request) for request in requests}
        self._warn_if_too_long(max(map(len, ids.values()), default=0), sampling)
        # Similar lengths in one batch need less padding
        ordered = sorted(requests, key=lambda request: (len(ids[request.key]), request.key))
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            if all(request.key in done for request in batch):
                continue
            prompts, seeds = [ids[request.key] for request in batch], [request.seed for request in batch]
            completions = zip(batch, self._run(prompts, seeds, sampling), strict=True)
            yield [(request, completion) for request, completion in completions if request.key not in done]

    def _warn_if_too_long(self, prompt_length: int, sampling: Sampling) -> None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions and prompt_length + sampling.max_new_tokens > positions and not self._warned:
            self._warned = True
            logger.warning(
                f"Prompts of up to {prompt_length} tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
                f"model's context of {positions} tokens. Text beyond it is unusable. Reduce max_new_tokens."
            )

    def _encode(self, request: Request) -> list[int]:
        return encode(self.tokenizer, request)

    @torch.no_grad()
    def _run(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        width = max(map(len, prompts))
        device = self.model.device
        processors: list[LogitsProcessor] = [CheckedScores(self.model.config.name_or_path)]
        if sampling.temperature:
            processors.append(SeededSampling(seeds, sampling, width))
        generate: Any = self.model.generate
        rows = generate(
            input_ids=torch.tensor([[self.pad] * (width - len(ids)) + ids for ids in prompts], device=device),
            attention_mask=torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in prompts], device=device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList(processors),
        )
        return [self._completion(ids, row) for ids, row in zip(prompts, rows[:, width:].tolist(), strict=True)]

    def _completion(self, prompt: list[int], row: list[int]) -> Completion:
        end = next((position for position, token in enumerate(row) if token in self.ends), None)
        # Decoded together with the last prompt token, since some tokenizers drop a leading space
        last = self._decode(prompt[-1:])
        text = self._decode(prompt[-1:] + row[:end])
        text = text[len(last) :] if text.startswith(last) else self._decode(row[:end])
        reason, length = ("length", len(row)) if end is None else ("stop", end + 1)
        return Completion(text, reason, len(prompt), length)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _load_adapter(model: PreTrainedModel, spec: ModelSpec) -> Any:
    from peft import PeftModel

    assert spec.adapter is not None
    try:
        adapted = PeftModel.from_pretrained(model, spec.adapter)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: shapes differ
        raise GenerationError(
            f"The adapter {spec.adapter!r} cannot be loaded on top of {spec.model!r}: {error}"
        ) from error
    base = adapted.active_peft_config.base_model_name_or_path
    if base and Path(base).name != Path(spec.model).name:
        logger.warning(f"The adapter {spec.adapter!r} was trained on {base!r}, but is loaded on {spec.model!r}.")
    return adapted
