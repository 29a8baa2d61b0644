"""Merging of an adapter into its base model."""

import os
import shutil
from pathlib import Path
from typing import Any

from ..data.files import partial_path
from .model_folders import adapter_base
from .protocol import GenerationError


def merge_adapter(adapter: Path, output_dir: Path) -> None:
    """
    Merge an adapter into its base model and save the result, which every inference backend can load.

    Args:
        adapter (`Path`):
            Folder of the adapter. The tokenizer is taken from there if it has one, otherwise from the base model.
        output_dir (`Path`):
            Folder of the merged model. It appears once everything is written.

    Raises:
        GenerationError: If the folder holds no adapter, or a model cannot be loaded.
    """
    base: Any = adapter_base(str(adapter))
    if base is None:
        raise GenerationError(
            f"{adapter} is not the folder of a PEFT adapter: it has no adapter_config.json with a base model. Pass "
            "the output_dir of a training with --use_peft."
        )
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = partial_path(output_dir)
    shutil.rmtree(unfinished, ignore_errors=True)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    try:
        # AutoPeftModelForCausalLM would cut the embeddings to the size of the tokenizer
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else base)
    except (OSError, ValueError) as error:
        raise GenerationError(f"The base model {base!r} of {adapter} cannot be loaded: {error}") from error
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, output_dir)
