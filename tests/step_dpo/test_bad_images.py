"""Step pairs with images that cannot be used for training: each raises an error that names the row."""

import re
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from stepdpo_trl.sdpo.stages import join_stages
from stepdpo_trl.step_dpo import images as step_images
from stepdpo_trl.step_dpo.images import image_placeholder, media_tokens

from ..tiny import CHATML, byte_level_tokenizer, step_rows, tiny_model
from ..vision import PROCESSORS, VISION_MODELS, make_image, vision_plain_rows, vision_step_rows, vision_tokenizer
from .test_vision import FEATURES, ROW, encode, image_file, model_named, processor_named, vision_trainer


def rows_with(index, **change):
    rows = vision_step_rows(4)
    rows[index] = {**rows[index], **change}
    return rows


def with_image_column(index, value):
    rows = [{**row, "image": make_image(i)} for i, row in enumerate(vision_step_rows(4))]
    for row in rows:
        del row["images"]
    rows[index]["image"] = value
    return rows


BAD_ROWS = {
    "None instead of an image": (with_image_column(2, None), r"`image` of row 2 of the train dataset is None"),
    "None instead of a list": (rows_with(2, images=None), r"`images` of row 2 of the train dataset is None"),
    "None in a list": (
        [{**row, "images": ["0.png", None]} for row in vision_step_rows(2)],
        r"`images` of row 0 of the train dataset is \['0.png', None\]\. Remove the null values",
    ),
    "more placeholders than images": (
        rows_with(1, prompt="<image><image><image>?"),
        r"row 1 of the train dataset has 3 image placeholders \('<image>'\) in its prompt but 2 images",
    ),
    "fewer placeholders than images": (
        rows_with(1, prompt="<image>?"),
        r"row 1 of the train dataset has 1 image placeholder \('<image>'\) in its prompt but 2 images\. Write '<im",
    ),
    "placeholder without image": (
        rows_with(2, prompt="<image>?"),
        r"row 2 of the train dataset has 1 image placeholder \('<image>'\) in its prompt but no images",
    ),
    "placeholder in the initial reasoning steps": (
        rows_with(0, prompt="What?", initial_reason_steps="Step 1: <image>\nStep 2: b\nStep 3:"),
        r"The initial reasoning steps of row 0 of the train dataset contain the image placeholder '<image>'",
    ),
    "placeholder in a step": (
        rows_with(3, chosen=" <image>"),
        r"`chosen` of row 3 of the train dataset contains '<image>', which stands for image data",
    ),
    "both columns": (
        [{**row, "image": make_image()} for row in vision_step_rows(2)],
        r"row 0 of the train dataset has both columns `image` and `images`",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows(rows, message, stream):
    dataset = Dataset.from_list(rows)
    if stream:
        dataset = dataset.to_iterable_dataset()
        number = message.partition("row ")[2][:1]
        prompt = rows[int(number)]["prompt"].replace("?", r"\?")
        message = message.replace(f"row {number} of the train dataset", "the row of the train dataset")
        named = rf"the row of the train dataset with the prompt '{prompt}' \(drawn as number {int(number) + 1}\)"
        message = message.replace("the row of the train dataset", named)
    with pytest.raises(ValueError, match=message):
        vision_trainer(rows=dataset, max_steps=4).train()


def messages_with(*types):
    parts = [{"type": kind, "text": "How many?" if kind == "text" else None} for kind in types]
    return [{"role": "user", "content": parts}]


def test_messages_with_other_placeholders_than_images():
    rows = [{**ROW, "prompt": messages_with("image", "image", "text")}] * 2
    rows[1] = {**ROW, "prompt": messages_with("image", "text")}
    message = r"The images of row 1 of the train dataset .* Number of images provided \(2\) does not match"
    with pytest.raises(ValueError, match=message):
        vision_trainer(rows=rows)


@pytest.mark.parametrize("name", PROCESSORS)
def test_placeholder_in_rows_without_image_column(name):
    processor = processor_named(name)
    placeholder = getattr(processor, "boi_token", processor.image_token)
    options = {"processing_class": processor, "model": model_named("llava"), "ref_model": model_named("llava")}
    rows = step_rows(4)
    rows[2]["prompt"] += placeholder
    message = f"row 2 of the train dataset has no images, but its prompt contains the image placeholder '{placeholder}"
    with pytest.raises(ValueError, match=re.escape(message)):
        vision_trainer(rows=rows, **options)
    rows = step_rows(4)
    rows[1]["rejected"] += placeholder
    with pytest.raises(
        ValueError, match=f"`rejected` of row 1 of the train dataset contains {re.escape(repr(placeholder))}, "
    ):
        vision_trainer(rows=rows, **options)
    rows = [{**row, "prompt": messages_with("image", "text")} for row in step_rows(2)]
    with pytest.raises(ValueError, match=r"cannot render row 0 .* Number of images provided \(0\) does not match"):
        vision_trainer(rows=rows, **options)


@pytest.mark.parametrize("column", ["prompt", "initial_reason_steps", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("name", "token", "kind"),
    [("gemma3", "<image_soft_token>", "image"), ("qwen2_5_vl", "<|video_pad|>", "video")],
)
@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text"])
def test_tokens_of_images_and_videos(name, token, kind, column, with_images):
    where = "The prefix of row 0" if column in ("prompt", "initial_reason_steps") else f"`{column}` of row 0"
    message = f"{where} contains {token!r}, which stands for {kind} data in the inputs of the model. Remove it"
    row = {**ROW, column: f"{ROW[column]} {token} a"}
    if not with_images:
        del row["images"]
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(name, row, images=with_images)
    encode(name, {**row, column: ROW[column]}, images=with_images)


def test_text_of_placeholders():
    """Gemma 3 replaces the token that begins an image, and all others the token of an image."""
    names = {name: image_placeholder(processor_named(name)) for name in PROCESSORS}
    assert names.pop("gemma3") == "<start_of_image>"
    assert names.pop("qwen2_5_vl") == "<|image_pad|>"
    assert set(names.values()) == {"<image>"}
    # As in Gemma 3n and 4 and in Cohere 2 Vision
    assert image_placeholder(SimpleNamespace(image_token="<image>", boi_token="<begin>")) == "<image>"


def test_beginning_of_text_is_not_rejected():
    tokenizer = vision_tokenizer("<image>")
    tokenizer.bos_token = "<image>"
    assert media_tokens(SimpleNamespace(tokenizer=tokenizer, image_token="<image>", audio_token="<absent>")) == {}


def test_bare_placeholder_of_qwen(caplog, monkeypatch):
    monkeypatch.setattr(step_images, "_warned", set())
    framed, bare = "<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"
    row = {**ROW, "images": ROW["images"][:1]}
    inference = encode("qwen2_5_vl", {**row, "prompt": framed + ROW["prompt"]})
    assert inference == encode("qwen2_5_vl", row)
    assert not caplog.records
    for _ in range(2):
        encode("qwen2_5_vl", {**row, "prompt": bare + ROW["prompt"]})
    (record,) = caplog.records
    assert f"row 0 has a bare {bare!r} in its prompt, unlike prompts at inference, which have {framed!r}. Write" in (
        record.message
    )
    with pytest.raises(ValueError, match=re.escape(f"in its prompt but 2 images. Write {framed!r} for each image")):
        encode("qwen2_5_vl", {**ROW, "prompt": bare})
    processor = VISION_MODELS["qwen2_5_vl"][0]()
    processor.chat_template = None
    with pytest.raises(ValueError, match=re.escape(f"or write {framed!r} into the prompt for each image.")):
        vision_trainer("qwen2_5_vl", processing_class=processor)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "TypeError: a value of type `int` is not an image. Use a PIL image, a path, a URL or bytes, or cast"),
        ([[1, 2], [3, 4]], "TypeError: a value of type `list` is not an image."),
        ({"bytes": None, "path": None}, "TypeError: neither `bytes` nor `path` is set. Fix the image, or remove"),
        (b"", "cannot be read: UnidentifiedImageError: "),
        ("", "FileNotFoundError: there is no file ''. Fix the image, or remove the row."),
        ("http://127.0.0.1:9/a.png", "cannot be read: Connect"),
    ],
)
def test_values_that_are_not_images(image, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        encode(row={**ROW, "images": [image]})
    assert str(error.value).startswith("An image of row 0 ")


def test_image_that_the_processor_refuses():
    message = r"Processor cannot process row 0: ValueError: absolute aspect ratio .*\. Fix or remove the row\."
    with pytest.raises(ValueError, match=message):
        encode("qwen2_5_vl", {**ROW, "images": [make_image(1, 1000, 2)]})


BAD_IMAGES = {
    "corrupt": (lambda data, folder: {"bytes": data[:60], "path": None}, "OSError: image file is truncated"),
    "no image": (lambda data, folder: {"bytes": b"text", "path": None}, "UnidentifiedImageError: "),
    "missing file": (lambda data, folder: {"bytes": None, "path": str(folder / "missing.png")}, "FileNotFoundError: "),
}


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        pytest.param(*case, id=name, marks=[] if name == "corrupt" else pytest.mark.long)
        for name, case in BAD_IMAGES.items()
    ],
)
def test_bad_images(make_bad, message, position, part, stream, tmp_path):
    data = (tmp_path / image_file(tmp_path)).read_bytes()
    rows = [{**ROW, "images": [{"bytes": data, "path": None}]} for _ in range(2)]
    rows[position] = {**ROW, "prompt": "What?", "images": [make_bad(data, tmp_path)]}
    bad = Dataset.from_list(rows, features=FEATURES)
    where = f"row {position} of the {part} dataset"
    if stream:
        bad = bad.to_iterable_dataset()
        where = rf"the row of the {part} dataset with the prompt 'What\?' \(drawn as number {position + 1}\)"
    datasets = {"rows": bad, "max_steps": 2} if part == "train" else {"rows": step_rows(2), "eval_dataset": bad}

    def start():
        trainer = vision_trainer(**datasets)
        if stream and position == 1:  # all others are found before training
            trainer.train() if part == "train" else trainer.evaluate()

    with pytest.raises(ValueError, match=rf"An image of {where} cannot be read: {message}.*\. Fix the image, or"):
        start()


def test_path_that_does_not_exist(tmp_path):
    rows = [{**ROW, "images": [image_file(tmp_path)]}, {**ROW, "images": [str(tmp_path / "missing.png")]}]
    for position in (1, 0):
        message = (
            f"An image of row {position} of the train dataset cannot be read: FileNotFoundError: there is no file"
        )
        with pytest.raises(ValueError, match=message):
            vision_trainer(rows=rows)
        rows.reverse()


def test_stream_whose_first_row_has_no_image_column():
    stream = IterableDataset.from_generator(lambda: iter([*step_rows(2), *vision_step_rows(2)]))
    with pytest.raises(ValueError, match=r"has images, but the first row has neither `image` nor `images`"):
        vision_trainer(rows=stream, max_steps=2).train()


def test_text_only_model():
    tokenizer = byte_level_tokenizer(CHATML)
    with pytest.raises(ValueError, match=r"The train dataset has images, but a \w+ cannot process them"):
        vision_trainer(model=tiny_model(400), ref_model=tiny_model(400), processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"The data has images, but Qwen2ForCausalLM is a text-only model"):
        vision_trainer(model=tiny_model(400), ref_model=tiny_model(400))


def test_processor_without_chat_template():
    processor = VISION_MODELS["llava"][0]()
    processor.chat_template = None
    message = (
        r"row 0 of the train dataset has no image placeholders .* but 1 image\. The processor has no chat template"
    )
    with pytest.raises(ValueError, match=message):
        vision_trainer(processing_class=processor)
    rows = [{**ROW, "prompt": [{"role": "user", "content": "How many?"}]}]
    with pytest.raises(ValueError, match=r"`prompt` of row 0 .* has no chat template"):
        vision_trainer(rows=rows, processing_class=processor)


def test_shared_prefix_on_where_it_is_not_exact():
    with pytest.raises(ValueError, match=r"`shared_prefix='on'` is not possible because"):
        vision_trainer(shared_prefix="on", accelerator_config={"dispatch_batches": True})


def test_padding_to_a_multiple():
    with pytest.raises(ValueError, match=r"`pad_to_multiple_of=8` is not supported for data with images"):
        vision_trainer(pad_to_multiple_of=8)


def test_plain_pairs_with_images_in_evaluation():
    evaluation = {"charts": Dataset.from_list(vision_plain_rows(2))}
    with pytest.raises(ValueError, match=r"The charts dataset has ordinary preference pairs with images"):
        vision_trainer(eval_dataset=evaluation)
    with pytest.raises(ValueError, match=r"The charts dataset has ordinary preference pairs with images"):
        vision_trainer(rows=step_rows(4), eval_dataset=evaluation)
    with pytest.raises(ValueError, match=r"The eval dataset has ordinary preference pairs with images"):
        vision_trainer(rows=step_rows(4)).evaluate(evaluation["charts"])


def test_images_only_in_new_evaluation_data():
    trainer = vision_trainer(rows=step_rows(4))
    with pytest.raises(ValueError, match=r"the data that the trainer was created with has none"):
        trainer.evaluate(Dataset.from_list(vision_step_rows(2)))


def test_stage_without_the_column_images():
    images, text = Dataset.from_list(vision_step_rows(4)), Dataset.from_list(step_rows(4))
    message = r"Stage '2' and the first stage .*: \['images'\] .* To the stage without images, add `(.*)`\."
    with pytest.raises(ValueError, match=message) as error:
        join_stages([images, text])
    advice = re.search(message, str(error.value))[1]
    joined = join_stages([images, eval(advice, {"stage": text})])
    assert [len(row) for row in joined["images"]] == [1, 2, 0, 1, 0, 0, 0, 0]
