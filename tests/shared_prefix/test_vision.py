"""Compares vision-language models on a prefix tree with the same models on separate sequences."""

import copy
import importlib
import inspect
import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen2_5_VLModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from stepdpo_trl.shared_prefix import support
from stepdpo_trl.shared_prefix.forward import share_prefixes
from stepdpo_trl.shared_prefix.mixin import TREE, SharedPrefixCollator
from stepdpo_trl.shared_prefix.repeated_images import (
    HalfOfImages,
    encode_images_once,
    image_arguments,
    images_are_repeated,
)
from stepdpo_trl.shared_prefix.vision import (
    ANYRES,
    ENCODED_ONCE,
    TILES,
    VISION_MODEL_TYPES,
    ImageLayout,
    with_image_positions,
)

from ..tiny import plain_rows
from ..training import assert_same_weights, logged, make_trainer, weights
from ..vision import VISION_MODELS, vision_step_rows
from .architectures import VOCABULARY
from .test_attention import token_logps
from .test_mixin import METRICS
from .test_tree import trie_size
from .vision_architectures import (
    PLACEHOLDER,
    VISION,
    collate,
    count_tokens,
    draw_images,
    qwen_model,
    qwen_processor,
    tiny_vision_model,
    vision_rows,
)

# Images of each pair: the first two pairs have the same prompt, the third differs from them in its image only
PAIRS = {
    "mixed": [[0], [0], [3], [], [0, 1], [0, 3, 1]],
    "one each": [[0], [0], [3]],
    "several": [[0, 1], [0, 2]],
    "repeated": [[1, 1], [1, 1]],
    "none": [[], []],
}
TOWERS = ("visual", "vision_tower", "vision_model")


# Transformers 5.3 does not have the argument yet
if "mm_encoder_outputs" not in inspect.signature(Qwen2_5_VLModel.forward).parameters:
    pytest.skip("this version of Transformers does not accept encoded images", allow_module_level=True)


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
                prompt += [3, *[PLACEHOLDER] * tokens, 4]
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
        self.padded |= token_types(model, self.padded["input_ids"])

    def tree(self, model, packs=False):
        max_tokens = max(map(len, self.rows)) + 8 if packs else None
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
                keys.append((name, split and len(numbers) == 1) if token == PLACEHOLDER else token)
            named.append(keys)
        return trie_size(named)


def token_types(model, input_ids):
    """Return the types of tokens that the processor of a model returns."""
    if hasattr(model.base_model, "get_rope_index"):
        return {"mm_token_type_ids": (input_ids == PLACEHOLDER).int()}
    return {"token_type_ids": (input_ids == PLACEHOLDER).int()} if model.config.model_type == "gemma3" else {}


def separate(model, batch):
    """Return the log-probabilities of the labeled tokens, computed one row at a time by the model's own forward."""
    logps = []
    for row, mask, images in zip(batch.rows, batch.labels, batch.images, strict=True):
        ids = torch.tensor([row])
        output = model(input_ids=ids, **collate(model, [images]), **token_types(model, ids))
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


def assert_equal(model, batch, packs=False):
    expected = separate(model, batch)
    expected_gradients = gradients(model, expected)
    share_prefixes(model)
    found = shared(model, batch.tree(model, packs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, found), expected_gradients)


def assert_same_gradients(found_gradients, expected_gradients):
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        scale = expected_gradients[name].norm()
        if "vision" in name and name.endswith("k_proj.bias"):
            # Softmax without positions in the keys ignores their bias, so the gradient is a rounding error
            scale = expected_gradients[name.replace("k_proj", "q_proj")].norm()
        error = (gradient - expected_gradients[name]).norm() / scale.clamp(min=1e-3)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"], ids=["", "checkpointing", "reentrant"])
@pytest.mark.parametrize("packs", [False, True], ids=["whole", "packs"])
@pytest.mark.parametrize("name", VISION)
def test_equals_separate_sequences(name, packs, checkpointing):
    model = tiny_vision_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    assert_equal(model, Batch(model, PAIRS["mixed"]), packs)


@pytest.mark.parametrize("pairs", ["one each", "several", "repeated", "none"])
@pytest.mark.parametrize("name", VISION)
def test_images_per_pair(name, pairs):
    model = tiny_vision_model(name)
    assert_equal(model, Batch(model, PAIRS[pairs]))


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["qwen2_5_vl", "llava_onevision", "smolvlm", "internvl"]),
)
def test_any_images(pairs, packs, name):
    model = tiny_vision_model(name)
    batch = Batch(model, pairs)
    share_prefixes(model)
    tree = batch.tree(model, packs)
    if not packs:
        assert tree.tokens == batch.unique_tokens(model)
    with torch.no_grad():
        for one, other in zip(shared(model, tree), separate(model, batch), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VISION)
def test_images_have_an_effect(name):
    """Without an effect of each image, the comparison with separate sequences would not test them."""
    model = tiny_vision_model(name)
    batch = Batch(model, [[0, 1]])
    expected, (images, _) = separate(model, batch), batch.images
    for i, image in enumerate(images):
        batch.images[0] = [*images[:i], {**image, "pixel_values": image["pixel_values"] + 1}, *images[i + 1 :]]
        changed, unchanged = (one - other for one, other in zip(separate(model, batch), expected, strict=True))
        assert changed.abs().max() > 1e-3
        assert not unchanged.any()


@pytest.mark.parametrize("packs", [False, True], ids=["whole", "packs"])
@pytest.mark.parametrize("name", VISION)
def test_each_image_and_each_token_once(name, packs):
    model = tiny_vision_model(name)
    batch = Batch(model, PAIRS["mixed"])
    share_prefixes(model)
    tree = batch.tree(model, packs)
    encoded = count_pixels(model)
    gradients(model, shared(model, tree))
    (pixels,) = encoded
    images = [image["pixel_values"] for image in draw_images(model, 4)]
    if name == "llava_onevision":  # the images 0 and 3 are split where they are alone in their row
        assert pixels == (3 + 3 + 3) * images[0].shape[-3:].numel()
    else:
        assert pixels == sum(images[i].numel() for i in (0, 1, 3))
    assert len(tree.packs) > 1 if packs else tree.tokens == batch.unique_tokens(model)


def count_pixels(model):
    """Return a list of the numbers of pixel values that the vision tower encodes in each run from now on."""
    encoded = []

    def count(module, args, kwargs):
        pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        encoded.append(pixels.numel())

    tower = next(module for part, module in model.base_model.named_children() if part in TOWERS)
    tower.register_forward_pre_hook(count, with_kwargs=True)
    return encoded


def test_tokens_of_an_image_attend_to_later_ones():
    """Without an effect, the comparison with separate sequences would not test the blocks of Gemma 3."""
    model = tiny_vision_model("gemma3")
    batch = Batch(model, [[0]])
    expected = separate(model, batch)
    ids = torch.tensor([batch.rows[0]])
    causal = token_logps(model(input_ids=ids, **collate(model, batch.images[:1])).logits, ids)[0]
    assert (causal[-len(expected[0]) :] - expected[0]).abs().max() > 1e-3


def test_images_without_a_token_between_them():
    """The tokens of two such images attend to each other in Gemma 3, so their features cannot be shared."""
    model = tiny_vision_model("gemma3")
    batch = Batch(model, [[0, 1]])
    keep = [token not in (3, 4) for token in batch.rows[0]]
    rows, labels = [
        [np.array([value for value, kept in zip(one, keep, strict=False) if kept]) for one in both]
        for both in (batch.rows[:1], batch.labels[:1])
    ]
    padded = {**collate(model, batch.images[:1]), "token_type_ids": None}
    with pytest.raises(ValueError, match="Images follow each other without a token between them"):
        ImageLayout.of(model.config).build_tree(padded, rows, labels)


def test_rows_without_images_are_not_listed():
    model = tiny_vision_model("llava_onevision")
    batch = Batch(model, PAIRS["mixed"])
    tokens = batch.tree(model).tokens
    numbers = batch.padded["batch_num_images"]
    batch.padded["batch_num_images"] = numbers[numbers > 0]
    assert batch.tree(model).tokens == tokens


def test_dummy_packs():
    """Processes that shard a model run the same number of packs. The additional ones have no images."""
    model = tiny_vision_model("qwen3_vl")
    batch = Batch(model, PAIRS["mixed"])
    share_prefixes(model)
    tree = batch.tree(model)
    for one, other in zip(shared(model, tree.padded(3)), shared(model, tree), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_load_balance_of_experts():
    model = tiny_vision_model("qwen3_vl_moe")
    batch = Batch(model, PAIRS["mixed"])
    inputs = {name: value for name, value in batch.padded.items() if name != "completion_mask"}
    expected = model(**inputs, output_router_logits=True).aux_loss
    share_prefixes(model)
    tree = batch.tree(model)
    output = model(input_ids=tree.input_ids, attention_mask=tree.uses, prefix_tree=tree, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_attention_functions(name, attention):
    model = tiny_vision_model(name)
    model.set_attn_implementation(attention)
    assert_equal(model, Batch(model, PAIRS["mixed"]))


@pytest.mark.parametrize("name", ENCODED_ONCE)
def test_padded_rows_with_each_image_once(name):
    model = tiny_vision_model(name)
    batch = Batch(model, PAIRS["mixed"])
    inputs = {name: value for name, value in batch.padded.items() if name != "completion_mask"}

    def logps(**options):
        return [
            row[mask.bool()]
            for row, mask in zip(
                token_logps(model(**inputs, **options).logits, inputs["input_ids"]),
                batch.padded["completion_mask"][:, 1:],
                strict=True,
            )
        ]

    encoded = count_pixels(model)
    expected = logps()
    expected_gradients = gradients(model, expected)
    assert images_are_repeated(inputs, image_arguments(model))
    encode_images_once(model)
    encode_images_once(model)
    found = logps(repeated_images=True)
    pixels = [image["pixel_values"].numel() for image in draw_images(model, 4)]
    of_all_rows = 2 * sum(pixels[i] for own in PAIRS["mixed"] for i in own)
    if name in TILES + ANYRES:
        assert encoded[1] == encoded[0] / 2
    else:
        assert encoded == [of_all_rows, sum(pixels[i] for i in (0, 1, 3))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, found), expected_gradients)
    assert not images_are_repeated(
        {**inputs, "pixel_values": inputs["pixel_values"].cumsum(0)}, image_arguments(model)
    )


def test_all_supported_model_types_are_tested():
    assert VISION.keys() == set(VISION_MODEL_TYPES)


# ------------------------------------------------------------------------------------------------ training

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights="gaussian")


def ref_adapter(model):
    """Return a PEFT model, whose initial adapter DPOTrainer copies as the reference."""
    torch.manual_seed(0)
    return get_peft_model(model, LORA)


def single_images():
    return [{**row, "image": row["images"][0]} for row in vision_rows() if len(row["images"]) == 1]


MODES = {
    "full": {},
    "lora": {"peft_config": LORA},
    "ref adapter": {"model": ref_adapter},
    "checkpointing": {"gradient_checkpointing": True},
    "lora checkpointing": {"peft_config": LORA, "gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "packs": {"max_tokens_per_forward": 100, "max_length": 100},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "workers": {"dataloader_num_workers": 1},
    "no images": {"rows": [{**row, "images": []} for row in vision_rows()]},
    "single images": {"rows": [{k: v for k, v in row.items() if k != "images"} for row in single_images()]},
    "text data": {"rows": plain_rows()},
}


def vision_trainer(tmp_path, rows=None, model=lambda model: model, **options):
    processor = qwen_processor()
    if "peft_config" not in options and model is not ref_adapter:
        options = {"ref_model": qwen_model(processor, 1), **options}
    rows = Dataset.from_list(vision_rows() if rows is None else rows)
    options = {"max_length": None, "max_steps": 2, "processing_class": processor, **options}
    return make_trainer(model(qwen_model(processor)), tmp_path, rows, **options)


@pytest.mark.parametrize("mode", MODES)
def test_training_equals_padded_sequences(mode, tmp_path):
    shared_trainer = vision_trainer(tmp_path, **{**MODES[mode], "shared_prefix": "on"})
    padded_trainer = vision_trainer(
        tmp_path, **{**MODES[mode], "shared_prefix": "off", "max_tokens_per_forward": None}
    )
    for trainer in (shared_trainer, padded_trainer):
        trainer.train()
    for name in METRICS:
        assert logged(shared_trainer, name) == pytest.approx(logged(padded_trainer, name), rel=1e-4, abs=1e-5), name
    assert_same_weights(weights(shared_trainer), weights(padded_trainer), rtol=1e-4, atol=2e-6)


STEP_MODES = {
    "full": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "packs": {"max_tokens_per_forward": 300, "max_length": 300, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("mode", STEP_MODES)
@pytest.mark.parametrize("name", VISION_MODELS)
def test_step_pairs_equal_padded_sequences(name, mode, tmp_path):
    make_processor, make_model = VISION_MODELS[name]
    processor, trainers, encoded = make_processor(), [], []
    for choice in ("on", "off"):
        options = {**STEP_MODES[mode], **({} if choice == "on" else {"max_tokens_per_forward": None})}
        options |= {"processing_class": processor, "ref_model": make_model(processor, 1), "max_steps": 2}
        rows = Dataset.from_list(vision_step_rows())
        trainer = make_trainer(make_model(processor), tmp_path, rows, shared_prefix=choice, **options)
        tower = next(module for part, module in trainer.model.base_model.named_children() if part in TOWERS)
        encoded.append([])
        tower.register_forward_pre_hook(
            lambda module, args, kwargs, own=encoded[-1]: own.append(len(args[0] if args else kwargs["pixel_values"])),
            with_kwargs=True,
        )
        trainer.train()
        trainers.append(trainer)
    assert trainers[0].shares_prefixes
    assert [2 * number for number in encoded[0]] == encoded[1]
    for metric in METRICS:
        assert logged(trainers[0], metric) == pytest.approx(logged(trainers[1], metric), rel=1e-4, abs=1e-5), metric
    assert_same_weights(*map(weights, trainers), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", VISION_MODELS)
def test_unused_image(name, tmp_path):
    """On several processes, a batch without images gets one after the steps, so that each process runs the tower."""
    make_processor, make_model = VISION_MODELS[name]
    processor, losses, gradients = make_processor(), [], []
    without = [i for i, row in enumerate(vision_step_rows()) if not row["images"]]
    for choice in ("on", "off"):
        options = {"processing_class": processor, "ref_model": make_model(processor, 1), "shared_prefix": choice}
        trainer = make_trainer(make_model(processor), tmp_path, Dataset.from_list(vision_step_rows()), **options)
        collator = trainer.data_collator.collator if choice == "on" else trainer.data_collator
        collator.always_images = True
        batch = trainer.data_collator(list(trainer.train_dataset.select(without)))
        assert "pixel_values" in batch
        losses.append(trainer.compute_loss(trainer.model, batch))
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert {name for name, grad in gradients[0].items() if grad is None} == {
        name for name, grad in gradients[1].items() if grad is None
    }


def test_each_image_is_processed_once(tmp_path, monkeypatch):
    """The batch is that of TRL's collator, which passes each image to the processor twice."""
    trainer = vision_trainer(tmp_path, shared_prefix="on")
    collator, processed = trainer.data_collator, []
    processor = collator.collator.processor.image_processor
    original = type(processor).__call__
    monkeypatch.setattr(
        type(processor),
        "__call__",
        lambda self, images, **options: processed.append(sum(map(len, images))) or original(self, images, **options),
    )
    ours, expected = collator(vision_rows()), collator.collator(vision_rows())
    assert processed == [6, 12]
    assert collator.collator.processor.image_processor is processor
    assert ours.keys() - {TREE} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


IMAGE_PROCESSORS = {
    "qwen2_vl": "Qwen2VL",
    "clip": "CLIP",
    "llava_onevision": "LlavaOnevision",
    "idefics3": "Idefics3",
    "got_ocr2": "GotOcr2",  # of InternVL
    "gemma3": "Gemma3",
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_repeated_images_of_image_processors(name):
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    processor = getattr(module, f"{IMAGE_PROCESSORS[name]}ImageProcessorPil")()
    if name == "idefics3":
        processor.size = {"longest_edge": 728}  # 4 tiles, and not 16
    first, second, third = (row["images"][0] for row in single_images()[:3])
    for images in ([[first, second], [third]] * 2, [[first], [second]] * 2):
        expected = processor([list(own) for own in images], return_tensors="pt")
        found = HalfOfImages(processor)([list(own) for own in images], return_tensors="pt")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # deprecated upstream
def test_evaluate_and_predict(tmp_path):
    results = []
    for choice in ("on", "off"):
        trainer = vision_trainer(tmp_path, shared_prefix=choice, eval_dataset=Dataset.from_list(vision_rows(5)))
        results.append((trainer.evaluate(), trainer.predict(Dataset.from_list(vision_rows(3))).predictions))
    (metrics, predictions), (expected, expected_predictions) = results
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    torch.testing.assert_close(torch.tensor(predictions), torch.tensor(expected_predictions), rtol=0, atol=0)


def test_plain_pairs_with_a_dpo_config_equal_dpo_trainer_bit_for_bit(tmp_path):
    ours = vision_trainer(tmp_path, config_cls=DPOConfig)
    stock = vision_trainer(tmp_path, cls=DPOTrainer, config_cls=DPOConfig)
    assert not ours.shares_prefixes
    assert type(ours.data_collator) is DataCollatorForVisionPreference
    for trainer in (ours, stock):
        trainer.train()
    assert_same_weights(weights(ours), weights(stock), rtol=0, atol=0)
    assert logged(ours, "loss") == logged(stock, "loss")


def test_truncated_images(tmp_path):
    trainer = vision_trainer(tmp_path, shared_prefix="on", max_length=8)
    with pytest.raises(ValueError, match="Images must not be truncated: increase `max_length`"):
        trainer.train()


def test_padded_rows_encode_each_image_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(support, "VISION_MODEL_TYPES", ())
    with caplog.at_level(logging.WARNING):
        trainer = vision_trainer(tmp_path, model=copy.deepcopy)
    assert "Each image is still encoded only once." in caplog.text
    padded = vision_trainer(tmp_path, shared_prefix="off")
    encoded = {}
    for one in (trainer, padded):
        encoded[one] = []
        one.model.model.visual.register_forward_pre_hook(
            lambda module, args, kwargs, own=encoded[one]: own.append(len(kwargs["grid_thw"])), with_kwargs=True
        )
        one.train()
    assert [2 * number for number in encoded[trainer]] == encoded[padded]
    assert logged(trainer, "loss") == pytest.approx(logged(padded, "loss"), rel=1e-4)
    assert_same_weights(weights(trainer), weights(padded), rtol=1e-4, atol=2e-6)


def test_untested_architectures(tmp_path, caplog):
    processor = qwen_processor()
    model = qwen_model(processor)
    model.config.model_type = "other_vl"
    options = {"processing_class": processor, "ref_model": copy.deepcopy(model), "max_length": None, "max_steps": 1}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model, tmp_path, Dataset.from_list(vision_rows()), **options)
    (message,) = [record.message for record in caplog.records if "Prefixes are not shared" in record.message]
    assert "because it has not been tested for 'other_vl', only for gemma3, " in message
    trainer.train()
    with pytest.raises(ValueError, match="`shared_prefix='on'` is not possible because it has not been tested"):
        make_trainer(model, tmp_path, Dataset.from_list(vision_rows()), shared_prefix="on", **options)
