"""
Images that the rows of a batch have in common: each is processed once, and encoded once in padded rows.

With a prefix tree, [`~stepdpo_trl.shared_prefix.vision`] finds the different images of a batch. The classes and
functions here do not need one: TRL passes each image to the processor for the chosen and for the rejected row of a
pair, and padded rows repeat the images of a batch in its second half.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .vision import (
    IMAGE_KEYS,
    STACKED,
    ImageFeatures,
    ImageInputs,
    concatenate_images,
    different_images,
    split_patches,
)


class HalfOfImages:
    """
    Image processor that processes the first half of its images only if the second half repeats it.

    Args:
        image_processor (`BaseImageProcessor`):
            Image processor that it replaces.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.image_processor, name)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Process the images of several rows, given as lists."""
        half = len(images) // 2 if isinstance(images, list) else 0
        nested = half and all(isinstance(own, list) for own in images)
        if not nested or [*map(_identities, images[:half])] != [*map(_identities, images[half:])]:
            return self.image_processor(images, *args, **kwargs)
        output = self.image_processor(images[:half], *args, **kwargs)
        if not all(isinstance(value, (torch.Tensor, np.ndarray, list)) for value in output.values()):
            return self.image_processor(images, *args, **kwargs)
        for name, value in output.items():
            if isinstance(value, torch.Tensor):
                output[name] = torch.cat([value, value])
            else:
                output[name] = np.concatenate([value, value]) if isinstance(value, np.ndarray) else value + value
        return output


def _identities(images: list[Any]) -> list[int]:
    return [id(image) for image in images]


@contextlib.contextmanager
def images_processed_once(collator: Any) -> Iterator[None]:
    """Let a collator process each image once, although TRL passes it to the processor for both rows of a pair."""
    processor: Any = getattr(collator, "processor", None)
    original = getattr(processor, "image_processor", None)
    if original is None:
        yield
        return
    processor.image_processor = HalfOfImages(original)
    try:
        yield
    finally:
        processor.image_processor = original


def takes_encoded_images(model: Any) -> bool:
    """Return whether a model accepts encoded images, which older versions of Transformers do not."""
    return "mm_encoder_outputs" in inspect.signature(type(model.base_model).forward).parameters


def image_arguments(model: Any) -> list[str]:
    """Return the names of the arguments from which a model encodes images."""
    parameters = inspect.signature(model.base_model.get_image_features).parameters
    return [name for name in IMAGE_KEYS if name in parameters]


def images_are_repeated(batch: dict[str, Any], names: list[str]) -> bool:
    """Return whether the second half of the images of a batch equals the first, as the rejected rows of pairs do."""
    inputs = [batch[name] for name in names if batch.get(name) is not None]
    return "pixel_values" in batch and all(
        len(value) % 2 == 0 and torch.equal(*value.tensor_split(2)) for value in map(torch.as_tensor, inputs)
    )


def encode_images_once(model: Any) -> None:
    """
    Make a model accept `repeated_images=True`, with which it encodes only the first half of the images of a batch.

    The images of the rejected rows are those of the chosen rows, so the features are used for both. Images that
    several pairs have in common are encoded once too, except for the layouts `ANYRES` and `TILES`. Without the
    argument, the model is unchanged. Repeated calls have no effect.

    Args:
        model (`PreTrainedModel`):
            Model, without the wrapper of PEFT.
    """
    backbone, names = model.base_model, image_arguments(model)
    # Stays true if others wrap the forward later. In an unpickled copy both are the forward of the class
    if getattr(backbone, "forward_with_all_images", backbone.forward) != backbone.forward:
        return
    backbone.forward_with_all_images = backbone.forward

    @functools.wraps(type(backbone).forward)
    def forward(self: Any, *args: Any, repeated_images: bool = False, **kwargs: Any) -> Any:
        if repeated_images:
            given = {name: torch.as_tensor(kwargs[name]) for name in names if kwargs.get(name) is not None}
            halves = {name: value.tensor_split(2)[0] for name, value in given.items()}
            arguments, images = _only_different(halves, self.config.model_type)
            features = ImageFeatures(self.get_image_features(**arguments, return_dict=True))
            images = list(range(len(features.pooled))) if images is None else images
            kwargs = {**kwargs, "pixel_values": None, "mm_encoder_outputs": features.select(images * 2)}
        return self.forward_with_all_images(*args, **kwargs)

    backbone.forward = types.MethodType(forward, backbone)


def _only_different(
    inputs: dict[str, torch.Tensor], model_type: str
) -> tuple[dict[str, torch.Tensor], list[int] | None]:
    """Return the arguments for the different images, and the index of each image among them, or `None` for all."""
    if inputs.keys() == {"pixel_values", "image_grid_thw"}:
        images = split_patches(inputs["pixel_values"], inputs["image_grid_thw"])
    elif inputs.keys() == {"pixel_values"} and model_type in (*STACKED, "aya_vision"):
        images = [ImageInputs({"pixel_values": one}, 0) for one in inputs["pixel_values"].split(1)]
    else:
        return inputs, None
    different, indices = different_images(images)
    return concatenate_images(different), indices
