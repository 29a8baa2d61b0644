"""Let a model solve the problems of [`~stepdpo_trl.quickstart.arithmetic`], and count the correct solutions."""

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
    Let a model solve problems.

    Args:
        model (`PreTrainedModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template.
        problems (`Sequence[str]`):
            What the user asks.
        prefixes (`Sequence[str]`, *optional*):
            How each solution begins, defaults to not at all.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature, 0 for greedy decoding. Sampling draws from torch's global generator.
        batch_size (`int`, *optional*, defaults to `250`):
            Problems solved at once.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Where a solution is cut at the latest; 256 is enough for 10 steps.
        description (`str`, *optional*):
            What to write beside the progress bar, defaults to no bar.

    Returns:
        `list[str]`: The solutions with their prefixes, in the order of the problems.
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
    # Prompts of like length side by side: less padding
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
    Count the problems that a model solves. A solution is correct if its final answer is.

    Args:
        model (`PreTrainedModel`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        problems (`Sequence[ArithmeticProblem]`):
            The problems.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature, 0 for greedy decoding. Sampling draws from torch's global generator.
        description (`str`, *optional*):
            What to write beside the progress bar, defaults to no bar.

    Returns:
        `int`: Number of correct solutions.

    Raises:
        ValueError: If there are no problems.
    """
    if not problems:
        raise ValueError("There are no problems to measure the accuracy on. Give at least one.")
    texts = [problem.text for problem in problems]
    solutions = generate_solutions(model, tokenizer, texts, temperature=temperature, description=description)
    return sum(read_result(solution) == problem.answer for problem, solution in zip(problems, solutions, strict=True))
