"""The stages with all that they need: models, judges, checks. What the command line calls, and Ray on each machine."""

import gc
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..data.answers import AnswerChecker, check_golds
from ..data.prompts import StepPrompt
from ..generation import Generator, ModelSpec, Sampling, make_generator
from ..runs.run_directory import RunDirectory, RunError
from ..runs.runner import TaskRunner
from ..runs.tasks import RecordedChecks, RecordedModel
from . import collect as collecting
from . import localize as localizing
from . import rectify as rectifying
from .judges.arithmetic import arithmetic_judge
from .judges.expressions import canonical, combine, parse_judges
from .judges.human import human_judge
from .judges.human_page import Person
from .judges.llm import check_judge_prompt, llm_judge
from .judges.prm import prm_judge
from .judges.protocol import Judge
from .judges.rollout import rollout_judge
from .policy import Policy
from .records import Problem, shard_of, text_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeOptions:
    """
    What judges need.

    Args:
        num_rollouts (`int`, *optional*, defaults to `8`):
            Rollouts of a prefix at max_attempts (`rollout`).
        model (`ModelSpec`, *optional*):
            The judge (`llm`).
        votes (`int`, *optional*, defaults to `1`):
            Replies that count (`llm`).
        gold (`bool`, *optional*, defaults to `True`):
            Whether the judge sees the gold solution (`llm`).
        prompt (`str`, *optional*):
            Jinja template for the judge (`llm`).
        sampling (`Sampling`, *optional*):
            How the judge is sampled (`llm`). Greedy for one vote, at temperature 0.7 for more.
        prm (`str`, *optional*):
            The process reward model (`prm`).
        threshold (`float`, *optional*, defaults to `0.5`):
            Least probability of a right step (`prm`).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the process reward model.
        port (`int`, *optional*):
            Port of the page (`human`).
    """

    num_rollouts: int = 8
    model: ModelSpec | None = None
    votes: int = 1
    gold: bool = True
    prompt: str | None = None
    sampling: Sampling | None = None
    prm: str | None = None
    threshold: float = 0.5
    trust_remote_code: bool = False
    port: int | None = None

    def check(self, names: Sequence[str]) -> None:
        """
        Check that these judges have what they need.

        Raises:
            RunError: If one has not.
        """
        if "llm" in names and self.model is None:
            raise RunError("Judge 'llm' needs a model: --judge-model NAME, and --judge-base-url URL for a server.")
        if "llm" in names and self.prompt is not None:
            check_judge_prompt(self.prompt)
        if "prm" in names and self.prm is None:
            raise RunError("Judge 'prm' needs a process reward model: --prm Qwen/Qwen2.5-Math-PRM-7B, or a folder.")
        if self.num_rollouts < 1 or self.votes < 1:
            raise RunError(f"num_rollouts={self.num_rollouts} and votes={self.votes} must be at least 1.")

    def settings(self, names: Sequence[str]) -> dict[str, Any]:
        """What verdicts of these judges depend on."""
        settings: dict[str, Any] = {"num_rollouts": self.num_rollouts} if "rollout" in names else {}
        if "llm" in names and self.model is not None:
            settings |= {"judge_model": self.model.model, "votes": self.votes, "gold": self.gold}
            settings |= {"judge_prompt": self.prompt, "judge_sampling": asdict(self.judge_sampling)}
        if "prm" in names:
            settings |= {"prm": self.prm, "threshold": self.threshold}
        return settings

    @property
    def judge_sampling(self) -> Sampling:
        """How the judge is sampled."""
        return self.sampling or Sampling(0.0 if self.votes == 1 else 0.7, 0.95, 1024)


def check_rectify(
    check: str | None, options: JudgeOptions, num_corrections: int, max_attempts: int
) -> list[list[str]]:
    """
    Check the options of `rectify`.

    Returns:
        `list[list[str]]`: The judges that look at preferred steps, as from [`parse_judges`].

    Raises:
        RunError: If one cannot be used.
    """
    groups = parse_judges(check) if check else []
    names = [name for group in groups for name in group]
    if set(names) & {"rollout", "human"}:
        raise RunError(
            f"--check {check!r} cannot look at right solutions. Take arithmetic, llm, prm or a combination."
        )
    options.check(names)
    if num_corrections < 1 or max_attempts < num_corrections:
        raise RunError(
            f"num_corrections={num_corrections} must be at least 1 and at most max_attempts={max_attempts}."
        )
    return groups


def model_file_name(model: str, *more: object) -> str:
    """Name of a model in files: its last part, and what tells it from others that end so, with what else counts."""
    return f"{re.sub(r'[^A-Za-z0-9-]+', '_', Path(model).name) or 'model'}-{text_digest(model, *more)[:6]}"


def corrections_name(judge_name: str, rectifier: ModelSpec | None) -> str:
    """Name of corrections in files: by the judge, and by the model that writes them if that is another one."""
    found_in = canonical(judge_name)
    return f"{found_in}.by-{model_file_name(rectifier.model)}" if rectifier else found_in


@dataclass
class Session:
    """
    Models loaded once for all stages of a process.

    Args:
        generators (`dict[ModelSpec, Generator]`, *optional*):
            Models that are there already.
    """

    generators: dict[ModelSpec, Generator] = field(default_factory=dict)
    checker: AnswerChecker = field(default_factory=AnswerChecker)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checker.__exit__(kind, error, trace)

    def generator(self, spec: ModelSpec) -> Generator:
        """A model, loaded when it is first asked for."""
        if spec not in self.generators:
            self.generators[spec] = make_generator(spec)
        return self.generators[spec]

    def release(self, spec: ModelSpec) -> None:
        """Let go of a model, so that the next one finds its memory free."""
        self.generators.pop(spec, None)
        gc.collect()

    def check_golds(self, problems: Sequence[Problem]) -> None:
        """
        Check that solutions can be compared with the gold answers.

        Raises:
            RunError: If one cannot be read as an answer.
        """
        unusable = check_golds(self.checker, [problem.answer for problem in problems])
        if unusable:
            named = [f"{problems[index].id!r}: {problems[index].answer!r}" for index in unusable[:5]]
            raise RunError(
                f"{len(unusable)} gold answers cannot be read as an answer ({'; '.join(named)}"
                f"{' ...' if len(unusable) > 5 else ''}): no solution could be compared with them. Mend or remove "
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
    ) -> Counter[str]:
        """Sample solutions of problems; see [`~stepdpo_trl.pipeline.collect.collect`]."""
        self.check_golds(problems)
        mine = shard_of(problems, shard)
        settings = {
            "problems": name,
            "prompt": asdict(prompt),
            "sampling": asdict(sampling),
            "num_samples": num_samples,
            "seed": seed,
            "model": {name: getattr(model, name) for name in ("model", "backend", "tokenizer", "dtype")},
            "shard": list(shard),
        }
        with RunDirectory(path, create=True) as run:
            run.keep_settings("collect", settings, may_change=("num_samples",))
            collecting.keep_problems(run, mine)
            runner = self._runner(run, f"collect {num_samples}")
            policy = self._policy(runner, model)
            counts = collecting.collect(runner, policy, mine, num_samples)
            if not counts["wrong"]:
                logger.warning(collecting.no_wrong_answers(counts))
            return counts

    def localize(
        self, path: Path, judge_name: str, options: JudgeOptions, model: dict[str, Any] | None = None
    ) -> Counter[str]:
        """Find the first wrong steps; see [`~stepdpo_trl.pipeline.localize.localize`]."""
        groups = parse_judges(judge_name)
        judge_name = canonical(judge_name)
        names = [name for group in groups for name in group]
        options.check(names)
        with RunDirectory(path) as run:
            run.keep_settings(f"localize {judge_name}", options.settings(names))
            runner = self._runner(run, f"localize {judge_name}")
            judges = {name: self._judge(name, runner, options, model) for name in names}
            return localizing.localize(runner, combine(groups, judges), judge_name)

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
        """Write wrong steps anew; see [`~stepdpo_trl.pipeline.rectify.rectify`]."""
        options = options or JudgeOptions()
        groups = check_rectify(check, options, num_corrections, max_attempts)
        names = [name for group in groups for name in group]
        name = model_file_name(rectifier.model) if rectifier else None
        with RunDirectory(path) as run:
            found_in, _ = localizing.read_verdicts(run, judge_name)
            settings = {
                "num_corrections": num_corrections,
                "max_attempts": max_attempts,
                "check": check,
                **options.settings(names),
            }
            settings["rectifier"] = rectifier.model if rectifier else None
            title = f"rectify {found_in}{f' by {name}' if name else ''}"
            run.keep_settings(title, settings)
            runner = self._runner(run, title)
            service = f"rectifier-{name}" if name else "policy"
            policy = self._policy(runner, rectifier or self._model_of(run, model), service)
            judge = combine(groups, {n: self._judge(n, runner, options, model) for n in names}) if names else None
            return rectifying.rectify(runner, policy, judge_name, name, num_corrections, max_attempts, judge)

    def _runner(self, run: RunDirectory, name: str) -> TaskRunner:
        return TaskRunner(run, name, {"check": RecordedChecks(self.checker, run.log("checks"))})

    def _model_of(self, run: RunDirectory, changes: dict[str, Any] | None = None) -> ModelSpec:
        """The model that wrote the solutions, where it is to be found now."""
        if "collect" not in run.settings():
            raise RunError(f"{run.path} holds no solutions yet. Run `stepdpo collect` first.")
        return replace(ModelSpec("", "transformers"), **{**run.settings()["collect"]["model"], **(changes or {})})

    def _policy(self, runner: TaskRunner, model: ModelSpec, service: str = "policy") -> Policy:
        settings = runner.run.settings()["collect"]
        generator = self.generator(model)
        if service not in runner.services:
            log = runner.run.log(f"generations.{service}")
            runner.services[service] = RecordedModel(
                generator, Sampling(**settings["sampling"]), log, service, runner.name
            )
        return Policy(service, StepPrompt(**settings["prompt"]), generator.render, settings["seed"])

    def _judge(self, name: str, runner: TaskRunner, options: JudgeOptions, model: dict[str, Any] | None) -> Judge:
        if name == "arithmetic":
            return arithmetic_judge
        if name == "rollout":
            return rollout_judge(self._policy(runner, self._model_of(runner.run, model)), options.num_rollouts)
        if name == "llm":
            assert options.model is not None
            sampling = options.judge_sampling
            service = (
                f"judge-{model_file_name(options.model.model)}-{text_digest(sampling)[:6]}"  # each its own answers
            )
            generator = self.generator(options.model)
            log = runner.run.log(f"generations.{service}")
            runner.services[service] = RecordedModel(generator, sampling, log, service, runner.name)
            seed = runner.run.settings()["collect"]["seed"]
            return llm_judge(service, seed, options.votes, options.gold, options.prompt, sampling.temperature > 0)
        if name == "prm":
            from .judges.prm_model import ProcessRewardModel, RecordedPRM

            assert options.prm is not None
            loaded = ProcessRewardModel.load(options.prm, trust_remote_code=options.trust_remote_code)
            runner.services["prm"] = RecordedPRM(loaded, runner.run.log(f"scores.prm-{model_file_name(options.prm)}"))
            return prm_judge(options.threshold)
        runner.services["human"] = Person(runner.run.log("labels"), options.port)
        return human_judge
