"""Local model folders: fingerprints of their content, and the base model of an adapter."""

from collections.abc import Iterable
from pathlib import Path

from ..data.files import hash_files

SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model")  # weights, configurations, templates, tokenizers


def fingerprint(places: Iterable[str | None]) -> str | None:
    """
    Hash the files of local models, so that a model that was trained further gets another fingerprint.

    The hash covers names, sizes and samples of the content of all files with weights, configurations, chat templates
    and tokenizers.

    Args:
        places (`Iterable[str]`):
            Folders. Hub ids and `None` are ignored.

    Returns:
        `str` or `None`: The fingerprint, or `None` if none of the places is a local folder.
    """
    folders = [Path(place) for place in places if place and Path(place).is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    return hash_files(files) if files else None


def adapter_base(name: str) -> str | None:
    """
    Return the base model of an adapter.

    Args:
        name (`str`):
            Folder of the adapter.

    Returns:
        `str` or `None`: Id or folder of the base model, or `None` if `name` is not the folder of an adapter.
    """
    if not (Path(name) / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    base: str | None = PeftConfig.from_pretrained(name).base_model_name_or_path
    return base
