"""Commands that make step pairs: collect, localize, rectify, build, data, report, import."""

import argparse
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.checkers import MATH, Checker, resolve_checker
from ..data.files import write_atomically
from ..data.messages import counted
from ..data.steps import check_style
from ..generation import ModelSpec, Sampling
from ..pipeline.judge_options import DEFAULT_CHECK
from ..pipeline.judges.expressions import parse_judges
from ..pipeline.policy import resolve_step_prompt
from ..pipeline.records import Problem, count_line, read_texts
from ..pipeline.row_files import describe_source
from ..runs.run_directory import RunDirectory, RunError
from .data_options import add_build, add_collect, add_data, add_import, add_localize, add_rectify, add_report
from .dry_run import estimate, show_servers
from .options import model_changes, model_spec, text_of
from .problems import load_training_problems

logger = logging.getLogger(__name__)


def add_commands(commands: Any) -> None:
    """
    Add the commands to the main parser.

    Args:
        commands (`argparse._SubParsersAction`):
            The subparsers of the main parser.
    """
    add_data(commands, _data)
    add_collect(commands, _collect)
    add_localize(commands, _localize)
    add_rectify(commands, _rectify)
    add_build(commands, _build)
    add_report(commands, _report)
    add_import(commands, _import)


def _folders(args: argparse.Namespace, path: str) -> list[tuple[Path, tuple[int, int]]]:
    """Return the folders to process, with the shard that each holds."""
    from ..pipeline.build import run_directories

    if args.engine == "local" and (args.shards > 1 or args.num_gpus):
        raise RunError("--shards and --num-gpus need --engine ray. Without it, use --shard I/N to process one part.")
    if args.engine == "ray" and args.shard:
        raise RunError("--shard I/N needs --engine local. With --engine ray, use --shards N to process all parts.")
    count = args.shards if args.engine == "ray" else args.shard[1] if args.shard else 1
    if count > 1:
        which = [args.shard[0]] if args.shard else range(count)
        return [(Path(path) / f"shard-{index}-of-{count}", (index, count)) for index in which]
    return [(folder, (0, 1)) for folder in run_directories(path)]


def _each(args: argparse.Namespace, path: str, stage: str, work: Callable[[Any, Path, tuple[int, int]], Any]) -> None:
    """Run `work` in each folder, in this process or on Ray, and print the counts of the stage."""
    folders = _folders(args, path)
    if args.engine == "ray":
        from ..pipeline.ray import run_on_ray

        run_on_ray(work, folders, args.num_gpus, stage)
        return
    from ..pipeline.session import Session

    with Session() as session:
        for folder, shard in folders:
            counts = work(session, folder, shard)
            print(count_line(stage, folder, counts), flush=True)


def _collect_work(
    args: argparse.Namespace, problems: Sequence[Problem], checker: Checker
) -> Callable[[Any, Path, tuple[int, int]], Any]:
    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.top_k)
    if not args.temperature and args.num_samples > 1:
        raise RunError(
            f"At --temperature 0 all {args.num_samples} solutions of a problem are the same. Increase --temperature, "
            "or pass --num-samples 1."
        )
    prompt = resolve_step_prompt(text_of(args.prompt), args.response_prefix)
    model = model_spec(args)
    name, samples, seed = Path(args.problems).stem, args.num_samples, args.seed
    source, steps = describe_source(args.problems), check_style(args.steps)

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        return session.collect(
            folder, problems, name, model, prompt, sampling, samples, seed, shard, source, checker, steps
        )

    return work


def _judges(args: argparse.Namespace) -> Any:
    from ..pipeline.judge_options import JudgeOptions

    prompt = text_of(args.judge_prompt) if args.judge_prompt else None
    if args.judge_prompt and prompt == args.judge_prompt:
        raise RunError(f"--judge-prompt: there is no file {args.judge_prompt!r}. Pass a file with a Jinja template.")
    return JudgeOptions(
        num_rollouts=getattr(args, "num_rollouts", 8),
        model=model_spec(args, "judge_"),
        votes=args.votes,
        gold=not args.no_gold,
        prompt=prompt,
        prm=args.prm,
        threshold=args.threshold,
        trust_remote_code=args.trust_remote_code,
        port=getattr(args, "port", None),
    )


def _names(expression: str) -> list[str]:
    """Return the judges of an expression. `none` and the default, which `--check` accepts, have none."""
    return (
        [] if expression in ("none", DEFAULT_CHECK) else [name for group in parse_judges(expression) for name in group]
    )


def _localize_work(
    args: argparse.Namespace, changes: dict[str, Any], checker: Checker = MATH
) -> Callable[[Any, Path, tuple[int, int]], Any]:
    judge_name, options = args.judge, _judges(args)
    if "human" in judge_name and args.engine == "ray":
        raise RunError("Judge 'human' needs a person at this machine. Use --engine local.")
    options.check(_names(judge_name), checker)

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        return session.localize(folder, judge_name, options, changes)

    return work


def _rectify_work(
    args: argparse.Namespace, changes: dict[str, Any], checker: Checker = MATH
) -> Callable[[Any, Path, tuple[int, int]], Any]:
    from ..pipeline.judge_options import check_rectify

    judge_name, options = args.judge, _judges(args)
    num_corrections, max_attempts = args.num_corrections, args.max_attempts
    check = None if args.check == "none" else args.check
    rectifier = model_spec(args, "rectifier_", "--rectifier")
    check_rectify(check, options, num_corrections, max_attempts, checker)

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        return session.rectify(folder, judge_name, num_corrections, max_attempts, check, options, rectifier, changes)

    return work


def _collect(args: argparse.Namespace) -> None:
    checker = resolve_checker(args.checker)
    problems = load_training_problems(args.problems, args.limit, checker)
    work = _collect_work(args, problems, checker)
    if args.dry_run:
        _print_estimate(args, args.output_dir, ["collect"], len(problems))
        return

    def work_and_warn(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        from ..pipeline.collect import no_wrong_answers

        counts = work(session, folder, shard)
        if not counts["wrong"]:  # `stepdpo data` ends with this message
            logger.warning(no_wrong_answers(counts, checker.name))
        return counts

    _each(args, args.output_dir, "collect", work_and_warn)


def _localize(args: argparse.Namespace) -> None:
    work = _localize_work(args, model_changes(args, of_run=True))
    _judges(args).check_used(_names(args.judge))
    if args.dry_run:
        _print_estimate(args, args.run, ["localize"])
        return
    _each(args, args.run, "localize", work)


def _rectify(args: argparse.Namespace) -> None:
    work = _rectify_work(args, model_changes(args, of_run=True))
    _judges(args).check_used(_names(args.check))
    if args.dry_run:
        _print_estimate(args, args.run, ["rectify"])
        return
    _each(args, args.run, "rectify", work)


def _paths(args: argparse.Namespace, path: str) -> list[Path]:
    return [folder for folder, _ in _folders(args, path)]


def _print_estimate(args: argparse.Namespace, path: str, stages: list[str], problems: int = 0) -> None:
    paths = _paths(args, path)
    print(estimate(args, paths, stages, problems) + show_servers(_models(args, paths[0], stages)))


def _models(args: argparse.Namespace, path: Path, stages: list[str]) -> list[ModelSpec]:
    """Return the models that pipeline stages use."""
    localizes, rectifies = "localize" in stages, "rectify" in stages
    judges = (_names(args.judge) if localizes else []) + (_names(args.check) if rectifies else [])
    judge = model_spec(args, "judge_") if "llm" in judges else None
    rectifier = model_spec(args, "rectifier_", "--rectifier") if rectifies else None
    policy = model_spec(args) if "collect" in stages else None
    if policy is None and ("rollout" in judges or (rectifies and rectifier is None)):
        from ..pipeline.run_model import model_of_run

        with RunDirectory(path) as run:
            policy = model_of_run(run, model_changes(args, of_run=True))
    return [model for model in (policy, judge, rectifier) if model is not None]


def _build(args: argparse.Namespace) -> None:
    from ..pipeline.build import build, check_target, run_directories, save
    from ..pipeline.build_record import make_record, write_build
    from ..pipeline.data_card import write_card
    from ..pipeline.report import render_report
    from ..pipeline.summary import summarize, table_of

    check_target(args.output_file)
    paths = run_directories(args.run)
    rows, left_out = build(paths, args.corrections, args.exclude, args.max_pairs_per_problem)
    record = make_record(args.output_file, rows, left_out)
    summary = summarize(paths, examples=False)
    scored = _score(args.logps, rows) if args.logps else rows
    where = save(scored, args.output_file, write_card(summary, record, args.license))
    write_build(args.run, record)
    report = Path(args.run) / "report.html"
    write_atomically(report, render_report(summary, record))
    counts = {"pairs": record.pairs, **{f"dropped ({why})": count for why, count in left_out.items()}}
    print(
        f"{count_line('build', args.run, counts)}\n\n{table_of(summary, record)}\n\nPairs: {where}\nReport: {report}"
    )


def _score(name: str, rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Add log-probabilities to step pairs, with the tokens of the trainer."""
    from ..generation.transformers import TransformersGenerator
    from ..pipeline.logps import add_logps
    from ..step_dpo.tokenization import StepTokenizer

    generator = TransformersGenerator.load(ModelSpec(name))
    return add_logps(rows, generator.model, StepTokenizer(generator.tokenizer))


def _data(args: argparse.Namespace) -> None:
    from ..pipeline.build import check_target
    from ..pipeline.names import corrections_name

    check_target(args.output_file)
    for test_set in args.exclude:
        deque(read_texts(test_set), maxlen=0)  # checks the file before anything is sampled
    changes = {
        name: value for name, value in model_changes(args).items() if name not in ("model", "backend", "tokenizer")
    }
    checker = resolve_checker(args.checker)
    problems = load_training_problems(args.problems, args.limit, checker)
    stages = [
        _collect_work(args, problems, checker),
        _localize_work(args, changes, checker),
        _rectify_work(args, changes, checker),
    ]
    corrections = corrections_name(args.judge, model_spec(args, "rectifier_", "--rectifier"))
    _check_corrections(args.corrections, corrections, _paths(args, args.output_dir))
    _judges(args).check_used(_names(args.judge) + _names(args.check))
    check_settings = _settings_check(args)
    if args.dry_run:
        for path in _paths(args, args.output_dir):
            check_settings(path)
        _print_estimate(args, args.output_dir, ["collect", "localize", "rectify"], len(problems))
        return

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        check_settings(folder)
        for name, stage in zip(("collect", "localize"), stages[:-1], strict=True):
            print(count_line(name, folder, stage(session, folder, shard)), flush=True)
        return stages[-1](session, folder, shard)

    _each(args, args.output_dir, "rectify", work)
    if args.shard:
        print(
            f"Shard done. When all shards are in {args.output_dir}, run:\n"
            f"stepdpo build {args.output_dir} --output-file {args.output_file}"
        )
        return
    args.run = args.output_dir
    args.corrections = args.corrections or corrections
    _build(args)


def _settings_check(args: argparse.Namespace) -> Callable[[Path], None]:
    """Return a function that refuses other settings of `localize` and `rectify` in a run, before `collect` starts."""
    judge_name, options = args.judge, _judges(args)
    num_corrections, max_attempts = args.num_corrections, args.max_attempts
    check = None if args.check == "none" else args.check
    rectifier = model_spec(args, "rectifier_", "--rectifier")

    def check_settings(folder: Path) -> None:
        from ..pipeline.session import check_settings

        check_settings(folder, judge_name, num_corrections, max_attempts, check, options, rectifier)

    return check_settings


def _check_corrections(chosen: str | None, written: str, paths: list[Path]) -> None:
    """Refuse corrections that neither exist nor will be written, before anything is sampled."""
    if chosen is None or chosen == written:
        return
    if not all((path / f"corrections.{chosen}.jsonl").exists() for path in paths):
        raise RunError(
            f"--corrections {chosen!r} will not exist: with these options the command writes {written!r}. Remove "
            "--corrections."
        )


def _report(args: argparse.Namespace) -> None:
    from ..pipeline.build import run_directories
    from ..pipeline.build_record import read_build
    from ..pipeline.report import render_report
    from ..pipeline.summary import summarize, table_of

    record = read_build(args.run)
    summary = summarize(run_directories(args.run), examples=record is None)
    if "collect" not in summary.settings:
        raise RunError(f"{args.run} holds no solutions yet. Run `stepdpo collect` first.")
    report = Path(args.run) / "report.html"
    write_atomically(report, render_report(summary, record))
    print(f"{table_of(summary, record)}\n\nReport: {report}")


def _import(args: argparse.Namespace) -> None:
    from ..pipeline.build import check_target, save
    from ..pipeline.data_card import write_import_card
    from ..pipeline.importers.formats import FORMATS

    check_target(args.output_file)
    reader = FORMATS[args.format.replace("-", "_")]
    counts: Counter[str] = Counter()
    if args.cases or reader.pairs is None:
        rows = [asdict(case) for case in reader.cases(args.file, counts)]
    else:
        rows = list(reader.pairs(args.file, counts))
    table = ", ".join(f"{count} {what}" for what, count in counts.items())
    if not rows:
        raise RunError(f"{args.file} has no rows to import ({table}). Check that it is in the format {args.format}.")
    where = save(rows, args.output_file, write_import_card(args.format, counts, len(rows)))
    print(f"{counted(len(rows), 'row')} in {where} ({table}).")
