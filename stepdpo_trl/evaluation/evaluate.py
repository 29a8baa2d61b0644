"""Let models solve problems, and count. Every answer is on disk before it is used: a run that was killed goes on."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.prompts import StepPrompt
from ..generation import ModelSpec, Sampling
from ..generation.model_folders import fingerprint
from ..pipeline.collect import keep_problems, not_sampled
from ..pipeline.policy import Policy
from ..pipeline.records import Problem, text_digest
from ..pipeline.session import Session, model_file_name
from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import RecordedChecks, RecordedModel, Task
from .majority import ProblemAnswers, vote
from .results import compare, measure

logger = logging.getLogger(__name__)


def evaluate(
    session: Session,
    path: Path,
    name: str,
    problems: Sequence[Problem],
    models: Sequence[ModelSpec],
    prompt: StepPrompt,
    sampling: Sampling,
    num_samples: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Measure the accuracy of one model, or of two and their difference.

    Args:
        session (`Session`):
            Models that are loaded already, and the answer checker.
        path (`Path`):
            Folder for the answers, `results.json`, and `records.jsonl` with what was made of each problem.
        name (`str`):
            Name of the problems.
        problems (`Sequence[Problem]`):
            The problems.
        models (`Sequence[ModelSpec]`):
            The model, or the two.
        prompt (`StepPrompt`):
            How they are asked.
        sampling (`Sampling`):
            How they are sampled.
        num_samples (`int`, *optional*, defaults to `1`):
            Solutions of each problem. The i-th sample of a problem has the same seed for both models.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling and of the bootstrap.

    Returns:
        `dict[str, Any]`: What is in `results.json`.

    Raises:
        RunError: If the options do not fit together, or `path` holds another evaluation.
        GenerationError: If a model cannot be loaded.
    """
    check_comparison(models, sampling, num_samples)
    for model in models:
        if model not in session.generators:
            from ..generation.chat import check_model  # loads transformers

            check_model(model)
    settings = {
        "problems": {"name": name, "count": len(problems), "digest": text_digest(*problems)},
        "models": [identity(model) for model in models],
        "prompt": asdict(prompt),
        "sampling": asdict(sampling),
        "num_samples": num_samples,
        "seed": seed,
    }
    with begin(path, settings) as run:
        session.check_golds(problems)
        keep_problems(run, problems)
        answers = []
        for model in models:
            answers.append(_answer(session, run, model, problems, prompt, sampling, num_samples, seed))
            session.release(model)
        names = _names(models)
        results = {**settings, "results": [measure(*each) for each in zip(names, answers, strict=True)]}
        if len(models) == 2:
            results["difference"] = compare(answers[0], answers[1], seed)
        rows = [
            _record(problem, dict(zip(names, each, strict=True)))
            for problem, *each in zip(problems, *answers, strict=True)
        ]
        write_text(path / "records.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(path / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def check_comparison(models: Sequence[ModelSpec], sampling: Sampling, num_samples: int) -> None:
    """
    Check that models can be compared, and samples differ.

    Raises:
        RunError: If not.
    """
    places = [
        {**identity(model), **{name: Path(getattr(model, name) or "").resolve() for name in ("model", "adapter")}}
        for model in models
    ]
    if len(models) == 2 and places[0] == places[1]:
        raise RunError(
            f"--baseline {models[1].model!r} is the model itself: there is nothing to compare. Name another model or "
            "adapter; a server has to serve it under another name."
        )
    if num_samples > 1 and not sampling.temperature:
        raise RunError(
            f"--num-samples {num_samples} at temperature 0 are {num_samples} times the same answer. Give a --temperature, such as "
            "0.7, or leave --num-samples out."
        )


def begin(path: Path, settings: Mapping[str, Any]) -> RunDirectory:
    """
    Open the folder of an evaluation, with settings that belong to it.

    Raises:
        RunError: If it belongs to something else.
    """
    run = RunDirectory(path, create=True)
    try:
        others = [stage for stage in run.settings() if stage != "eval"]
        if others:
            raise RunError(f"{path} is the folder of a run ({', '.join(others)}). Take another --output-dir.")
        run.keep_settings("eval", settings)
    except RunError:
        run.__exit__(None, None, None)
        raise
    return run


def _names(models: Sequence[ModelSpec]) -> list[str]:
    """What models are called in tables: with their settings, if they are the same otherwise."""
    names = [f"{spec.model} + {spec.adapter}" if spec.adapter else spec.model for spec in models]
    if len(set(names)) == len(names):
        return names
    settings = [f"{spec.backend}, {spec.dtype}, {spec.tokenizer or 'own tokenizer'}" for spec in models]
    return [f"{name} ({each})" for name, each in zip(names, settings, strict=True)]


def identity(spec: ModelSpec) -> dict[str, Any]:
    """What answers depend on. A server may move."""
    named = {name: getattr(spec, name) for name in ("model", "adapter", "backend", "tokenizer", "dtype")}
    return {**named, "weights": fingerprint([spec.model, spec.adapter, spec.tokenizer])}


def _answer(
    session: Session,
    run: RunDirectory,
    model: ModelSpec,
    problems: Sequence[Problem],
    prompt: StepPrompt,
    sampling: Sampling,
    num_samples: int,
    seed: int,
) -> list[ProblemAnswers]:
    """Let a model solve the problems; its answers are its own, whoever else answers in this folder."""
    name = model_file_name(model.adapter or model.model, *identity(model).values())
    generator = session.generator(model)
    runner = TaskRunner(run, f"eval {name}")
    runner.services["model"] = RecordedModel(generator, sampling, run.log(f"answers.{name}"), name, runner.name)
    runner.services["check"] = RecordedChecks(session.checker, run.log(f"checks.{name}"))
    policy = Policy("model", prompt, generator.render, seed)

    def task(problem: Problem) -> Task[tuple[str, ProblemAnswers]]:
        sampled = yield from policy.sample(problem, prompt.response_prefix, range(num_samples))
        majority = yield from vote(sampled)
        return problem.id, ProblemAnswers(sampled, majority)

    counts: Counter[str] = Counter()
    answers: dict[str, ProblemAnswers] = {}
    for problem, answered in runner.results(map(task, problems), len(problems), "problems", counts):
        counts.update(sample.check.outcome for sample in answered.samples)
        answers[problem] = answered
    if num_samples > 1 and all(len({sample.text for sample in each.samples}) == 1 for each in answers.values()):
        logger.warning(not_sampled(num_samples))
    return [answers[problem.id] for problem in problems]


def _record(problem: Problem, answers: Mapping[str, ProblemAnswers]) -> dict[str, Any]:
    """What the models made of a problem."""
    models = {
        name: {
            **({"majority": asdict(each.majority)} if len(each.samples) > 1 else {}),
            "samples": [
                {"outcome": s.check.outcome, "answer": s.check.answer, "reason": s.check.reason, "text": s.text}
                for s in each.samples
            ],
        }
        for name, each in answers.items()
    }
    return {"id": problem.id, "problem": problem.problem, "gold": problem.answer, "models": models}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
