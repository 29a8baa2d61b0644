"""The pipeline stages with their models, judges and answer checker, as the command line and Ray run them."""

import gc
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..data.answers import AnswerChecker, check_golds
from ..data.prompts import StepPrompt
from ..generation import Generator, ModelSpec, Sampling, ServerGenerator, make_generator
from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import RecordedChecks, model_service
from . import collect as collecting
from . import localize as localizing
from . import rectify as rectifying
from .judge_options import JudgeOptions, check_rectify
from .judges.arithmetic import arithmetic_judge
from .judges.expressions import canonical, combine, parse_judges
from .judges.human import human_judge
from .judges.human_page import Person
from .judges.llm import llm_judge
from .judges.prm import prm_judge
from .judges.protocol import Judge
from .judges.rollout import rollout_judge
from .names import corrections_name as corrections_name  # imported from here by the command line
from .names import model_file_name
from .policy import Policy
from .records import Problem, shard_of, text_digest
from .stage_directory import StageDirectory

logger = logging.getLogger(__name__)

# Fields of ModelSpec that do not change what the model answers: a run may continue with other values
_OPERATIONAL = ("base_url", "batch_size", "max_concurrent_requests", "api_key_env")
_SERVER = ("base_url", "max_concurrent_requests", "api_key_env")


@dataclass
class Session:
    """
    Models and answer checker, shared by all pipeline stages of a process.

    Args:
        generators (`dict[ModelSpec, Generator]`, *optional*):
            Models that are already loaded. Others are loaded when they are first used.
        checker (`AnswerChecker`, *optional*):
            Answer checker.
    """

    generators: dict[ModelSpec, Generator | ServerGenerator] = field(default_factory=dict)
    checker: AnswerChecker = field(default_factory=AnswerChecker)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checker.__exit__(kind, error, trace)

    def generator(self, spec: ModelSpec) -> Generator | ServerGenerator:
        """Return a model, loading it on first use."""
        if spec not in self.generators:
            self.generators[spec] = make_generator(spec)
        return self.generators[spec]

    def release(self, spec: ModelSpec) -> None:
        """Drop a model, so that its memory is free for the next one."""
        self.generators.pop(spec, None)
        gc.collect()

    def check_golds(self, problems: Sequence[Problem]) -> None:
        """
        Check that solutions can be compared with the gold answers.

        Raises:
            RunError: If a gold answer cannot be parsed.
        """
        unusable = check_golds(self.checker, [problem.answer for problem in problems])
        if unusable:
            named = [f"{problems[index].id!r}: {problems[index].answer!r}" for index in unusable[:5]]
            raise RunError(
                f"{len(unusable)} gold answers cannot be read as an answer ({'; '.join(named)}"
                f"{' ...' if len(unusable) > 5 else ''}), so no solution can be compared with them. Fix or remove "
                "these problems."
            )

    def collect(
        self,
        path: Path,
        problems: Sequence[Problem],
        name: str,
        model: ModelSpec,
        prompt: StepPrompt,
        sampling: Sampling,
        num_samples: int = 2,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        source: Mapping[str, Any] | None = None,
    ) -> Counter[str]:
        """
        Sample solutions and check their answers; see [`~stepdpo_trl.pipeline.collect.collect`].

        Args:
            path (`Path`):
                Run folder. It is created if it does not exist.
            problems (`Sequence[Problem]`):
                All problems. The stage works on those of its shard.
            name (`str`):
                Name of the problems.
            model (`ModelSpec`):
                The model.
            prompt (`StepPrompt`):
                Prompt of the model.
            sampling (`Sampling`):
                Sampling parameters.
            num_samples (`int`, *optional*, defaults to `2`):
                Solutions per problem. A later call may increase it.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the run.
            shard (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
                Index of the shard and number of shards.
            source (`Mapping[str, Any]`, *optional*):
                Path and hash of the problems, as returned by [`~stepdpo_trl.pipeline.records.describe_source`].

        Returns:
            `Counter[str]`: Number of solutions per outcome.
        """
        self.check_golds(problems)
        mine = shard_of(problems, shard)
        settings = {
            "problems": name,
            "prompt": asdict(prompt),
            "sampling": asdict(sampling),
            "num_samples": num_samples,
            "seed": seed,
            "model": {f.name: getattr(model, f.name) for f in fields(model) if f.name not in _OPERATIONAL},
            "shard": list(shard),
        }
        with StageDirectory(path, create=True) as run:

            def write_problems() -> None:
                if source is not None and run.settings().get("source") != source:
                    run.settings().append("source", source)
                if model.base_url is not None and run.settings().get("server") != _server_of(model):
                    run.settings().append("server", _server_of(model))
                collecting.keep_problems(run, mine)

            run.start_stage("collect", settings, ("num_samples",), write_problems)
            collecting.check_problems(run, mine)
            runner = self._runner(run, f"collect {num_samples}")
            policy = self._policy(runner, model, settings)
            counts = collecting.collect(runner, policy, mine, num_samples)
            run.write_settings()
            if not counts["wrong"]:
                logger.warning(collecting.no_wrong_answers(counts))
            return counts

    def localize(
        self, path: Path, judge_name: str, options: JudgeOptions, model: dict[str, Any] | None = None
    ) -> Counter[str]:
        """
        Find the first wrong steps; see [`~stepdpo_trl.pipeline.localize.localize`].

        Args:
            path (`Path`):
                Run folder.
            judge_name (`str`):
                Judge expression.
            options ([`JudgeOptions`]):
                Options of the judges. A later call may increase `num_rollouts`.
            model (`dict`, *optional*):
                Fields of `ModelSpec` that have changed since the solutions were sampled.

        Returns:
            `Counter[str]`: Number of solutions with a verdict (`"located"`) and without (`"abstained"`).
        """
        groups = parse_judges(judge_name)
        judge_name = canonical(judge_name)
        names = [name for group in groups for name in group]
        options.check(names)
        with StageDirectory(path) as run:
            run.start_stage(*_localize_stage(judge_name, options))
            runner = self._runner(run, f"localize {judge_name}")
            judges = {name: self._judge(name, runner, options, model) for name in names}
            counts = localizing.localize(runner, combine(groups, judges), judge_name)
            run.write_settings()
            return counts

    def rectify(
        self,
        path: Path,
        judge_name: str | None = None,
        num_corrections: int = 1,
        max_attempts: int = 20,
        check: str | None = None,
        options: JudgeOptions | None = None,
        rectifier: ModelSpec | None = None,
        model: dict[str, Any] | None = None,
    ) -> Counter[str]:
        """
        Sample preferred steps; see [`~stepdpo_trl.pipeline.rectify.rectify`].

        Args:
            path (`Path`):
                Run folder.
            judge_name (`str`, *optional*):
                Judge expression whose verdicts are used. Required if the run has several.
            num_corrections (`int`, *optional*, defaults to `1`):
                Preferred steps per wrong solution. A later call may increase it.
            max_attempts (`int`, *optional*, defaults to `20`):
                Maximum number of samples per wrong solution. A later call may increase it.
            check (`str`, *optional*):
                Judge expression that checks the preferred steps.
            options ([`JudgeOptions`], *optional*):
                Options of the judges in `check`.
            rectifier (`ModelSpec`, *optional*):
                Model that writes the preferred steps. Defaults to the one that wrote the solutions.
            model (`dict`, *optional*):
                Fields of `ModelSpec` that have changed since the solutions were sampled.

        Returns:
            `Counter[str]`: Counts, as returned by [`~stepdpo_trl.pipeline.rectify.rectify`].
        """
        options = options or JudgeOptions()
        groups = check_rectify(check, options, num_corrections, max_attempts)
        names = [name for group in groups for name in group]
        name = model_file_name(rectifier.model) if rectifier else None
        with StageDirectory(path) as run:
            found_in, _ = localizing.read_verdicts(run, judge_name)
            stage = _rectify_stage(found_in, num_corrections, max_attempts, check, options, rectifier)
            run.start_stage(*stage)
            runner = self._runner(run, stage[0])
            service = f"rectifier-{name}" if name else "policy"
            policy = self._policy(runner, rectifier or self._model_of(run, model), service=service)
            judge = combine(groups, {n: self._judge(n, runner, options, model) for n in names}) if names else None
            counts = rectifying.rectify(runner, policy, judge_name, name, num_corrections, max_attempts, judge)
            run.write_settings()
            return counts

    def _runner(self, run: RunDirectory, name: str) -> TaskRunner:
        return TaskRunner(run, name, {"check": RecordedChecks(self.checker, run.log("checks"))})

    def _model_of(self, run: RunDirectory, changes: dict[str, Any] | None = None) -> ModelSpec:
        """Return the model that wrote the solutions, at the same server, with the fields that have changed since."""
        settings, changes = run.settings(), changes or {}
        model = {**collecting.read_settings(run)["model"], **changes}
        if model["backend"] == "openai" and "base_url" not in changes:
            if "server" not in settings:
                raise RunError(
                    f"The solutions in {run.path} were sampled from a server, but its address is not in the run. Pass "
                    "it as --base-url."
                )
            model = {**settings["server"], **model}
            logger.warning(
                f"{run.path}: using the server at {model['base_url']}, as in `collect`. Pass --base-url to use "
                "another one."
            )
        return replace(ModelSpec("", "transformers"), **model)

    def _policy(
        self,
        runner: TaskRunner,
        model: ModelSpec,
        settings: Mapping[str, Any] | None = None,
        service: str = "policy",
    ) -> Policy:
        """Make a policy of a model. `settings` are those of `collect`, if they are not in the run folder yet."""
        settings = settings or collecting.read_settings(runner.run)
        generator = self.generator(model)
        if service not in runner.services:
            log = runner.run.log(f"generations.{service}")
            runner.services[service] = model_service(generator, Sampling(**settings["sampling"]), log, runner.name)
        return Policy(service, StepPrompt(**settings["prompt"]), generator.render, settings["seed"])

    def _judge(self, name: str, runner: TaskRunner, options: JudgeOptions, model: dict[str, Any] | None) -> Judge:
        if name == "arithmetic":
            return arithmetic_judge
        if name == "rollout":
            return rollout_judge(self._policy(runner, self._model_of(runner.run, model)), options.num_rollouts)
        if name == "llm":
            assert options.model is not None
            sampling = options.judge_sampling
            # The hash keeps the answers of different sampling parameters in different files
            service = f"judge-{model_file_name(options.model.model)}-{text_digest(sampling)[:6]}"
            generator = self.generator(options.model)
            log = runner.run.log(f"generations.{service}")
            runner.services[service] = model_service(generator, sampling, log, runner.name)
            seed = collecting.read_settings(runner.run)["seed"]
            return llm_judge(service, seed, options.votes, options.gold, options.prompt, sampling.temperature > 0)
        if name == "prm":
            from .judges.prm_model import ProcessRewardModel, RecordedPRM

            assert options.prm is not None
            loaded = ProcessRewardModel.load(options.prm, trust_remote_code=options.trust_remote_code)
            runner.services["prm"] = RecordedPRM(loaded, runner.run.log(f"scores.prm-{model_file_name(options.prm)}"))
            return prm_judge(options.threshold)
        runner.services["human"] = Person(runner.run.log("labels"), options.port)
        return human_judge


def _server_of(model: ModelSpec) -> dict[str, Any]:
    server = {name: getattr(model, name) for name in _SERVER}
    if model.api_key_env not in os.environ:  # may be a key that was passed by mistake
        del server["api_key_env"]
    return server


def check_settings(
    path: Path,
    judge_name: str,
    num_corrections: int,
    max_attempts: int,
    check: str | None,
    options: JudgeOptions,
    rectifier: ModelSpec | None = None,
) -> None:
    """
    Check the settings of `localize` and `rectify` in a run that is resumed, before anything is sampled.

    Args:
        path (`Path`):
            Run folder. May be missing.
        judge_name, num_corrections, max_attempts, check, options, rectifier:
            As for [`Session.rectify`].

    Raises:
        RunError: If the run was started with other settings, or with larger values.
    """
    if not (path / "settings.jsonl").exists():
        return
    judge_name = canonical(judge_name)
    with StageDirectory(path) as run:
        run.check_stage(*_localize_stage(judge_name, options))
        run.check_stage(*_rectify_stage(judge_name, num_corrections, max_attempts, check, options, rectifier))


def _names_of(expression: str | None) -> list[str]:
    return [name for group in parse_judges(expression) for name in group] if expression else []


def _localize_stage(judge_name: str, options: JudgeOptions) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Return title, settings and growing settings."""
    return f"localize {judge_name}", options.settings(_names_of(judge_name)), ("num_rollouts",)


def _rectify_stage(
    judge_name: str,
    num_corrections: int,
    max_attempts: int,
    check: str | None,
    options: JudgeOptions,
    rectifier: ModelSpec | None,
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Return title, settings and growing settings."""
    settings = {
        "num_corrections": num_corrections,
        "max_attempts": max_attempts,
        "check": check,
        **options.settings(_names_of(check)),
        "rectifier": rectifier.model if rectifier else None,
    }
    by = f" by {model_file_name(rectifier.model)}" if rectifier else ""
    return f"rectify {judge_name}{by}", settings, ("num_corrections", "max_attempts")
