"""What is in folders of models."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

CHUNK, CHUNKS = 2**16, 64  # bytes of a file that are looked at: all of it would take as long as loading it
SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model")  # weights, configurations, templates, tokenizers


def fingerprint(places: Iterable[str | None]) -> str | None:
    """
    Tell models apart that stand under one name: one that was trained on since is another.

    Args:
        places (`Iterable[str]`):
            Ids or folders.

    Returns:
        `str`: The same for the same files, or `None` if none of them is a folder.
    """
    folders = [Path(place) for place in places if place and Path(place).is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    seen = sha256()
    for file in files:
        size = file.stat().st_size
        seen.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(CHUNK, size // CHUNKS)):
                content.seek(start)
                seen.update(content.read(CHUNK))
    return seen.hexdigest()[:16] if files else None


def adapter_base(name: str) -> str | None:
    """The base model where `name` is the folder of an adapter."""
    if not (Path(name) / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    base: str | None = PeftConfig.from_pretrained(name).base_model_name_or_path
    return base
