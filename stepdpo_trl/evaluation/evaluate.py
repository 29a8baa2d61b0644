"""Accuracy of one or two models on a set of problems. Answers are stored before they are used, so runs can resume."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from ..data.checkers import MATH, Checker
from ..data.files import replacing, write_atomically
from ..data.prompts import StepPrompt
from ..data.steps import split_steps
from ..generation import ModelSpec, Sampling
from ..generation.model_folders import fingerprint
from ..generation.vllm_arguments import answer_arguments
from ..generation.vllm_server import stop_orphans
from ..pipeline.collect import keep_problems, not_sampled
from ..pipeline.policy import Policy
from ..pipeline.records import Problem, digest_of
from ..pipeline.session import Session, model_file_name
from ..pipeline.task import task_settings
from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import RecordedChecks, Task, model_service, read_completion, replay
from .majority import ProblemAnswers, vote
from .results import Tally, compare, measure_accuracy

logger = logging.getLogger(__name__)

# Fields of `ModelSpec` that answers do not depend on, so they may change when a run resumes
_CONNECTION = ("base_url", "api_key_env", "batch_size", "max_concurrent_requests")


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
    checker: Checker = MATH,
    steps: str | None = None,
) -> dict[str, Any]:
    """
    Measure the accuracy of one model, or of two models and their difference.

    Args:
        session (`Session`):
            Session that holds the loaded models and the answer checker.
        path (`Path`):
            Output folder for the answers, `results.json`, and `records.jsonl` with the solutions of each problem.
        name (`str`):
            Name of the problem set.
        problems (`Sequence[Problem]`):
            The problems.
        models (`Sequence[ModelSpec]`):
            The model, or the model and its baseline.
        prompt (`StepPrompt`):
            Prompt and response prefix.
        sampling (`Sampling`):
            Sampling parameters.
        num_samples (`int`, *optional*, defaults to `1`):
            Number of solutions per problem. The i-th sample of a problem has the same seed for both models.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling and of the bootstrap.
        checker (`Checker`, *optional*, defaults to `MATH`):
            The checker of the solutions.
        steps (`str`, *optional*):
            How solutions are split into steps, see [`~stepdpo_trl.data.steps.split_steps`]. If passed, `records.jsonl`
            contains the number of steps of each solution.

    Returns:
        `dict[str, Any]`: The content of `results.json`.

    Raises:
        RunError: If the arguments contradict each other, or `path` holds an evaluation with other settings.
        GenerationError: If a model cannot be loaded.
    """
    check_comparison(models, sampling, num_samples)
    for model in models:
        if model.base_url is not None:
            session.generator(model).render("", "")  # asks the server before it looks for the tokenizer
        elif model not in session.generators:
            from ..generation.chat import check_model  # slow: imports transformers

            check_model(model)
    settings = {
        "problems": {"name": name, "count": len(problems), "digest": digest_of(problems)},
        "models": [identity(model) for model in models],
        "prompt": asdict(prompt),
        "sampling": asdict(sampling),
        "num_samples": num_samples,
        "seed": seed,
        **task_settings(checker, steps),
    }
    with open_evaluation(path, settings) as run:
        session.check_golds(problems, checker)

        @cache
        def keep() -> None:
            run.keep_settings("eval", settings)
            keep_problems(run, problems)

        answers = []
        for model in models:
            answers.append(_answer(session, run, keep, model, problems, prompt, sampling, num_samples, seed, checker))
            session.release(model)
        names = _names(models)
        tallies, readers = zip(*answers, strict=True)
        measured = [measure_accuracy(name, tally, num_samples) for name, tally in zip(names, tallies, strict=True)]
        results = {**settings, "results": measured}
        if len(models) == 2:
            results["difference"] = compare(tallies[0], tallies[1], seed)
        with replacing(path / "records.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
            for problem in problems:
                row = _record(problem, {name: read(problem) for name, read in zip(names, readers, strict=True)}, steps)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        write_atomically(path / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def check_comparison(models: Sequence[ModelSpec], sampling: Sampling, num_samples: int) -> None:
    """
    Check that two models are not the same one, and that several samples of a problem can differ.

    Args:
        models (`Sequence[ModelSpec]`):
            The model, or the model and its baseline.
        sampling (`Sampling`):
            Sampling parameters.
        num_samples (`int`):
            Number of solutions per problem.

    Raises:
        RunError: If the models are the same, or if `num_samples` is above 1 at temperature 0.
    """
    resolved = [
        {**identity(model), **{name: Path(getattr(model, name) or "").resolve() for name in ("model", "adapter")}}
        for model in models
    ]
    if len(models) == 2 and resolved[0] == resolved[1]:
        raise RunError(
            f"--baseline {models[1].model!r} is the model itself, so there is nothing to compare. Pass another model "
            "or adapter. If both are on servers, serve them under different names."
        )
    if num_samples > 1 and not sampling.temperature:
        raise RunError(
            f"--num-samples {num_samples} at temperature 0 would give the same answer {num_samples} times. Set "
            "--temperature, for example to 0.7, or remove --num-samples."
        )


def open_evaluation(path: Path, settings: Mapping[str, Any]) -> RunDirectory:
    """
    Open the output folder of an evaluation, and check the settings of an evaluation that it already holds.

    The settings of a new evaluation are not written yet. The caller writes them with the first answer, so that a
    first attempt with a wrong model does not lock the folder. vLLM servers that a killed command has left running in
    the folder are stopped.

    Args:
        path (`Path`):
            The folder. It is created if needed.
        settings (`Mapping[str, Any]`):
            Settings of the evaluation.

    Returns:
        `RunDirectory`: The open folder.

    Raises:
        RunError: If the folder holds something else, or an evaluation with other settings.
    """
    run = RunDirectory(path, create=True)
    try:
        kept = run.settings()
        others = [stage for stage in kept if stage != "eval"]
        if others:
            raise RunError(f"{path} is the folder of a run ({', '.join(others)}). Pass another --output-dir.")
        if "eval" in kept:
            run.keep_settings("eval", settings)
        stop_orphans(path)
    except BaseException:
        run.__exit__(None, None, None)
        raise
    return run


def identity(spec: ModelSpec) -> dict[str, Any]:
    """Return what the answers of a model depend on, with a fingerprint of its local files."""
    named = {name: value for name, value in asdict(spec).items() if name not in _CONNECTION}
    named["vllm_args"] = answer_arguments(spec.vllm_args)
    if named["vllm_args"] is None:
        del named["vllm_args"]  # as in evaluations of earlier releases
    return {**named, "weights": fingerprint([spec.model, spec.adapter, spec.tokenizer])}


def answers_name(spec: ModelSpec) -> str:
    """Return the name of a model in the files that hold its answers."""
    return model_file_name(spec.adapter or spec.model, *identity(spec).values())


def _names(models: Sequence[ModelSpec]) -> list[str]:
    """Return the names of the models in the results, with their settings if the names alone are the same."""
    names = [f"{spec.model} + {spec.adapter}" if spec.adapter else spec.model for spec in models]
    if len(set(names)) == len(names):
        return names
    settings = [f"{spec.backend}, {spec.dtype}, {spec.tokenizer or 'own tokenizer'}" for spec in models]
    return [f"{name} ({setting})" for name, setting in zip(names, settings, strict=True)]


def _answer(
    session: Session,
    run: RunDirectory,
    keep: Callable[[], None],
    model: ModelSpec,
    problems: Sequence[Problem],
    prompt: StepPrompt,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    checker: Checker,
) -> tuple[Tally, Callable[[Problem], ProblemAnswers]]:
    """
    Sample solutions of all problems from one model, into files that are named after the model.

    Returns the outcomes, and a function that reads the answers to a problem from the files.
    """
    name = answers_name(model)
    generator = session.generator(model, run.path)
    runner = TaskRunner(run, f"eval {name}")
    log = run.log(f"answers.{name}")
    checks = RecordedChecks(session.checker, run.log(f"checks.{name}"), checker)
    runner.services.update(model=model_service(generator, sampling, log, runner.name, keep), check=checks)
    sampling_policy = Policy("model", prompt, generator.render, seed)

    def task(problem: Problem, policy: Policy) -> Task[ProblemAnswers]:
        sampled = yield from policy.sample(problem, prompt.response_prefix, range(num_samples))
        # The function of a user returns no answers to vote on
        majority = None if checker.custom and num_samples > 1 else (yield from vote(sampled, checker))
        return ProblemAnswers(sampled, majority)

    tally = Tally()
    tasks = (task(problem, sampling_policy) for problem in problems)
    with closing(runner.results(tasks, len(problems), "problems", tally.outcomes)) as results:
        for answered in results:
            tally.add(answered)
    if num_samples > 1 and not tally.varied:
        logger.warning(not_sampled(num_samples))
    stored = {"model": lambda request: read_completion(log, request.key), "check": checks.stored}
    reading_policy = Policy("model", prompt, lambda user, prefix: "", seed)  # the model will have been released
    return tally, lambda problem: replay(task(problem, reading_policy), stored)


def _record(problem: Problem, answers: Mapping[str, ProblemAnswers], steps: str | None) -> dict[str, Any]:
    """Return the row of `records.jsonl` for a problem: the problem and the solutions of each model."""
    models = {
        name: {
            **({"majority": asdict(answered.majority)} if answered.majority and len(answered.samples) > 1 else {}),
            "samples": [
                {
                    "outcome": s.check.outcome,
                    "answer": s.check.answer,
                    "reason": s.check.reason,
                    "text": s.text,
                    **({"steps": len(split_steps(s.text, steps))} if steps else {}),
                }
                for s in answered.samples
            ],
        }
        for name, answered in answers.items()
    }
    return {"id": problem.id, "problem": problem.problem, "gold": problem.answer, "models": models}
