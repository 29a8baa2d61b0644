"""
Process reward models, which score all steps of a solution in one forward pass.

Two input formats are supported. In both, the model has two classes: wrong and right.

- Qwen2.5-Math-PRM: the steps form the assistant's turn, and each is followed by the token `<extra_0>`. The classes
  are read at these tokens.
- Models with a token classification head, as trained by TRL's `PRMTrainer`: the problem and each step are followed by
  a separator. The classes are read at the last token of each separator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, PreTrainedTokenizerBase

from ...data.prompts import PROMPT_SUFFIXES
from ...generation import GenerationError
from ...runs.log import Log
from ...runs.progress import progress_bar
from .prm import PRMRequest

QWEN_SEPARATOR = "<extra_0>"
QWEN_SYSTEM = PROMPT_SUFFIXES["step-dpo"].strip()


class ProcessRewardModel:
    """
    Process reward model that scores steps.

    Args:
        model (`PreTrainedModel`):
            The model. The first entry of its output has the shape `(batch, seq, 2)`.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer. If `<extra_0>` is in its vocabulary, the format of Qwen2.5-Math-PRM is used.
        separator (`str`, *optional*, defaults to `"\\n"`):
            Text appended to the problem and to each step in the other format.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of solutions per batch.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, separator: str = "\n", batch_size: int = 8
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.separator, self.batch_size = separator, batch_size
        extra = tokenizer.convert_tokens_to_ids(QWEN_SEPARATOR)
        self.extra = extra if isinstance(extra, int) and extra != tokenizer.unk_token_id else None

    @classmethod
    def load(cls, name: str, trust_remote_code: bool = False) -> "ProcessRewardModel":
        """
        Load a process reward model, on a GPU if available.

        Args:
            name (`str`):
                Hub id or folder.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether to run code from the model's repository.

        Returns:
            `ProcessRewardModel`: The model.

        Raises:
            GenerationError: If the model cannot be loaded.
        """
        from transformers import AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            options = {"trust_remote_code": trust_remote_code}
            config = AutoConfig.from_pretrained(name, **options)
            custom = "ForProcessRewardModel" in str(config.architectures)
            auto_class: Any = AutoModel if custom else AutoModelForTokenClassification
            model = auto_class.from_pretrained(name, config=config, dtype="auto", device_map=device, **options)
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except Exception as error:  # of any type for damaged files, or pickles that would run code
            raise GenerationError(f"The process reward model {name!r} cannot be loaded: {error}") from error
        return cls(model, tokenizer)

    def encode(self, problem: str, steps: Sequence[str]) -> tuple[list[int], list[int]] | None:
        """
        Tokenize a solution.

        Args:
            problem (`str`):
                The problem.
            steps (`Sequence[str]`):
                The steps.

        Returns:
            `tuple[list[int], list[int]]` or `None`: Token ids, and the position at which each step is scored. `None`
            if the problem or a step contains the token `<extra_0>`, so that the steps cannot be told apart.
        """
        if self.extra is not None:
            messages = [
                {"role": "system", "content": QWEN_SYSTEM},
                {"role": "user", "content": problem},
                {"role": "assistant", "content": QWEN_SEPARATOR.join(steps) + QWEN_SEPARATOR},
            ]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            positions = [position for position, token in enumerate(ids) if token == self.extra]
        else:
            bos = self.tokenizer.bos_token_id
            ids = [] if bos is None else [bos]
            positions = []
            for text in (problem, *steps):
                ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += self.tokenizer(self.separator, add_special_tokens=False)["input_ids"]
                positions.append(len(ids) - 1)
            positions = positions[1:]  # the problem has no score
        return (ids, positions) if len(positions) == len(steps) else None

    @torch.no_grad()
    def score(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[list[float] | None]:
        """
        Score the steps of several solutions in one batch.

        Args:
            requests (`Sequence[tuple[str, Sequence[str]]]`):
                Problem and steps of each solution.

        Returns:
            `list[list[float] | None]`: Probability that a step is right, for each step of each solution. `None` for
            a solution that cannot be encoded or whose probabilities are not numbers.
        """
        found = [self.encode(problem, steps) for problem, steps in requests]
        encoded = [tokens for tokens in found if tokens is not None]
        scores = iter(self._scores(encoded) if encoded else [])
        return [None if tokens is None else next(scores) for tokens in found]

    def _scores(self, encoded: Sequence[tuple[list[int], list[int]]]) -> list[list[float] | None]:
        width = max(len(ids) for ids, _ in encoded)
        pad = self.tokenizer.pad_token_id or 0
        device = self.model.device
        output = self.model(
            input_ids=torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in encoded], device=device),
            attention_mask=torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in encoded], device=device),
            use_cache=False,
        )
        right = output[0].float().softmax(-1)[..., 1].cpu()
        scores = [right[row, positions] for row, (_, positions) in enumerate(encoded)]
        return [None if each.isnan().any() else each.tolist() for each in scores]


class RecordedPRM:
    """
    Service of a process reward model. Its scores are stored.

    Args:
        model (`ProcessRewardModel`):
            The model.
        log (`Log`):
            Log for the scores.
    """

    def __init__(self, model: ProcessRewardModel, log: Log) -> None:
        self.model, self.log = model, log
        self.answered = 0  # requests of this process

    def answer(self, requests: Sequence[PRMRequest]) -> dict[str, dict[str, Any]]:
        """
        Score solutions, and read the scores of those that are scored already.

        Args:
            requests (`Sequence[PRMRequest]`):
                The solutions.

        Returns:
            `dict[str, dict]`: Records with the entry `"scores"`, by key. It is `None` if there are no scores.
        """
        todo = sorted((r for r in requests if r.key not in self.log), key=lambda r: sum(map(len, r.steps)))
        size = self.model.batch_size
        for start in progress_bar(range(0, len(todo), size), "  prm", unit=" batches", leave=False, disable=not todo):
            batch = todo[start : start + size]
            scores = self.model.score([(request.problem, request.steps) for request in batch])
            self.log.extend((request.key, {"scores": each}) for request, each in zip(batch, scores, strict=True))
            self.answered += len(batch)
        return {request.key: self.log[request.key] for request in requests}
