"""The pipeline stages with their models, judges and answer checker, as the command line and Ray run them."""

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from ..data.answers import AnswerChecker, check_golds
from ..data.checkers import MATH, Checker
from ..data.messages import counted
from ..data.prompts import StepPrompt
from ..generation import Generator, ModelSpec, Sampling, ServerGenerator, StartedServers, make_generator
from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import RecordedChecks, model_service
from . import collect as collecting
from . import localize as localizing
from . import rectify as rectifying
from .judge_options import DEFAULT_CHECK, JudgeOptions, check_rectify, default_check
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
from .run_model import model_of_run, model_settings, server_settings
from .stage_directory import StageDirectory
from .task import checker_of, task_settings

_GOLDS = 10_000  # gold answers that are checked at the same time


@dataclass
class Session:
    """
    Models and answer checker, shared by all pipeline stages of a process.

    Args:
        generators (`dict[ModelSpec, Generator]`, *optional*):
            Models that are already loaded. Others are loaded when they are first used.
        checker (`AnswerChecker`, *optional*):
            Processes that check solutions.
    """

    generators: dict[ModelSpec, Generator | ServerGenerator] = field(default_factory=dict)
    checker: AnswerChecker = field(default_factory=AnswerChecker)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for spec in list(self.generators):
                self.release(spec)
        finally:
            self.checker.__exit__(kind, error, trace)

    def generator(self, spec: ModelSpec, path: Path = Path()) -> Generator | ServerGenerator:
        """Return a model, loading it on first use. The logs of its servers are written to the folder `path`."""
        if spec not in self.generators:
            self.generators[spec] = make_generator(spec, path)
        return self.generators[spec]

    def release(self, spec: ModelSpec) -> None:
        """Drop a model and stop its servers, so that its memory is free for the next one."""
        generator = self.generators.pop(spec, None)
        if isinstance(generator, StartedServers):
            generator.close()
        del generator
        gc.collect()

    def check_golds(self, problems: Sequence[Problem], checker: Checker = MATH) -> None:
        """
        Check that solutions can be compared with the gold answers.

        Raises:
            RunError: If a gold answer cannot be parsed, or is not a letter.
        """
        named: list[str] = []
        unusable = 0
        remaining = iter(problems)
        while part := list(islice(remaining, _GOLDS)):
            found = [part[index] for index in check_golds(self.checker, [problem.answer for problem in part], checker)]
            named += [f"{problem.id!r}: {problem.answer!r}" for problem in found[: 5 - len(named)]]
            unusable += len(found)
        if unusable and checker.name == "choice":
            raise RunError(
                f"{counted(unusable, 'gold answer')} cannot be compared with the letters A to E ({'; '.join(named)}"
                f"{' ...' if unusable > 5 else ''}). Write gold answers as letters (0 is A), or use another --checker."
            )
        if unusable:
            raise RunError(
                f"{counted(unusable, 'gold answer')} cannot be read as an answer ({'; '.join(named)}"
                f"{' ...' if unusable > 5 else ''}), so no solution can be compared. Fix or remove these problems."
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
        checker: Checker = MATH,
        steps: str | None = None,
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
                Path and hash of the problems, as returned by [`~stepdpo_trl.pipeline.row_files.describe_source`].
            checker (`Checker`, *optional*, defaults to `MATH`):
                The checker of the solutions. If the code of a user's function has changed since an earlier call, all
                solutions are checked again.
            steps (`str`, *optional*):
                How solutions are split into steps, see [`~stepdpo_trl.data.steps.split_steps`].

        Returns:
            `Counter[str]`: Number of solutions per outcome.
        """
        self.check_golds(problems, checker)
        mine = shard_of(problems, shard)
        settings = {
            "problems": name,
            "prompt": asdict(prompt),
            "sampling": asdict(sampling),
            "num_samples": num_samples,
            "seed": seed,
            "model": model_settings(model),
            "shard": list(shard),
            **task_settings(checker, steps),
        }
        with StageDirectory(path, create=True) as run:

            def write_problems() -> None:
                if source is not None and run.settings().get("source") != source:
                    run.settings().append("source", source)
                server = server_settings(model)
                if server is not None and run.settings().get("server") != server:
                    run.settings().append("server", server)
                if checker.custom and run.settings().get("checker") != asdict(checker):
                    run.settings().append("checker", asdict(checker))
                collecting.keep_problems(run, mine)

            run.start_stage("collect", settings, ("num_samples",), write_problems)
            collecting.check_problems(run, mine)
            runner = self._runner(run, f"collect {num_samples}", checker)
            policy = self._policy(runner, model, settings)
            self._stop_unused(runner)
            counts = collecting.collect(runner, policy, mine, num_samples, steps)
            run.write_settings()
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
            options.check(names, checker_of(run))
            run.start_stage(*_localize_stage(judge_name, options))
            runner = self._runner(run, f"localize {judge_name}")
            judges = {name: self._judge(name, runner, options, model) for name in names}
            self._stop_unused(runner)
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
                Judge expression that checks the preferred steps. `DEFAULT_CHECK` for the default of the checker.
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
        check_rectify(check, options, num_corrections, max_attempts)
        name = model_file_name(rectifier.model) if rectifier else None
        with StageDirectory(path) as run:
            checker = checker_of(run)
            check = default_check(checker) if check == DEFAULT_CHECK else check
            groups = check_rectify(check, options, num_corrections, max_attempts, checker)
            names = [name for group in groups for name in group]
            found_in, _ = localizing.read_verdicts(run, judge_name)
            stage = _rectify_stage(found_in, num_corrections, max_attempts, check, options, rectifier)
            run.start_stage(*stage)
            runner = self._runner(run, stage[0])
            service = f"rectifier-{name}" if name else "policy"
            policy = self._policy(runner, rectifier or model_of_run(run, model), service=service)
            judge = combine(groups, {n: self._judge(n, runner, options, model) for n in names}) if names else None
            self._stop_unused(runner)
            # In code, upper case, spaces and `*` make a difference
            same = {"normalize": str.rstrip} if checker.custom else {}
            counts = rectifying.rectify(runner, policy, judge_name, name, num_corrections, max_attempts, judge, **same)
            run.write_settings()
            return counts

    def _runner(self, run: RunDirectory, name: str, checker: Checker | None = None) -> TaskRunner:
        checks = RecordedChecks(self.checker, run.log("checks"), checker or checker_of(run))
        return TaskRunner(run, name, {"check": checks})

    def _stop_unused(self, runner: TaskRunner) -> None:
        """Stop the servers of models that the stage does not use, since they occupy the GPUs."""
        used = [getattr(service, "generator", None) for service in runner.services.values()]
        for spec, generator in list(self.generators.items()):
            if isinstance(generator, StartedServers) and generator not in used:
                self.release(spec)

    def _policy(
        self,
        runner: TaskRunner,
        model: ModelSpec,
        settings: Mapping[str, Any] | None = None,
        service: str = "policy",
    ) -> Policy:
        """Make a policy of a model. `settings` are those of `collect`, if they are not in the run folder yet."""
        settings = settings or collecting.read_settings(runner.run)
        generator = self.generator(model, runner.run.path)
        if service not in runner.services:
            log = runner.run.log(f"generations.{service}")
            runner.services[service] = model_service(generator, Sampling(**settings["sampling"]), log, runner.name)
        return Policy(service, StepPrompt(**settings["prompt"]), generator.render, settings["seed"])

    def _judge(self, name: str, runner: TaskRunner, options: JudgeOptions, model: dict[str, Any] | None) -> Judge:
        if name == "arithmetic":
            return arithmetic_judge
        if name == "rollout":
            return rollout_judge(self._policy(runner, model_of_run(runner.run, model)), options.num_rollouts)
        if name == "llm":
            assert options.model is not None
            sampling = options.judge_sampling
            # The hash keeps the answers of different sampling parameters in different files
            service = f"judge-{model_file_name(options.model.model)}-{text_digest(sampling)[:6]}"
            generator = self.generator(options.model, runner.run.path)
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
        if check == DEFAULT_CHECK:
            check = default_check(Checker(run.settings().get("collect", {}).get("checker", MATH.name)))
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
