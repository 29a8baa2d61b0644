"""Compares vision-language models on a prefix tree with the same models on separate sequences."""

import random

import numpy as np
import pytest
import torch

from stepdpo_trl.shared_prefix.forward import share_prefixes
from stepdpo_trl.shared_prefix.mixin import TREE, SharedPrefixCollator
from stepdpo_trl.shared_prefix.vision import VISION_MODEL_TYPES, ImageLayout, with_image_positions

from .architectures import VOCABULARY
from .test_attention import token_logps
from .test_tree import trie_size
from .vision_architectures import IMAGE, VISION, collate, count_tokens, draw_images, tiny_vision_model

# Images of each pair: the first two pairs have the same prompt, the third differs from them in its image only
PAIRS = {
    "mixed": [[0], [0], [3], [], [0, 1], [0, 3, 1]],
    "one each": [[0], [0], [3]],
    "several": [[0, 1], [0, 2]],
    "repeated": [[1, 1], [1, 1]],
    "none": [[], []],
}
TOWERS = ("visual", "vision_tower", "vision_model")


class Batch:
    """
    Pairs with images and their batch in the format of TRL's collator.

    Args:
        model (`torch.nn.Module`):
            Model for which the batch is created.
        pairs (`list[list[int]]`):
            Images of each pair.
    """

    def __init__(self, model, pairs):
        draw, images = random.Random(0), draw_images(model, 4)
        self.images = [[images[i] for i in own] for own in pairs] * 2
        self.numbers = pairs * 2
        self.rows, self.labels, self.types = [], [], []
        for own in self.images:
            prompt = [5, 6, 7]
            for tokens in count_tokens(model, own):
                prompt += [3, *[IMAGE] * tokens, 4]
            step = [draw.randrange(5, VOCABULARY - 2) for _ in range(draw.randrange(2, 7))]
            self.rows.append([*prompt, 8, 9, *step])
            self.labels.append([0] * (len(prompt) + 2) + [1] * len(step))
        width = max(map(len, self.rows))

        def pad(rows):
            return torch.tensor([row + [0] * (width - len(row)) for row in rows])

        self.padded = {
            "input_ids": pad(self.rows),
            "attention_mask": pad([[1] * len(row) for row in self.rows]),
            "completion_mask": pad(self.labels),
            **collate(model, self.images),
        }
        if "qwen" in model.config.model_type:
            self.padded["mm_token_type_ids"] = (self.padded["input_ids"] == IMAGE).int()

    def tree(self, model, max_tokens=None):
        collator = SharedPrefixCollator(lambda examples: self.padded, max_tokens, ImageLayout.of(model.config))
        return with_image_positions(collator([])[TREE], self.padded, model.base_model)

    def unique_tokens(self, model):
        """Return the number of tokens of a trie whose placeholders are named after their image."""
        split = model.config.model_type == "llava_onevision"  # an image that is alone in its row has other features
        named = []
        for row, numbers in zip(self.rows, self.numbers, strict=True):
            blocks = iter(numbers)
            name, keys = None, []
            for token in row:
                name = next(blocks) if token == 3 else name
                keys.append((name, split and len(numbers) == 1) if token == IMAGE else token)
            named.append(keys)
        return trie_size(named)


def separate(model, batch):
    """Return the log-probabilities of the labeled tokens, computed one row at a time by the model's own forward."""
    logps = []
    for row, mask, images in zip(batch.rows, batch.labels, batch.images, strict=True):
        ids = torch.tensor([row])
        types = {"mm_token_type_ids": (ids == IMAGE).int()} if "qwen" in model.config.model_type else {}
        output = model(input_ids=ids, **collate(model, [images]), **types)
        logps.append(token_logps(output.logits, ids)[0][torch.tensor(mask[1:]).bool()])
    return logps


def shared(model, tree):
    output = model(input_ids=tree.input_ids, attention_mask=tree.uses, prefix_tree=tree)
    logps = token_logps(output.logits, tree.input_ids)
    return [row[mask.bool()] for row, mask in zip(logps, tree.completion_mask[:, 1:], strict=True)]


def gradients(model, logps):
    model.zero_grad()
    weights = np.random.default_rng(0).normal(size=len(logps))
    sum(float(weight) * row.sum() for weight, row in zip(weights, logps, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, batch, max_tokens=None):
    expected = separate(model, batch)
    expected_gradients = gradients(model, expected)
    share_prefixes(model)
    found = shared(model, batch.tree(model, max_tokens))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm().clamp(min=1e-3)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"], ids=["", "checkpointing", "reentrant"])
@pytest.mark.parametrize("max_tokens", [None, 100], ids=["whole", "packs"])
@pytest.mark.parametrize("name", VISION)
def test_equals_separate_sequences(name, max_tokens, checkpointing):
    model = tiny_vision_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    assert_equal(model, Batch(model, PAIRS["mixed"]), max_tokens)


@pytest.mark.parametrize("pairs", ["one each", "several", "repeated", "none"])
@pytest.mark.parametrize("name", VISION)
def test_images_per_pair(name, pairs):
    model = tiny_vision_model(name)
    assert_equal(model, Batch(model, PAIRS[pairs]))


@pytest.mark.parametrize("name", VISION)
def test_images_have_an_effect(name):
    """Without an effect of each image, the comparison with separate sequences would not test them."""
    model = tiny_vision_model(name)
    batch = Batch(model, PAIRS["mixed"])
    expected = separate(model, batch)
    for row, images in enumerate(batch.images):
        for i in range(len(images)):
            changed = Batch(model, PAIRS["mixed"])
            changed.images[row] = list(images)
            changed.images[row][i] = {**images[i], "pixel_values": images[i]["pixel_values"] + 1}
            assert (separate(model, changed)[row] - expected[row]).abs().max() > 1e-3


@pytest.mark.parametrize("max_tokens", [None, 100], ids=["whole", "packs"])
@pytest.mark.parametrize("name", VISION)
def test_each_image_and_each_token_once(name, max_tokens):
    model = tiny_vision_model(name)
    batch = Batch(model, PAIRS["mixed"])
    share_prefixes(model)
    tree = batch.tree(model, max_tokens)
    tower = next(module for part, module in model.base_model.named_children() if part in TOWERS)
    encoded = []

    def count(module, args, kwargs):
        encoded.append(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])

    tower.register_forward_pre_hook(count, with_kwargs=True)
    gradients(model, shared(model, tree))
    (pixels,) = encoded
    images = draw_images(model, 4)
    if name == "llava_onevision":  # the images 0 and 3 are split where they are alone in their row
        assert len(pixels) == 3 + 2 + 3
    else:
        assert pixels.numel() == sum(images[i]["pixel_values"].numel() for i in (0, 1, 3))
    if max_tokens is None:
        assert tree.tokens == batch.unique_tokens(model)
    else:
        assert len(tree.packs) > 1


def test_all_supported_model_types_are_tested():
    assert VISION.keys() == set(VISION_MODEL_TYPES)
