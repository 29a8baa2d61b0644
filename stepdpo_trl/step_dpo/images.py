"""Images of step pairs: how they are read, and the text that stands for them in prompts."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from datasets import Image, IterableDataset
from transformers import Gemma3Processor
from transformers.image_utils import load_image

from ..data.schema import IMAGE_COLUMNS, get_images, is_step_data

logger = logging.getLogger(__name__)  # not accelerate's, which does not work in the processes of `Dataset.map`


def image_placeholder(processor: Any) -> str | None:
    """Return the text that stands for an image in prompts, or `None` if it is unknown."""
    # Gemma 3 has another token in the text than in the tokens
    token = getattr(processor, "boi_token" if isinstance(processor, Gemma3Processor) else "image_token", None)
    return None if token is None else str(token)


def media_tokens(processor: Any) -> dict[int, str]:
    """Return the ids of the tokens that stand for an image, a video or a sound, with the kind."""
    tokenizer = processor.tokenizer
    tokens = {image_placeholder(processor): "image"}
    for kind in ("image", "video", "audio"):
        tokens |= {getattr(owner, f"{kind}_token", None): kind for owner in (processor, tokenizer)}
    ids = {tokenizer.convert_tokens_to_ids(str(token)): kind for token, kind in tokens.items() if token is not None}
    # Unknown tokens, and Kosmos-2.5, whose images are a part of the text that starts with BOS
    others = (None, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {token_id: kind for token_id, kind in ids.items() if token_id not in others}


QWEN_FRAME = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def framed_placeholder(tokenizer: Any, placeholder: str) -> str:
    """Return the placeholder of an image with the tokens around it that the model expects."""
    is_qwen = placeholder == QWEN_FRAME[1] and set(QWEN_FRAME) <= tokenizer.get_vocab().keys()
    return "".join(QWEN_FRAME) if is_qwen else placeholder


def check_placeholders(
    text: str, images: int, placeholder: str, tokenizer: Any, has_template: bool, where: str
) -> None:
    """
    Check that a prompt has a placeholder for each image.

    Args:
        text (`str`):
            The prompt as the processor receives it.
        images (`int`):
            Number of images.
        placeholder (`str`):
            Text that the processor replaces by an image.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        has_template (`bool`):
            Whether a chat template has written the placeholders.
        where (`str`):
            Name of the row in messages.

    Raises:
        ValueError: If there are more placeholders than images, or fewer.
    """
    found, framed = text.count(placeholder), framed_placeholder(tokenizer, placeholder)
    if found == images:
        return
    advice = (
        f"Write {framed!r} for each image, fix the images, or remove the row."
        if found or has_template
        else "The processor has no chat template that would write them. Set `processor.chat_template`, or write "
        f"{framed!r} into the prompt for each image."
    )
    counts = f"{_count(found, 'image placeholder')} ({placeholder!r}) in its prompt but {_count(images, 'image')}"
    raise ValueError(f"{where} has {counts}. {advice}")


def warn_about_bare_placeholders(ids: list[int], placeholder: str, tokenizer: Any, where: str) -> None:
    """
    Log a warning, once per process, if images of Qwen's models lack the tokens around them.

    Args:
        ids (`list[int]`):
            Tokens of a prompt before placeholders are expanded.
        placeholder, tokenizer, where:
            As for [`check_placeholders`].
    """
    framed = framed_placeholder(tokenizer, placeholder)
    if framed == placeholder or placeholder in _warned:
        return
    frame = tokenizer.convert_tokens_to_ids(list(QWEN_FRAME))
    if any(token == frame[1] and ids[max(0, i - 1) : i + 2] != frame for i, token in enumerate(ids)):
        _warned.add(placeholder)
        logger.warning(
            f"{where} has a bare {placeholder!r} in its prompt, unlike prompts at inference, which have {framed!r}. "
            "Write this for each image, unless the bare token is intended. Other rows are not reported."
        )


_warned: set[str] = set()  # placeholders that have been reported as bare


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"


def load_images(row: Mapping[str, Any], where: str) -> list[Any]:
    """
    Load the images of a row.

    Args:
        row (`Mapping[str, Any]`):
            Row with a column `image` or `images`, or with neither. An image is a PIL image, an array, the bytes of a
            file, a path, a URL, or a dict with `bytes` and `path` as in an undecoded [`~datasets.Image`].
        where (`str`):
            Name of the row in error messages.

    Returns:
        `list`: PIL images or arrays.

    Raises:
        ValueError: If an image is missing or cannot be read.
    """
    with reading_images(where):
        columns = {name: row[name] for name in IMAGE_COLUMNS if name in row}  # decodes the images of a `Dataset`
    images = get_images(columns, where)
    with reading_images(where):
        return [_load(image) for image in images]


@contextmanager
def reading_images(where: str) -> Iterator[None]:
    """Turn errors into a `ValueError` that says which row has an image that cannot be read."""
    try:
        yield
    except Exception as error:  # PIL raises many types for corrupt files
        raise ValueError(
            f"An image of {where} cannot be read: {type(error).__name__}: {str(error).rstrip('.')}. Fix the image, or "
            "remove the row."
        ) from error


def _load(image: Any) -> Any:
    if isinstance(image, bytes):
        image = {"bytes": image}
    elif isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        if "://" not in path and not path.startswith("data:image/") and not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path!r}")
        is_url = path.startswith(("http://", "https://", "data:image/"))
        image = load_image(path) if is_url else {"path": path}
    if isinstance(image, Mapping):
        encoded = {"bytes": image.get("bytes"), "path": image.get("path")}
        if encoded["bytes"] is None and encoded["path"] is None:
            raise TypeError("neither `bytes` nor `path` is set")
        image = Image().decode_example(encoded)  # also from archives and the Hub
    if isinstance(image, PIL.Image.Image):
        image.load()  # finds truncated files
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:  # as for files
            image = PIL.ImageOps.exif_transpose(image)
    elif not hasattr(image, "shape"):
        raise TypeError(
            f"a value of type `{type(image).__name__}` is not an image. Use a PIL image, a path, a URL or bytes, or "
            "cast the column with `datasets.Image()`"
        )
    return image


def without_decoding(dataset: IterableDataset) -> IterableDataset:
    """Return a stream of step pairs whose images are decoded by [`load_images`], so that errors name the row."""
    if dataset.features is None or not is_step_data(dataset.features):
        return dataset
    return dataset.decode(False)


def digest_images(images: Sequence[Any]) -> str:
    """Return a hash of the sizes and pixels of images."""
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        pixels = np.asarray(image.convert("RGBA") if getattr(image, "mode", None) == "P" else image)
        digest.update(repr(pixels.shape).encode() + pixels.tobytes())
    return digest.hexdigest()
