"""Arguments of the commands that make step pairs: collect, localize, rectify, build, data, report, import."""

import argparse
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.files import write_atomically
from ..data.prompts import STEP_PROMPTS
from ..generation import Sampling
from ..pipeline.judges.expressions import JUDGES, parse_judges
from ..pipeline.policy import resolve_step_prompt
from ..pipeline.records import count_line, describe_source, read_problems, read_texts
from ..runs.run_directory import RunError
from .options import add_command, model_changes, model_options, model_spec, positive, text_of


def add_commands(commands: Any) -> None:
    """
    Add the commands.

    Args:
        commands (`argparse._SubParsersAction`):
            Where to.
    """
    collect = add_command(commands, "collect", "sample solutions and keep the wrong ones", _collect)
    _collect_options(collect)
    _where(collect, "--output-dir")
    localize = add_command(commands, "localize", "find the first wrong step of each wrong solution", _localize)
    _where(localize, "run")
    _localize_options(localize)
    model_options(localize, "", "the model that wrote the solutions, where that has moved", given=False)
    rectify = add_command(commands, "rectify", "let the model write the first wrong step anew", _rectify)
    _where(rectify, "run")
    rectify.add_argument("--judge", metavar="NAME", help="whose verdicts to take, where there are several")
    _rectify_options(rectify)
    _judge_options(rectify)
    model_options(rectify, "", "the model that wrote the solutions, where that has moved", given=False)
    build = add_command(commands, "build", "make a data set of step pairs", _build)
    build.add_argument("run", help="folder of the run, or of its shards")
    _build_options(build)
    data = add_command(commands, "data", "collect, localize, rectify and build", _data)
    _collect_options(data)
    _where(data, "--output-dir")
    _localize_options(data)
    _rectify_options(data)
    _build_options(data)
    report = add_command(
        commands, "report", "what a run gave and cost: a table, and report.html in its folder", _report
    )
    report.add_argument("run", help="folder of the run, or of its shards")
    imports = add_command(commands, "import", "make step pairs of published data", _import)
    imports.add_argument("format", choices=("prm800k", "math-shepherd", "processbench"))
    imports.add_argument("file", help="the file as published")
    imports.add_argument("--output-file", required=True, help="file that ends in .jsonl or .parquet, or hub:USER/NAME")
    imports.add_argument(
        "--cases", action="store_true", help="solutions with their first wrong step, to test judges on"
    )


def _where(parser: argparse.ArgumentParser, name: str) -> None:
    required = {"required": True} if name.startswith("--") else {}
    parser.add_argument(name, metavar="RUN", help="folder of the run", **required)  # type: ignore[arg-type]
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="work on part I of N, from 0, in a folder of its own"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where the shards are worked on")
    parser.add_argument("--shards", type=positive, default=1, help="parts that Ray works on side by side")
    parser.add_argument("--num-gpus", type=float, default=0, help="GPUs for each part, under Ray")


def _collect_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser, "", "the model whose mistakes are collected")
    group = parser.add_argument_group("what it is asked")
    group.add_argument("--problems", required=True, metavar="FILE", help="JSON lines or Parquet: problem, answer")
    group.add_argument("--limit", type=positive, help="the first so many problems")
    group.add_argument(
        "--prompt", default="qwen2-boxed", help=f"{', '.join(STEP_PROMPTS)}, or a file with a Jinja template"
    )
    group.add_argument(
        "--response-prefix", help="how every answer begins, such as 'Step 1:' (that of the named prompt)"
    )
    group.add_argument("--num-samples", type=positive, default=2, help="solutions of each problem")
    group.add_argument("--temperature", type=float, default=0.8)
    group.add_argument("--top-p", type=float, default=0.95)
    group.add_argument("--max-new-tokens", type=int, default=1024)
    group.add_argument("--seed", type=int, default=0)


def _localize_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge",
        default="rollout",
        metavar="JUDGES",
        help=f"{', '.join(JUDGES)}; joined by + (what all agree on) and > (the next where the first is silent)",
    )
    parser.add_argument("--num-rollouts", type=positive, default=8, help="rollouts of a prefix at most")
    parser.add_argument("--port", type=int, help="of the page for a person (a free one)")
    _judge_options(parser)


def _judge_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser, "judge-", "the language model that judges", given=False)
    group = parser.add_argument_group("judges")
    group.add_argument("--votes", type=positive, default=1, help="replies of the judge that count")
    group.add_argument("--no-gold", action="store_true", help="the judge sees neither answer nor solution")
    group.add_argument("--judge-prompt", metavar="FILE", help="Jinja template: problem, answer, solution, steps")
    group.add_argument("--prm", metavar="MODEL", help="process reward model")
    group.add_argument("--threshold", type=float, default=0.5, help="least probability of a right step")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with that model")


def _rectify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-corrections", type=positive, default=1, help="preferred steps for each wrong solution")
    parser.add_argument("--max-attempts", type=positive, default=20, help="samples for each wrong solution at most")
    parser.add_argument(
        "--check",
        default="arithmetic",
        metavar="JUDGES",
        help="who looks at the preferred step too: arithmetic, llm, prm, none",
    )
    model_options(parser, "rectifier-", "another model that writes the preferred steps", flag="--rectifier")


def _build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-file", required=True, help="file that ends in .jsonl or .parquet, or hub:USER/NAME (private)"
    )
    parser.add_argument("--corrections", metavar="WAY", help="which to take, where there are several")
    parser.add_argument("--exclude", action="append", default=[], metavar="FILE", help="problems of a test set")
    parser.add_argument("--max-pairs-per-problem", type=positive, metavar="M", help="most pairs of a problem")
    parser.add_argument("--logps", metavar="MODEL", help="add log-probabilities of both steps under this model")


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I below N, such as 0/4")
    return int(match[1]), int(match[2])


def _folders(args: argparse.Namespace, path: str) -> list[tuple[Path, tuple[int, int]]]:
    """Folders to work on, with the shard that each holds."""
    from ..pipeline.build import run_directories

    if args.engine == "local" and (args.shards > 1 or args.num_gpus):
        raise RunError("--shards and --num-gpus are for --engine ray. Without it, --shard I/N works on one part.")
    if args.engine == "ray" and args.shard:
        raise RunError("--shard I/N is for --engine local; under Ray --shards N works on all parts.")
    count = args.shards if args.engine == "ray" else args.shard[1] if args.shard else 1
    if count > 1:
        which = [args.shard[0]] if args.shard else range(count)
        return [(Path(path) / f"shard-{index}-of-{count}", (index, count)) for index in which]
    return [(folder, (0, 1)) for folder in run_directories(path)]


def _each(args: argparse.Namespace, path: str, work: Callable[[Any, Path, tuple[int, int]], Any]) -> None:
    """Do a stage in each folder."""
    folders = _folders(args, path)
    if args.engine == "ray":
        from ..pipeline.ray import run_on_ray

        run_on_ray(work, folders, args.num_gpus)
        return
    from ..pipeline.session import Session

    with Session() as session:
        for folder, shard in folders:
            counts = work(session, folder, shard)
            print(count_line(folder, counts))


def _collect_work(args: argparse.Namespace) -> Callable[[Any, Path, tuple[int, int]], Any]:
    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens)
    prompt = resolve_step_prompt(text_of(args.prompt), args.response_prefix)
    model = model_spec(args)
    problems = read_problems(args.problems, args.limit)
    name, samples, seed = Path(args.problems).stem, args.num_samples, args.seed
    source = describe_source(args.problems)

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        return session.collect(folder, problems, name, model, prompt, sampling, samples, seed, shard, source)

    return work


def _judges(args: argparse.Namespace) -> Any:
    from ..pipeline.session import JudgeOptions

    prompt = text_of(args.judge_prompt) if args.judge_prompt else None
    if args.judge_prompt and prompt == args.judge_prompt:
        raise RunError(f"--judge-prompt: there is no file {args.judge_prompt!r}.")
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


def _localize_work(args: argparse.Namespace, changes: dict[str, Any]) -> Callable[[Any, Path, tuple[int, int]], Any]:
    judge_name, options = args.judge, _judges(args)
    if "human" in judge_name and args.engine == "ray":
        raise RunError("Judge 'human' needs a person at this machine: use --engine local.")
    options.check([name for group in parse_judges(judge_name) for name in group])

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        return session.localize(folder, judge_name, options, changes)

    return work


def _rectify_work(args: argparse.Namespace, changes: dict[str, Any]) -> Callable[[Any, Path, tuple[int, int]], Any]:
    from ..pipeline.session import check_rectify

    judge_name, num_corrections, max_attempts, options = (
        args.judge,
        args.num_corrections,
        args.max_attempts,
        _judges(args),
    )
    check = None if args.check == "none" else args.check
    rectifier = model_spec(args, "rectifier_", "--rectifier")
    check_rectify(check, options, num_corrections, max_attempts)

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        return session.rectify(folder, judge_name, num_corrections, max_attempts, check, options, rectifier, changes)

    return work


def _collect(args: argparse.Namespace) -> None:
    _each(args, args.output_dir, _collect_work(args))


def _localize(args: argparse.Namespace) -> None:
    _each(args, args.run, _localize_work(args, model_changes(args)))


def _rectify(args: argparse.Namespace) -> None:
    _each(args, args.run, _rectify_work(args, model_changes(args)))


def _build(args: argparse.Namespace) -> None:
    from ..pipeline.build import build, check_target, run_directories, save
    from ..pipeline.build_record import make_record, write_build
    from ..pipeline.data_card import write_card
    from ..pipeline.report import render_report
    from ..pipeline.summary import summarize, table_of

    check_target(args.output_file)
    paths = run_directories(args.run)
    score = functools.partial(_score, args.logps) if args.logps else None
    rows, left_out = build(paths, args.corrections, args.exclude, args.max_pairs_per_problem, score)
    record = make_record(args.output_file, rows, left_out)
    summary = summarize(paths)
    where = save(rows, args.output_file, write_card(summary, record, getattr(args, "license", None)))
    write_build(args.run, record)
    report = Path(args.run) / "report.html"
    write_atomically(report, render_report(summary, record))
    print(f"{table_of(summary, record)}\nPairs: {where}\nReport: {report}")


def _score(name: str, rows: list[dict[str, Any]]) -> None:
    """Add log-probabilities to step pairs, with the tokens of the trainer."""
    from ..generation import ModelSpec
    from ..generation.transformers import TransformersGenerator
    from ..pipeline.logps import add_logps
    from ..step_dpo.tokenization import StepTokenizer

    generator = TransformersGenerator.load(ModelSpec(name))
    add_logps(rows, generator.model, StepTokenizer(generator.tokenizer))


def _data(args: argparse.Namespace) -> None:
    from ..pipeline.build import check_target
    from ..pipeline.session import corrections_name

    check_target(args.output_file)
    for problems in args.exclude:
        read_texts(problems)
    changes = {
        name: value for name, value in model_changes(args).items() if name not in ("model", "backend", "tokenizer")
    }
    stages = [_collect_work(args), _localize_work(args, changes), _rectify_work(args, changes)]

    def work(session: Any, folder: Path, shard: tuple[int, int]) -> Any:
        for stage in stages[:-1]:
            print(count_line(folder, stage(session, folder, shard)))
        return stages[-1](session, folder, shard)

    _each(args, args.output_dir, work)
    if args.shard:
        print(
            f"Shard done. With all shards in {args.output_dir}: stepdpo build {args.output_dir} --output-file {args.output_file}"
        )
        return
    args.run = args.output_dir
    args.corrections = args.corrections or corrections_name(args.judge, model_spec(args, "rectifier_", "--rectifier"))
    _build(args)


def _report(args: argparse.Namespace) -> None:
    from ..pipeline.build import run_directories
    from ..pipeline.build_record import read_build
    from ..pipeline.report import render_report
    from ..pipeline.summary import summarize, table_of

    summary, record = summarize(run_directories(args.run)), read_build(args.run)
    report = Path(args.run) / "report.html"
    write_atomically(report, render_report(summary, record))
    print(f"{table_of(summary, record)}\nReport: {report}")


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
        raise RunError(f"{args.file} gives nothing: {table}.")
    where = save(rows, args.output_file, write_import_card(args.format, counts, len(rows)))
    print(f"{len(rows)} rows in {where} ({table}).")
