"""Step pairs with images: tokens, loss, lengths, invalid input, and all that the trainer does with them."""

import re
import tempfile
from copy import copy
from functools import cache
from zipfile import ZipFile

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from stepdpo_trl import SDPOCallback, StepDPOConfig, measure_gamma
from stepdpo_trl.step_dpo.dataset import make_step_tokenizer
from stepdpo_trl.step_dpo.images import load_images
from stepdpo_trl.step_dpo.model_card import describe_training
from stepdpo_trl.step_dpo.vision import PROMPT_TEXT, VisionStepCollator, shorter_prefixes

from ..distributed.vision import CELLS, OPTIONS, mixed_rows
from ..distributed.vision import MODES as DISTRIBUTED_MODES
from ..reference_dpo import step_dpo_loss
from ..tiny import plain_rows, step_rows
from ..training import BETA, assert_same_weights, config, logged, make_trainer, weights
from ..vision import PROCESSORS, VISION_MODELS, make_image, vision_plain_rows, vision_step_rows
from .test_distributed import launch_strategy, read_report

PLACEHOLDERS = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "llava": "<image>\n"}
MODELS = pytest.mark.parametrize("name", VISION_MODELS)


@cache
def processor_named(name):
    return PROCESSORS[name]()


def model_named(name, seed=0):
    return VISION_MODELS[name][1](processor_named(name), seed)


def vision_trainer(name="llava", rows=None, output_dir=None, **options):
    """Return a trainer of a tiny model whose reference model differs from it."""
    defaults = {"processing_class": processor_named(name), "max_length": None}
    if not {"peft_config", "ref_model"} & options.keys():
        defaults["ref_model"] = model_named(name, seed=2)
    model = options.pop("model", None)
    rows = vision_step_rows() if rows is None else rows
    options = {**defaults, **options}
    return make_trainer(
        model_named(name, seed=1) if model is None else model, output_dir or tempfile.mkdtemp(), rows, **options
    )


def inference_inputs(name, row):
    """Return what the processor gives for a prompt and its prefix at inference, computed without the package."""
    text = (
        f"<|im_start|>user\n{PLACEHOLDERS[name] * len(row['images'])}{row['prompt']}<|im_end|>\n"
        f"<|im_start|>assistant\n{row['initial_reason_steps']}"
    )
    images = {"images": row["images"]} if row["images"] else {}
    inputs = dict(processor_named(name)(text=[text], return_tensors="pt", **images))
    inputs.pop("attention_mask")
    return inputs.pop("input_ids")[0].tolist(), inputs


def encode(name="llava", row=None, images=True, **options):
    processor = processor_named(name)
    encoder = make_step_tokenizer(
        processor, StepDPOConfig(tempfile.gettempdir(), bf16=False, **{"max_length": None, **options}), images=images
    )
    return encoder(ROW if row is None else row, "row 0")


ROW = {
    "prompt": "How many bars?",
    "images": [make_image(1), make_image(2, 32, 24)],
    "initial_reason_steps": "Step 1: two are blue\nStep 2: one is red\nStep 3:",
    "chosen": " so 3",
    "rejected": " so 4",
}


# -------------------------------------------------------------------------------------------- loss


@cache
def oracle_trainer(name, shared_prefix):
    return vision_trainer(name, shared_prefix=shared_prefix)


words = st.text(st.sampled_from(list("Step 12:=+\n the.é")), max_size=12)
images = st.builds(make_image, st.integers(0, 99), st.sampled_from([8, 16, 40]), st.sampled_from([8, 24]))
pairs = st.fixed_dictionaries(
    {
        "prompt": words.filter(lambda text: text.strip()),
        "images": st.lists(images, max_size=3),
        "initial_reason_steps": words,
        "chosen": words.map(lambda text: text + " yes"),
        "rejected": words.map(lambda text: text + " no"),
    }
)
FEATURES = Features(
    {
        **{name: Value("string") for name in ("prompt", "initial_reason_steps", "chosen", "rejected")},
        "images": List(Image()),
    }
)


def loss_and_gradients(trainer, rows):
    dataset = trainer._prepare_dataset(
        Dataset.from_list(rows, features=FEATURES), trainer.processing_class, trainer.args, "drawn"
    )
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(dataset)))
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


@MODELS
@pytest.mark.parametrize("shared_prefix", ["off", "auto"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(pairs, min_size=1, max_size=3))
def test_loss_and_gradients_equal_equation_2(name, shared_prefix, rows):
    loss, gradients = loss_and_gradients(oracle_trainer(name, shared_prefix), rows)

    policy, reference = model_named(name, seed=1), model_named(name, seed=2)
    tokenizer = processor_named(name).tokenizer
    cases = []
    for row in rows:
        prefix_ids, inputs = inference_inputs(name, row)
        cases.append((prefix_ids, *(tokenizer(row[column])["input_ids"] for column in ("chosen", "rejected")), inputs))
    expected = step_dpo_loss(policy, reference, cases, BETA)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for parameter_name, parameter in policy.named_parameters():
        gradient = gradients[parameter_name]
        assert (gradient is None) == (parameter.grad is None) or not (gradient if parameter.grad is None else 0).any()
        if parameter.grad is not None:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss_type": "ipo"},
        {"use_weighting": True, "ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=str,
)
def test_gradient_comes_only_from_step_tokens(options):
    # Without sharing, there are prefix positions to check. The small beta keeps losses from saturating
    trainer = vision_trainer("qwen2_5_vl", vision_step_rows(3), beta=0.02, shared_prefix="off", **options)
    hidden_states = []
    trainer.model.model.language_model.register_forward_hook(lambda *call: hidden_states.append(call[-1][0]))
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, hidden_states[0])
    predicts_step_token = torch.nn.functional.pad(batch["completion_mask"][:, 1:], (0, 1)).bool()
    assert torch.equal(gradient.abs().sum(-1) > 0, predicts_step_token)


# -------------------------------------------------------------------------------------------- tokens and batches


@MODELS
def test_tokens_equal_those_at_inference(name):
    processor = processor_named(name)
    ids, _ = inference_inputs(name, ROW)
    messages = [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in ROW["images"]), {"type": "text"}]}
    ]
    messages[0]["content"][-1]["text"] = ROW["prompt"]
    chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    prefix_ids = processor.tokenizer(ROW["initial_reason_steps"])["input_ids"]
    assert encode(name)["prompt_ids"] == ids == [*chat["input_ids"][0], *prefix_ids]


@MODELS
def test_batch_has_the_tokens_and_images_of_each_row(name):
    rows = vision_step_rows(5)
    trainer = vision_trainer(name, rows, shared_prefix="off")
    batch = trainer.data_collator(list(trainer.train_dataset))
    tokenizer = processor_named(name).tokenizer
    for number, row in enumerate([*rows, *rows]):
        prefix_ids, _ = inference_inputs(name, row)
        step_ids = tokenizer(row["chosen" if number < 5 else "rejected"])["input_ids"]
        real = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][real].tolist() == prefix_ids + step_ids
        mask = batch["completion_mask"][number]
        assert mask[real].tolist() == [0] * len(prefix_ids) + [1] * len(step_ids)
        assert not mask[~real].any()

    # Everything else is as from TRL's collator for the same images
    keys = batch.keys() - {"input_ids", "attention_mask", "completion_mask", "mm_token_type_ids"}
    placeholder = PLACEHOLDERS[name]
    expected = DataCollatorForVisionPreference(processor_named(name))(
        [
            {"prompt": placeholder * len(row["images"]), "chosen": "a", "rejected": "b", "images": row["images"]}
            for row in rows
        ]
    )
    assert "pixel_values" in keys
    for key in keys:
        assert torch.equal(batch[key], expected[key])


@pytest.mark.parametrize("always_images", [False, True], ids=["mixed", "without images"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_batch_has_the_tokens_of_each_row_with_other_processors(name, always_images):
    processor = processor_named(name)
    rows = vision_step_rows(4)
    if always_images:
        rows = [{**row, "images": []} for row in rows]
    rows = [{**row, **encode(name, row)} for row in rows]
    batch = VisionStepCollator(processor, text_collator=None, always_images=always_images)(rows)
    assert "pixel_values" in batch
    for number, row in enumerate([*rows, *rows]):
        expected = row["prompt_ids"] + row["chosen_ids" if number < 4 else "rejected_ids"]
        ids = batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist()
        unused_image = always_images and number % 4 == 0
        assert ids[: len(expected)] == expected
        assert (len(ids) > len(expected)) == unused_image
        assert batch["completion_mask"][number].sum() == len(expected) - len(row["prompt_ids"])


@MODELS
def test_unused_image_does_not_change_the_loss(name):
    rows = [{**row, "images": []} for row in vision_step_rows(3)]
    trainer = vision_trainer(name, rows, shared_prefix="off")
    results = []
    for always_images in (False, True):
        trainer.data_collator.always_images = always_images
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert ("pixel_values" in batch) == always_images
        assert batch["completion_mask"].sum() == sum(
            len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset
        )
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}))
    (loss, gradients), (unchanged_loss, unchanged) = results
    torch.testing.assert_close(loss, unchanged_loss, rtol=1e-6, atol=1e-6)
    ran = {name for name, gradient in unchanged.items() if gradient is not None}
    assert any("vision" in name or "visual" in name for name in ran)
    for parameter_name in ran:
        expected = gradients[parameter_name]
        expected = torch.zeros_like(unchanged[parameter_name]) if expected is None else expected
        torch.testing.assert_close(unchanged[parameter_name], expected, rtol=1e-5, atol=1e-5)


def test_forms_of_a_prompt():
    text, part = {"type": "text", "text": ROW["prompt"]}, {"type": "image"}
    nulls = [{"type": "image", "text": None}, {"type": "image", "text": None}, {**text, "image": None}]
    forms = [
        [{"role": "user", "content": ROW["prompt"]}],
        [{"role": "user", "content": [part, part, text]}],
        [{"role": "user", "content": nulls}],  # as Arrow stores them
        "<image>\n<image>\n" + ROW["prompt"],
    ]
    for prompt in forms:
        assert encode(row={**ROW, "prompt": prompt}) == encode()
    between = encode(row={**ROW, "prompt": [{"role": "user", "content": [part, text, part]}]})
    assert between[PROMPT_TEXT].startswith("<|im_start|>user\n<image>\nHow many bars?<image>\n<|im_end|>")


def test_options_for_string_prompts_and_end_of_the_solution():
    row = {**ROW, "chosen_ends_solution": True}
    out = encode(row=row, system_prompt="Be brief.", prompt_suffix=" Count.")
    assert out[PROMPT_TEXT].startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nHow many bars? Count.<|im_end|>"
    )
    end = processor_named("llava").tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert out["chosen_ids"] == [*encode()["chosen_ids"], end]
    assert end not in out["rejected_ids"]


def test_prompt_template_with_placeholders():
    out = encode(prompt_template="Q: <image><image>{prompt} A: ")
    assert out[PROMPT_TEXT] == "Q: <image><image>How many bars? A: " + ROW["initial_reason_steps"]


def image_file(folder, image=None, name="image.png"):
    path = str(folder / name)
    (image or make_image(1)).save(path)
    return path


def test_images_as_paths_bytes_and_decoded(tmp_path):
    path = image_file(tmp_path)
    data = (tmp_path / "image.png").read_bytes()
    forms = [
        make_image(1),
        path,
        {"bytes": data, "path": None},
        {"bytes": None, "path": path},
        data,
        tmp_path / "image.png",
        np.array(make_image(1)),
    ]
    first, *others = [encode(row={**ROW, "images": [form]}) for form in forms]
    assert all(other == first for other in others)
    assert encode(row={**ROW, "images": [make_image(2)]})["images_digest"] != first["images_digest"]
    palette = make_image(1).quantize(8)
    other = palette.copy()
    other.putpalette([255 - value for value in palette.getpalette()])
    digests = {encode(row={**ROW, "images": [image]})["images_digest"] for image in (palette, other)}
    assert len(digests) == 2
    single = {name: value for name, value in ROW.items() if name != "images"}
    assert encode(row={**single, "image": path}) == first


@pytest.mark.parametrize("kind", ["transparent", "rotated", "in an archive"])
def test_files_and_opened_images_are_read_alike(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    image, path = PIL.Image.fromarray(pixels), str(tmp_path / "image.png")
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6 if kind == "rotated" else 1
    (image.convert("RGB") if kind == "rotated" else image).save(path, exif=exif)
    forms = [PIL.Image.open(path), path, {"path": path}, (tmp_path / "image.png").read_bytes()]
    if kind == "in an archive":
        with ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.write(path, "image.png")
        place = f"zip://image.png::{tmp_path / 'images.zip'}"
        forms += [place, {"path": place, "bytes": None}]
    loaded = [load_images({"image": form}, "row 0")[0] for form in forms]
    expected = image.convert("RGB").transpose(PIL.Image.Transpose.ROTATE_270) if kind == "rotated" else image
    assert all(np.array_equal(one, expected) for one in loaded)


def test_text_rows_with_a_column_named_like_that_of_the_collator():
    losses = [
        vision_trainer(eval_dataset=Dataset.from_list([{**row, **extra} for row in step_rows(2)])).evaluate()
        for extra in ({}, {"prompt_text": "What?"})
    ]
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]


def test_dataset_of_paths(tmp_path):
    rows = [{**row, "images": [image_file(tmp_path, name=f"{i}.png")]} for i, row in enumerate(vision_step_rows(4))]
    decoded = [{**row, "images": [make_image(1)]} for row in rows]
    losses = []
    for data in (rows, decoded):
        trainer = vision_trainer(rows=data)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


# -------------------------------------------------------------------------------------------- lengths


def length(row, **options):
    out = encode(row=row, **options)
    return len(out["prompt_ids"]) + max(len(out["chosen_ids"]), len(out["rejected_ids"]))


@pytest.mark.parametrize(
    ("prefix", "step", "expected"),
    [
        ("Step 1: a\nStep 2: b\nStep 3:", " c", ["Step 2: b\nStep 3:", "Step 3:"]),
        ("Let's think. Step 1: a\nStep 2:", " b", ["Step 2:"]),
        ("One.\n\nTwo.\n\n", "Three.", ["Two.\n\n", ""]),
        ("Step 3:", " c", []),
        ("", "Step 1: a", []),
        # A step that begins a line: the steps before it are complete
        ("Step 1: a\nStep 2: b", "\nStep 3: c", ["Step 2: b", ""]),
        ("Step 1: a", " \n\nStep 2: b", [""]),
        ("One.\n\nTwo.", "\n\nThree.", ["Two.", ""]),
        ("Step 1: a\nStep 2:", "\nb", ["Step 2:"]),
        # A step that continues a line
        ("Step 1: a\nStep 2: b", " and\nStep 3: c", ["Step 2: b"]),
    ],
)
def test_shorter_prefixes(prefix, step, expected):
    assert shorter_prefixes(prefix, [step, f"{step} or not"]) == expected


def test_shorter_prefixes_of_steps_that_differ_in_their_first_line():
    assert shorter_prefixes("Step 1: a\nStep 2: b", ["\nStep 3: c", " or not"]) == ["Step 2: b"]


def test_truncation_of_complete_steps():
    row = {
        **ROW,
        "initial_reason_steps": "Step 1: two are blue",
        "chosen": "\nStep 2: so 3",
        "rejected": "\nStep 2: so 4",
    }
    bare = {**row, "initial_reason_steps": ""}
    assert {**encode(row=row, max_length=length(bare)), "overlong": 0} == encode(row=bare)
    with pytest.raises(ValueError, match=r"row 0 has more than max_length=\d+ tokens, even without the reasoning"):
        encode(row=row, max_length=length(bare) - 1)


def test_messages_about_overlong_rows_with_images():
    limit = length(ROW) - 1
    tokens = encode()
    prefix, step = len(tokens["prompt_ids"]), max(len(tokens["chosen_ids"]), len(tokens["rejected_ids"]))
    message = (
        f"row 0 has {prefix} prefix tokens (with those of its images) and {step} step tokens, 1 more than "
        f"max_length={limit}. Increase `max_length`, or set `overlong_prefix` to 'truncate' (such rows are shortened "
        "by removing their first reasoning steps, with images and steps kept whole) or 'drop' (they are dropped)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(max_length=limit, overlong_prefix="error")


def test_truncation_removes_the_first_reasoning_steps():
    whole = length(ROW)
    rest = {**ROW, "initial_reason_steps": "Step 2: one is red\nStep 3:"}
    assert encode(max_length=whole) == encode()
    assert {**encode(max_length=whole - 1), "overlong": 0} == encode(row=rest)
    assert encode(max_length=whole - 1)["overlong"] == 1
    last = {**ROW, "initial_reason_steps": "Step 3:"}
    assert {**encode(max_length=length(last)), "overlong": 0} == encode(row=last)
    with pytest.raises(ValueError, match=r"row 0 has more than max_length=\d+ tokens, even without the reasoning"):
        encode(max_length=length(last) - 1)


def test_overlong_rows_are_counted(caplog):
    rows = [{**ROW, "prompt": prompt} for prompt in ("a", "a" * 50, "b" * 50)]
    limit = length(rows[0])
    trainer = vision_trainer(rows=rows, max_length=limit, overlong_prefix="drop")
    assert trainer.train_dataset["prompt"] == ["a"]
    assert f"2 rows of the train dataset are longer than max_length={limit} and have been dropped" in caplog.text
    with pytest.raises(ValueError, match=r"row 1 of the train dataset has .* more than max_length"):
        vision_trainer(rows=rows, max_length=limit, overlong_prefix="error")
    rows[1:] = [{**ROW, "prompt": "a", "initial_reason_steps": "Step 0: x\n" + ROW["initial_reason_steps"]}]
    trainer = vision_trainer(rows=rows, max_length=limit)
    assert trainer.train_dataset["prompt_ids"][0] == trainer.train_dataset["prompt_ids"][1]
    assert "1 rows of the train dataset" in caplog.text
    assert "shortened by removing their first reasoning steps" in caplog.text
    assert trainer.data_collator(list(trainer.train_dataset))["input_ids"].shape[1] <= limit


def test_overlong_rows_of_a_stream():
    rows = [{**ROW, "prompt": prompt} for prompt in ("a", "a" * 50, "b" * 50, "a")]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = vision_trainer(rows=stream, max_length=length(rows[0]), overlong_prefix="drop", max_steps=1)
    assert [row["prompt"] for row in trainer.train_dataset] == ["a", "a"]


# -------------------------------------------------------------------------------------------- training


def run(**options):
    trainer = vision_trainer(**options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"peft_config": True}], ids=["ref_model", "lora"])
def test_precomputed_reference_scores_equal_the_reference_model(options):
    lora = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if options else {}
    evaluation = {"eval_dataset": Dataset.from_list(vision_step_rows(3))}
    trainers = [run(precompute_ref_log_probs=value, **lora, **evaluation) for value in (False, True)]
    assert "ref_chosen_logps" in trainers[1].train_dataset.column_names
    assert logged(trainers[1], "loss") == pytest.approx(logged(trainers[0], "loss"), abs=1e-5)
    assert_same_weights(*map(weights, trainers), rtol=1e-4, atol=1e-6)
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_precomputed_reference_scores_are_cached(tmp_path, monkeypatch):
    Dataset.from_list(vision_step_rows(4)).save_to_disk(tmp_path / "data")
    trainers = []
    for _ in range(2):
        dataset = Dataset.load_from_disk(tmp_path / "data")
        trainers.append(vision_trainer(rows=dataset, precompute_ref_log_probs=True))
        monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", None)  # not called for the second trainer
    first, second = (trainer.train_dataset["ref_chosen_logps"][:] for trainer in trainers)
    assert first == second


def test_gamma_is_measured_with_images():
    rows = vision_step_rows(4)
    dataset = Dataset.from_list(rows)
    gamma = measure_gamma(
        model_named("llava", 1), dataset, config(tempfile.mkdtemp(), max_length=None), processor_named("llava")
    )
    other = [{**row, "images": [make_image(99)] * len(row["images"])} for row in rows]
    changed = measure_gamma(
        model_named("llava", 1), Dataset.from_list(other), config(tempfile.mkdtemp()), processor_named("llava")
    )
    assert [a != b for a, b in zip(gamma, changed, strict=True)] == [bool(row["images"]) for row in rows]


def test_evaluation_on_new_data():
    trainer = run(name="qwen2_5_vl")
    rows = vision_step_rows(4)
    metrics = trainer.evaluate(Dataset.from_list(rows))
    with torch.no_grad():
        trainer.model.eval()
        dataset = trainer._prepare_dataset(
            Dataset.from_list(rows), trainer.processing_class, trainer.args, "new dataset"
        )
        expected = trainer.compute_loss(trainer.model, trainer.data_collator(list(dataset)))
    assert metrics["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    text = trainer.evaluate({"text": Dataset.from_list(step_rows(4)), "plain": Dataset.from_list(plain_rows(4))})
    assert {"eval_text_loss", "eval_plain_loss"} <= text.keys()


def test_images_only_in_evaluation():
    trainer = run(rows=step_rows(4), eval_dataset=Dataset.from_list(vision_step_rows(4)))
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_pairs_of_the_same_prompt_and_image_are_grouped():
    rows = [{**ROW, "prompt": "What?", "images": [make_image(i // 2)]} for i in range(12)]
    trainer = vision_trainer(rows=rows, group_by_prompt=True)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(12))
    groups = [row // 2 for row in order]
    assert groups[::2] == groups[1::2]
    assert groups[::2] != sorted(groups[::2])


def test_rows_without_images_equal_text_data():
    rows = [{**row, "images": []} for row in step_rows(6)]
    text, empty = run(rows=step_rows(6), shared_prefix="off"), run(rows=rows)
    assert logged(text, "loss") == pytest.approx(logged(empty, "loss"), abs=1e-5)


def test_stream_equals_map_style_dataset():
    features = Dataset.from_list(vision_step_rows()).features
    losses = []
    for stream in (False, True):
        dataset = Dataset.from_list(vision_step_rows(), features=features)
        trainer = run(
            rows=dataset.to_iterable_dataset() if stream else dataset,
            max_steps=2,
            per_device_train_batch_size=3,
            train_sampling_strategy="sequential",
        )
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


@MODELS
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resumed_run_equals_uninterrupted_run(name, lora, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    if lora:
        options["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    whole = run(name=name, output_dir=tmp_path, **options)
    resumed = vision_trainer(name, output_dir=tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(weights(whole), weights(resumed), rtol=0, atol=0)


def test_best_model_is_loaded_at_the_end(tmp_path):
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer = run(
        output_dir=tmp_path,
        eval_dataset=Dataset.from_list(vision_step_rows(2)),
        load_best_model_at_end=True,
        learning_rate=10.0,  # the first checkpoint is the best
        per_device_train_batch_size=2,
        **options,
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float32)
    assert_same_weights(weights(trainer), dict(best.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(r".*language_model.*q_proj", {"language_model"}), (r".*q_proj", {"language_model", "vision_tower"})],
    ids=["language model", "vision tower too"],
)
def test_lora_trains_what_target_modules_says(targets, expected):
    trainer = run(peft_config=LoraConfig(r=2, target_modules=targets), rows=vision_step_rows(4))
    moved = {name for name, weight in weights(trainer).items() if "lora_B" in name and weight.any()}
    assert moved
    assert {part for name in moved for part in ("language_model", "vision_tower") if part in name} == expected


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(lora):
    trainers = [
        run(
            name="qwen2_5_vl",
            gradient_checkpointing=value,
            **({"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}),
        )
        for value in (False, True)
    ]
    assert_same_weights(*map(weights, trainers), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["model", "adapter", "scores"])
def test_sdpo_stages_with_images(kind):
    options = {
        "model": {"ref_model": model_named("llava", 1)},
        "adapter": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
        "scores": {"precompute_ref_log_probs": True, "ref_model": None},
    }[kind]
    stages = [Dataset.from_list(rows) for rows in (vision_step_rows(4), vision_step_rows(8)[4:])]
    trainer = run(rows=stages, callbacks=[SDPOCallback()], **options)
    first = [entry["sdpo/first_batch_loss"] for entry in trainer.state.log_history if "sdpo/first_batch_loss" in entry]
    # Each stage starts from its own reference
    assert first == pytest.approx([np.log(2)] * 2, abs=1e-4)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # deprecated upstream
@pytest.mark.parametrize("rows", [vision_step_rows(3), step_rows(3)], ids=["images", "text"])
def test_predict_on_raw_rows(rows):
    trainer = vision_trainer(rows=rows)
    raw = trainer.predict(Dataset.from_list(rows))
    prepared = DPOTrainer.predict(trainer, trainer.train_dataset)
    assert raw.predictions.shape[1] == trainer.data_collator(list(trainer.train_dataset))["input_ids"].shape[1]
    np.testing.assert_array_equal(raw.predictions, prepared.predictions)
    assert raw.metrics["test_loss"] == prepared.metrics["test_loss"]


def test_predict_without_reference_scores():
    trainer = vision_trainer(precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="`predict` does not compute reference scores"):
        trainer.predict(Dataset.from_list(vision_step_rows(2)))


def test_model_card(tmp_path, monkeypatch, capsys):
    trainer = vision_trainer(output_dir=tmp_path)
    trainer.create_model_card()
    assert f'model="{tmp_path.name}"' in (tmp_path / "README.md").read_text()  # without a name on the Hub
    trainer.hub_model_id = str(tmp_path)
    trainer.save_model()
    trainer.create_model_card(model_name="reader", tags=["charts"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"charts", "step-dpo"} <= set(card.data.tags)
    shared = "used" if trainer.shares_prefixes else "did not use"
    sentence = f"updated all weights of the language model and the vision tower and {shared} shared prefixes."
    (line,) = re.findall(r"^This model was trained with Step-DPO.*$", card.text, re.MULTILINE)
    assert line.endswith(f" The training on step pairs with images {sentence}")
    assert "text-generation" not in card.text
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    image_file(tmp_path, name="chart.png")
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace("max_new_tokens=128", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"peft_config": r".*language_model.*q_proj"},
            "adapters of the language model (the vision tower was frozen) and did not use shared prefixes.",
        ),
        (
            {"peft_config": r".*q_proj"},
            "adapters of the language model and the vision tower and did not use shared prefixes.",
        ),
        (
            {"freeze": "language_model"},
            "weights of the vision tower (the language model was frozen) and did not use shared prefixes.",
        ),
    ],
    ids=["lora", "lora with tower", "tower"],
)
def test_model_card_says_what_was_trained(options, sentence):
    options = dict(options)
    if "peft_config" in options:
        options["peft_config"] = LoraConfig(r=2, target_modules=options["peft_config"])
    model = model_named("llava", 1)
    if options.pop("freeze", None):
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    trainer = vision_trainer(model=model, shared_prefix="off", **options)
    assert describe_training(trainer).endswith(f" updated {sentence}")


def test_model_and_processor_loaded_by_name(tmp_path):
    model_named("llava", 1).save_pretrained(tmp_path / "model")
    processor_named("llava").save_pretrained(tmp_path / "model")
    trainer = make_trainer(str(tmp_path / "model"), tmp_path / "out", vision_step_rows(4))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(np.log(2), abs=1e-5)


@MODELS
@pytest.mark.parametrize("config_cls", [DPOConfig, StepDPOConfig])
def test_plain_vision_pairs_are_trained_as_by_dpo_trainer(name, config_cls):
    options = {} if config_cls is DPOConfig else {"shared_prefix": "off"}
    ours = vision_trainer(name, vision_plain_rows(6), config_cls=config_cls, **options)
    stock = vision_trainer(name, vision_plain_rows(6), cls=DPOTrainer, config_cls=DPOConfig)
    for trainer in (ours, stock):
        trainer.train()
    assert type(ours.data_collator) is DataCollatorForVisionPreference
    assert logged(ours, "loss") == logged(stock, "loss")
    assert_same_weights(weights(ours), weights(stock), rtol=0, atol=0)
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` is not supported for vision datasets"):
        vision_trainer(name, vision_plain_rows(2), config_cls=config_cls, precompute_ref_log_probs=True)


# -------------------------------------------------------------------------------------------- several processes


def trained_model(model, folder, lora):
    """Load the weights written by `save_model` as a user would."""
    base = AutoModelForImageTextToText.from_pretrained(model if lora else folder, dtype=torch.float32)
    return dict((PeftModel.from_pretrained(base, folder) if lora else base).named_parameters())


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    """Folders of models and of pairs, and a function that trains on one process and returns trainer and folder."""
    models, pairs = tmp_path_factory.mktemp("models"), str(tmp_path_factory.mktemp("pairs"))
    Dataset.from_list(mixed_rows()).save_to_disk(pairs)
    for name in VISION_MODELS:
        model_named(name, 1).save_pretrained(models / name)

    @cache
    def train(name, mode):
        folder = str(tmp_path_factory.mktemp(f"{name}-{mode}"))
        options = {option: copy(value) for option, value in DISTRIBUTED_MODES[mode].items() if option == "peft_config"}
        options |= {"processing_class": processor_named(name), "shared_prefix": "off"}
        trainer = make_trainer(str(models / name), folder, mixed_rows(), **OPTIONS, **options)
        trainer.train()
        trainer.save_model()
        return trainer, folder

    return models, pairs, train


LLAVA = ["llava-shared", "llava-padded", "llava-lora"]
QWEN = ["qwen2_5_vl-shared", "qwen2_5_vl-padded", "qwen2_5_vl-lora"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "cells"),
    [
        ("ddp", LLAVA[:1]),
        ("zero3", LLAVA),
        ("fsdp2", LLAVA[:1]),
        pytest.param("ddp", [*LLAVA[1:], *QWEN], marks=pytest.mark.long),
        pytest.param("zero2", LLAVA, marks=pytest.mark.long),
        pytest.param("zero3", QWEN, marks=pytest.mark.long),
        pytest.param("fsdp2", LLAVA[1:], marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_two_processes_equal_one(strategy, cells, single_process, tmp_path):
    models, pairs, train = single_process
    # CLIP's default list contains a class that only its text model has
    layers = ("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer,CLIPEncoderLayer")
    options = layers if strategy == "fsdp2" else ()
    launch_strategy("vision.py", strategy, models, pairs, tmp_path, *cells, options=options)
    for cell in cells:
        name, mode = CELLS[cell]
        trainer, folder = train(name, mode)
        report = read_report(tmp_path / cell, strategy)
        assert report["loss"] == pytest.approx(logged(trainer, "loss"), abs=1e-5), cell
        one, two = (trained_model(models / name, path, mode == "lora") for path in (folder, str(tmp_path / cell)))
        assert_same_weights(one, two, rtol=1e-4, atol=1e-6)
