"""Solve the problems of [`~stepdpo_trl.quickstart.arithmetic`] with a model and count the correct solutions."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arithmetic import ArithmeticProblem, read_result


@torch.no_grad()
def generate_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[str],
    prefixes: Sequence[str] | None = None,
    temperature: float = 0.0,
    batch_size: int = 250,
    max_new_tokens: int = 256,
    description: str | None = None,
) -> list[str]:
    """
    Generate solutions with a model.

    Args:
        model (`PreTrainedModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model, with a chat template.
        problems (`Sequence[str]`):
            Texts of the problems, used as user turns.
        prefixes (`Sequence[str]`, *optional*):
            Beginning of each solution, which the model continues. Empty by default.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature, or 0 for greedy decoding. Sampling uses torch's global random number generator.
        batch_size (`int`, *optional*, defaults to `250`):
            Number of problems in a batch.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum number of generated tokens. 256 are enough for 10 steps.
        description (`str`, *optional*):
            Label of the progress bar. By default, no progress bar is shown.

    Returns:
        `list[str]`: The solutions including their prefixes, in the order of the problems.
    """
    prefixes = [""] * len(problems) if prefixes is None else prefixes
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
            )
        )
        + prefix
        for problem, prefix in zip(problems, prefixes, strict=True)
    ]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    generate: Any = model.generate
    was_training = model.training
    model.eval()
    # Batches of similar lengths need less padding
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    solutions = [""] * len(prompts)
    with tqdm(total=len(prompts), desc=description, disable=description is None, unit=" problems") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer(
                [prompts[index] for index in batch],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            output = generate(**inputs, **sampling, max_new_tokens=max_new_tokens)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                solutions[index] = prefixes[index] + text
            bar.update(len(batch))
    model.train(was_training)
    return solutions


def count_correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[ArithmeticProblem],
    temperature: float = 0.0,
    description: str | None = None,
) -> int:
    """
    Count the problems for which a model generates the correct final answer.

    Args:
        model (`PreTrainedModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        problems (`Sequence[ArithmeticProblem]`):
            The problems.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature, or 0 for greedy decoding. Sampling uses torch's global random number generator.
        description (`str`, *optional*):
            Label of the progress bar. By default, no progress bar is shown.

    Returns:
        `int`: Number of problems with a correct final answer.

    Raises:
        ValueError: If `problems` is empty.
    """
    if not problems:
        raise ValueError("`problems` is empty, so there is no accuracy to measure. Pass at least one problem.")
    texts = [problem.text for problem in problems]
    solutions = generate_solutions(model, tokenizer, texts, temperature=temperature, description=description)
    return sum(read_result(solution) == problem.answer for problem, solution in zip(problems, solutions, strict=True))
