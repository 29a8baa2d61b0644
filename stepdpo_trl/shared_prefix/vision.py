"""
Images in a prefix tree: each image is encoded once per batch, and rows share a prefix only if its images are equal.

A processor repeats the images of a pair for its chosen and its rejected row, and expands each image to a number of
equal placeholder tokens. [`ImageLayout`] takes the images of a batch apart, finds the different ones, and gives the
placeholders of each image their own key, so that the tree branches where images differ. In the forward pass, the
model's own `get_image_features` encodes the different images, and each pack receives the features of its
placeholders through the argument `mm_encoder_outputs`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .tree import PrefixTree, build_tree

# Model types by the layout of their images in a batch, see `ImageLayout`
PATCHES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
ANYRES = ("llava_onevision",)
TILES = ("idefics3", "smolvlm")
STACKED = ("gemma3", "internvl", "llava")
BLOCKS = ("gemma3",)  # the tokens of an image attend to all of its tokens
VISION_MODEL_TYPES = tuple(sorted(PATCHES + ANYRES + TILES + STACKED))
# Model types without prefix sharing whose rows can receive encoded images
ENCODED_ONCE = (*VISION_MODEL_TYPES, "aya_vision", "glm4v", "qwen3_5")

# Keys of a batch that describe images or the types of tokens
IMAGE_KEYS = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")


@dataclass
class ImageInputs:
    """An image, or a tile of one, that is encoded independently of all others."""

    inputs: dict[str, torch.Tensor]  # arguments of `get_image_features` for this image
    tokens: int  # number of its placeholder tokens
    alone: bool = True  # whether it is the only image of its row, which LLaVA-OneVision then splits into patches

    def equals(self, other: "ImageInputs") -> bool:
        """Return whether two images have equal features."""
        return (self.tokens, self.alone) == (other.tokens, other.alone) and all(
            torch.equal(value, other.inputs[name]) for name, value in self.inputs.items()
        )

    def fingerprint(self) -> tuple[float, ...]:
        """Return some of the pixel values, by which few images are candidates for equality."""
        pixels = self.inputs["pixel_values"].flatten()
        return (len(pixels), *pixels[:: max(1, len(pixels) // 32)].tolist())


@dataclass
class ImageLayout:
    """
    Layout of the images in the batches of a model's processor.

    Args:
        model_type (`str`):
            Model type, one of `VISION_MODEL_TYPES`.
        image_token_id (`int`):
            Id of the placeholder token.
        merge_size (`int`, *optional*, defaults to `1`):
            Side of the square of patches that become one token. Only for `PATCHES`.
    """

    model_type: str
    image_token_id: int
    merge_size: int = 1

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ImageLayout":
        """Return the layout of a model."""
        merge_size = getattr(config.vision_config, "spatial_merge_size", 1)
        return cls(config.model_type, config.image_token_id, merge_size)

    def build_tree(
        self,
        batch: dict[str, Any],
        rows: Sequence[Any],
        labels: Sequence[Any],
        max_tokens: int | None = None,
    ) -> PrefixTree:
        """
        Build the prefix tree of a batch with images.

        Args:
            batch (`dict`):
                Batch of the processor.
            rows, labels, max_tokens:
                As in [`~stepdpo_trl.shared_prefix.tree.build_tree`].

        Returns:
            `PrefixTree`: The batch as a prefix tree, with its different images.
        """
        placeholders = [row == self.image_token_id for row in rows]
        images = self._images(batch, [int(mask.sum()) for mask in placeholders])
        owners = self._owners(images, [int(mask.sum()) for mask in placeholders])
        different, indices = different_images(images)
        # Negative numbers are not token ids
        keys: list[Any] = [np.array(row, dtype=np.int64) for row in rows]
        for key, mask, own in zip(keys, placeholders, owners, strict=True):
            key[mask] = [-1 - indices[i] for i in own for _ in range(images[i].tokens)]
        tree = build_tree(rows, labels, max_tokens, keys)
        flat = np.concatenate(keys)
        blocks = _blocks(flat, owners) if self.model_type in BLOCKS and "token_type_ids" in batch else None
        for pack in tree.packs:
            pack.images = _images_of(flat[pack.origins.numpy()], [image.tokens for image in different])
            pack.blocks = None if blocks is None else blocks[pack.origins]
        tree.images = self._arguments(different)
        return tree

    def _images(self, batch: dict[str, Any], counts: list[int]) -> list[ImageInputs]:
        """Take the images of a batch apart, given the number of placeholders of each row."""
        pixels = batch["pixel_values"]
        if self.model_type in PATCHES:
            return split_patches(pixels, batch["image_grid_thw"], self.merge_size)
        if self.model_type in ANYRES:
            # Rows without images are not always listed
            numbers = [int(number) for number in batch["batch_num_images"] if number > 0]
            rows = zip(numbers, [count for count in counts if count], strict=True)
            per_image = [(number == 1, count // number) for number, count in rows for _ in range(number)]
            return [
                ImageInputs({"pixel_values": values, "image_sizes": size}, tokens, alone)
                for values, size, (alone, tokens) in zip(
                    pixels.split(1), batch["image_sizes"].split(1), per_image, strict=True
                )
            ]
        inputs = [{"pixel_values": values} for values in pixels.split(1)]
        if self.model_type in TILES:  # rows are padded with tiles of zeros
            names = [name for name in ("pixel_values", "pixel_attention_mask") if name in batch]
            real = (pixels != 0).flatten(2).any(-1).nonzero().tolist()
            inputs = [{name: batch[name][row : row + 1, i : i + 1] for name in names} for row, i in real]
        tokens, rest = divmod(sum(counts), max(1, len(inputs)))
        if rest:
            raise ValueError(_mismatch(f"The batch has {sum(counts)} image tokens for {len(inputs)} images"))
        return [ImageInputs(one, tokens) for one in inputs]

    def _owners(self, images: list[ImageInputs], counts: list[int]) -> list[list[int]]:
        """Return the indices of the images of each row."""
        owners, used = [], 0
        for row, count in enumerate(counts):
            own: list[int] = []
            while count > 0 and used < len(images):
                own.append(used)
                count -= images[used].tokens
                used += 1
            if count:
                problem = "more" if count > 0 else "fewer"
                raise ValueError(_mismatch(f"Row {row} of the batch has {problem} image tokens than its images need"))
            owners.append(own)
        if used < len(images):
            raise ValueError(_mismatch(f"The batch has {len(images)} images, but image tokens for {used} of them"))
        return owners

    def _arguments(self, images: list[ImageInputs]) -> dict[str, torch.Tensor]:
        """Return the arguments of `get_image_features` for several images, with those that are alone first."""
        if self.model_type not in ANYRES:
            return concatenate_images(images)
        # The number of images of each row: 1 for an image that is split into patches. All others form one row, of at
        # least two images, and the features of a second copy are not used
        together = [image for image in images if not image.alone]
        copies = together * (len(together) == 1)
        numbers = [1] * (len(images) - len(together)) + [len(together + copies)] * bool(together)
        return {**concatenate_images(images + copies), "batch_num_images": torch.tensor(numbers)}


def split_patches(pixels: torch.Tensor, grids: torch.Tensor, merge_size: int = 1) -> list[ImageInputs]:
    """Return the images of a batch that concatenates their patches."""
    patches = grids.prod(-1).tolist()
    return [
        ImageInputs({"pixel_values": values, "image_grid_thw": grid}, number // merge_size**2)
        for values, grid, number in zip(pixels.split(patches), grids.split(1), patches, strict=True)
    ]


def concatenate_images(images: list[ImageInputs]) -> dict[str, torch.Tensor]:
    """Return the arguments of `get_image_features` for several images."""
    return {name: torch.cat([image.inputs[name] for image in images]) for name in images[0].inputs}


def _mismatch(problem: str) -> str:
    return (
        f"{problem}. Images must not be truncated: increase `max_length`, set it to `None`, or use smaller images. If "
        "nothing is truncated, set `shared_prefix='off'`."
    )


def different_images(images: list[ImageInputs]) -> tuple[list[ImageInputs], list[int]]:
    """Return the different images, those that are alone first, and for each image its index among them."""
    candidates: dict[tuple[float, ...], list[int]] = {}
    first = list(range(len(images)))  # for each image, the first image that is equal
    for i, image in enumerate(images):
        known = candidates.setdefault(image.fingerprint(), [])
        first[i] = next((k for k in known if image.equals(images[k])), i)
        if first[i] == i:
            known.append(i)
    order = sorted(set(first), key=lambda i: (not images[i].alone, i))
    return [images[i] for i in order], [order.index(i) for i in first]


def _images_of(keys: np.ndarray, tokens: list[int]) -> list[int]:
    """Return the images of a pack in the order of their placeholders, whose keys are -1 minus the image."""
    placeholders = -1 - keys[keys < 0]
    images, position = [], 0
    while position < len(placeholders):
        images.append(int(placeholders[position]))
        position += tokens[images[-1]]
    return images


def _blocks(keys: np.ndarray, owners: list[list[int]]) -> torch.Tensor:
    """Return a number for each token of the concatenated rows, equal for the tokens of an image and -1 for text."""
    inside = keys < 0
    starts = inside & ~np.concatenate([[False], inside[:-1]])
    if starts.sum() != sum(map(len, owners)):
        raise ValueError(
            "Images follow each other without a token between them, so that their tokens attend to each other. Set "
            "`shared_prefix='off'`."
        )
    return torch.from_numpy(np.where(inside, np.cumsum(starts), -1))


class ImageFeatures:
    """
    Features of the different images of a batch.

    Args:
        output (`Any`):
            Output of `get_image_features`.
    """

    def __init__(self, output: Any) -> None:
        self.pooled = output.pooler_output
        self.deepstack = getattr(output, "deepstack_features", None)

    def select(self, images: list[int]) -> dict[str, Any]:
        """Return the argument `mm_encoder_outputs` for images in a given order."""

        def pick(features: Any) -> Any:
            return features[images] if isinstance(features, torch.Tensor) else [features[i] for i in images]

        selected: Any = BaseModelOutputWithPooling(pooler_output=pick(self.pooled))
        if self.deepstack is not None:
            selected.deepstack_features = [pick(layer) for layer in self.deepstack]
        return {"image": selected}


def encode_images(backbone: Any, tree: PrefixTree) -> ImageFeatures | None:
    """Encode the images of a tree. Return `None` without images."""
    if not tree.images:
        return None
    return ImageFeatures(backbone.get_image_features(**tree.images, return_dict=True))


def with_image_positions(tree: PrefixTree, batch: dict[str, Any], backbone: Any) -> PrefixTree:
    """
    Give the packs of a tree the positions that a model computes from the sizes of images.

    Args:
        tree (`PrefixTree`):
            Tree of a batch.
        batch (`dict`):
            The batch, with padded rows.
        backbone (`PreTrainedModel`):
            Model without its head.

    Returns:
        `PrefixTree`: The tree with positions on three axes if the model is one of `PATCHES` and there are images, the
        same tree otherwise.
    """
    if not tree.images or not hasattr(backbone, "get_rope_index"):
        return tree
    # The model loops over tokens, which would synchronize with a device again and again
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    rows = {name: batch[name].cpu() for name in names}
    positions = backbone.get_rope_index(**rows)[0][:, rows["attention_mask"].bool()].to(tree.sources.device)
    packs = [dataclasses.replace(pack, position_ids=positions[:, None, pack.origins]) for pack in tree.packs]
    return dataclasses.replace(tree, packs=packs)
