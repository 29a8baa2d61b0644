"""The command `stepdpo loop`: its own arguments, those of `stepdpo data`, and behind `--` those of `stepdpo train`."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..generation.model_folders import adapter_base, fingerprint
from ..pipeline.loop import MODEL, PAIRS, RUN, TRAINING, run_loop
from ..runs.run_directory import RunError
from .options import parse

# What each stage sets by itself
_OF_DATA = ("--output-dir", "--output-file", "--shard", "--model", "--seed")
_OF_TRAINING = ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint")


def make_parser() -> argparse.ArgumentParser:
    """The parser of what is neither the data pipeline's nor the trainer's."""
    parser = argparse.ArgumentParser(
        prog="stepdpo loop",
        usage="%(prog)s --model M --output-dir LOOP --stages T --problems FILE [option of `stepdpo data` ...] "
        "-- [option of `stepdpo train` ...]",
        description="Alternate between making pairs and training on them: each stage's pairs are sampled anew from "
        "the model that the last stage made, which is the reference too. Give the same command again after an "
        "interruption. Options other than --model and --seed may change for what has not begun.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="the model to begin with: id or folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the loop")
    parser.add_argument("--stages", type=int, default=3, help="how many (%(default)s); more can be asked for later")
    parser.add_argument("--seed", type=int, default=0, help="of the first stage's samples; the next has the next one")
    return parser


def loop(argv: list[str]) -> None:
    """
    Run the loop, each part in a process of its own, so that the one leaves the GPU to the other.

    Args:
        argv (`list[str]`):
            The command line behind `stepdpo loop`.

    Raises:
        RunError: If something cannot be used, or a part fails.
    """
    parser = make_parser()
    place = argv.index("--") if "--" in argv else len(argv)
    args, data = parser.parse_known_args(argv[:place])
    training = argv[place + 1 :]
    if args.stages < 1:
        raise RunError(f"--stages {args.stages} must be at least 1.")
    _check_data(data)
    _check_training(training)

    def make_pairs(number: int, model: str, folder: Path) -> None:
        where = ["--output-dir", str(folder / RUN), "--output-file", str(folder / PAIRS)]
        own = ["--model", model, "--seed", str(args.seed + number - 1)]
        _run(folder, ["data", *own, *where, *data])

    def train(number: int, model: str, folder: Path) -> None:
        output_dir = folder / TRAINING
        own = ["--model_name_or_path", model, "--dataset_name", str(folder / PAIRS), "--output_dir", str(output_dir)]
        _run(folder, ["train", *own, *_resume(output_dir), *training])
        if (output_dir / "adapter_config.json").is_file():
            merge_adapter(output_dir, folder / MODEL)
        else:
            os.replace(output_dir, folder / MODEL)

    settings = {"model": args.model, "weights": fingerprint([args.model]), "seed": args.seed}
    run_loop(args.output_dir, args.model, args.stages, make_pairs, train, settings)
    print(f"{args.stages} stages done. The model is in {args.output_dir / f'stage-{args.stages}' / MODEL}.")


def merge_adapter(adapter: Path, to: Path) -> None:
    """
    Write a model with its adapter worked into the weights, for which every back end and the next stage have a use.

    Args:
        adapter (`Path`):
            Folder of the adapter, with the tokenizer.
        to (`Path`):
            Where the model goes. Appears when all of it is written.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = to.with_name(to.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    # AutoPeftModelForCausalLM would cut the embeddings to the size of the tokenizer
    base: Any = adapter_base(str(adapter))
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(unfinished)
    os.replace(unfinished, to)


def _check_data(argv: list[str]) -> None:
    """Exits with the parser's message if an option is not one of `stepdpo data`."""
    from .data import add_commands

    given = [name for name in _OF_DATA if any(word.partition("=")[0] == name for word in argv)]
    if given:
        raise RunError(f"{', '.join(given)} cannot be given: each stage of the loop has its own.")
    parser = argparse.ArgumentParser(prog="stepdpo loop", allow_abbrev=False)
    add_commands(parser.add_subparsers())
    args = parse(parser, ["data", *argv, "--model", "M", "--output-dir", RUN, "--output-file", PAIRS])
    if args.base_url or args.backend == "openai":
        raise RunError(
            "--base-url does not go with the loop: a server would go on answering with the model that it has loaded. "
            "Leave it out; the loop loads the model of each stage by itself (--backend transformers or vllm)."
        )


def _check_training(argv: list[str]) -> None:
    """Exits with the parser's message if an option is not one of `stepdpo train`."""
    from .train import parse_arguments, split_joined

    given = [name for name in _OF_TRAINING if any(word.partition("=")[0] == f"--{name}" for word in argv)]
    if given:
        raise RunError(f"{', '.join(f'--{name}' for name in given)} cannot be given: each stage has its own.")
    own = ["--model_name_or_path", "M", "--dataset_name", "pairs", "--output_dir", TRAINING]
    (_, config, _, _, sdpo), _, _ = parse_arguments(
        [*split_joined(argv), *own], prog="stepdpo loop ... --", launcher=True
    )
    asked: dict[str, Any] = {name: getattr(config, name) for name in ("prompt_suffix", "system_prompt")}
    asked |= {"prompt_template": config.prompt_template, "sdpo": sdpo.sdpo}
    asked = {name: value for name, value in asked.items() if value}
    if asked:
        raise RunError(
            f"{', '.join(f'{name}={value!r}' for name, value in asked.items())} does not go with the loop: its pairs "
            "hold what the model was asked, word for word (--prompt), and its stages are its own. Leave it out."
        )


def _resume(output_dir: Path) -> list[str]:
    """Where training goes on after an interruption."""
    from ..sdpo.files import find_checkpoint

    try:
        return ["--resume_from_checkpoint", str(find_checkpoint(output_dir, True)[0])]
    except ValueError:  # nothing there yet
        return []


def _run(folder: Path, argv: list[str]) -> None:
    print(f"\n{folder.name}: stepdpo {shlex.join(argv)}", flush=True)
    # The lock of the loop's folder goes along
    done = subprocess.run([sys.executable, "-m", "stepdpo_trl.cli.main", *argv], close_fds=False)
    if done.returncode:
        raise RunError(
            f"{folder.name}: `stepdpo {argv[0]}` ended with status {done.returncode}; see above. Where that can be "
            f"mended, the same command goes on from here. To begin the stage anew with other options, remove {folder}."
        )
