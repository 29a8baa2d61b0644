"""
Process reward models: how likely each step of a solution is right, in one forward pass.

- Layout of Qwen2.5-Math-PRM: the steps are the assistant's turn, each followed by the token `<extra_0>`, at which the
  model's two classes (wrong, right) are read.
- Heads for token classification with two labels: problem and steps, each followed by a separator, at whose last token
  the classes are read (as TRL's PRMTrainer made them).
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, PreTrainedTokenizerBase

from ...data.prompts import PROMPT_SUFFIXES
from ...generation import GenerationError
from ...runs.run_directory import Log
from .prm import PRMRequest

QWEN_SEPARATOR = "<extra_0>"
QWEN_SYSTEM = PROMPT_SUFFIXES["step-dpo"].strip()


class ProcessRewardModel:
    """
    Scores steps.

    Args:
        model (`PreTrainedModel`):
            The model; what it returns has `logits` (or a first entry) of shape `(batch, seq, 2)`.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer. With `<extra_0>` in its vocabulary the layout of Qwen2.5-Math-PRM is used.
        separator (`str`, *optional*, defaults to `"\\n"`):
            What follows problem and steps in the other layout.
        batch_size (`int`, *optional*, defaults to `8`):
            Solutions at once.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, separator: str = "\n", batch_size: int = 8
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.separator, self.batch_size = separator, batch_size
        extra = tokenizer.convert_tokens_to_ids(QWEN_SEPARATOR)
        self.extra = extra if isinstance(extra, int) and extra != tokenizer.unk_token_id else None

    @classmethod
    def load(cls, name: str, batch_size: int = 8, trust_remote_code: bool = False) -> "ProcessRewardModel":
        """
        Load a model, on a GPU if there is one.

        Raises:
            GenerationError: If it cannot be loaded.
        """
        from transformers import AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            options = {"trust_remote_code": trust_remote_code}
            config = AutoConfig.from_pretrained(name, **options)
            own = "ForProcessRewardModel" in str(config.architectures)
            kind: Any = AutoModel if own else AutoModelForTokenClassification
            model = kind.from_pretrained(name, config=config, dtype="auto", device_map=device, **options)
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise GenerationError(f"The process reward model {name!r} cannot be loaded: {error}") from error
        return cls(model, tokenizer, batch_size=batch_size)

    def encode(self, problem: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Token ids, and the places of the tokens at which the steps are scored."""
        if self.extra is not None:
            messages = [
                {"role": "system", "content": QWEN_SYSTEM},
                {"role": "user", "content": problem},
                {"role": "assistant", "content": QWEN_SEPARATOR.join(steps) + QWEN_SEPARATOR},
            ]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            places = [place for place, token in enumerate(ids) if token == self.extra]
        else:
            bos = self.tokenizer.bos_token_id
            ids = [] if bos is None else [bos]
            places = []
            for text in (problem, *steps):
                ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += self.tokenizer(self.separator, add_special_tokens=False)["input_ids"]
                places.append(len(ids) - 1)
            places = places[1:]
        if len(places) != len(steps):
            raise GenerationError(f"A step holds {QWEN_SEPARATOR!r} itself, so steps and scores cannot be told apart.")
        return ids, places

    @torch.no_grad()
    def score(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """
        Score solutions.

        Args:
            requests (`Sequence[tuple[str, Sequence[str]]]`):
                Problem and steps of each.

        Returns:
            `list[list[float]]`: Probability of each step to be right.
        """
        encoded = [self.encode(problem, steps) for problem, steps in requests]
        width = max(len(ids) for ids, _ in encoded)
        pad = self.tokenizer.pad_token_id or 0
        device = self.model.device
        output = self.model(
            input_ids=torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in encoded], device=device),
            attention_mask=torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in encoded], device=device),
            use_cache=False,
        )
        right = output[0].float().softmax(-1)[..., 1].cpu()
        return [right[row, places].tolist() for row, (_, places) in enumerate(encoded)]


class RecordedPRM:
    """
    A process reward model whose scores are kept on disk.

    Args:
        model (`ProcessRewardModel`):
            The model.
        log (`Log`):
            Where its scores are kept.
    """

    def __init__(self, model: ProcessRewardModel, log: Log) -> None:
        self.model, self.log = model, log

    def answer(self, requests: Sequence[PRMRequest]) -> dict[str, dict[str, Any]]:
        """Score what has not been scored yet."""
        todo = sorted((r for r in requests if r.key not in self.log), key=lambda r: sum(map(len, r.steps)))
        size = self.model.batch_size
        for start in tqdm(range(0, len(todo), size), "  prm", unit=" batches", leave=False, disable=not todo):
            part = todo[start : start + size]
            scores = self.model.score([(request.problem, request.steps) for request in part])
            self.log.extend((request.key, {"scores": s}) for request, s in zip(part, scores, strict=True))
        return {request.key: self.log[request.key] for request in requests}
