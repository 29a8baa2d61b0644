"""Invalid data and options raise a ValueError before training that says where the problem is and how to fix it."""

import logging
import re

import pytest
import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from peft import LoraConfig

from stepdpo_trl import StepDPOConfig

from ..tiny import byte_level_tokenizer, plain_rows, save_tiny_model, step_rows, tiny_model
from ..training import make_trainer


def rows_with(index, **change):
    rows = step_rows(4)
    rows[index] = {**rows[index], **change}
    return rows


def without(column):
    return [{name: value for name, value in row.items() if name != column} for row in step_rows(4)]


def renamed(old, new):
    return [{new if name == old else name: value for name, value in row.items()} for row in step_rows(4)]


CASES = {
    "missing column": (without("rejected"), r"`rejected` is missing from the train dataset"),
    "misspelled column": (renamed("chosen", "choosen"), r"Rename the nearest column, 'choosen'"),
    "misspelled prefix": (
        renamed("initial_reason_steps", "initial_reasoning_steps"),
        r"`initial_reasoning_steps` of the train dataset looks like `initial_reason_steps`",
    ),
    "None step": (rows_with(2, chosen=None), r"`chosen` of row 2 of the train dataset is None"),
    "empty step": (rows_with(3, rejected="  "), r"`rejected` of row 3 of the train dataset is empty"),
    "same steps": (rows_with(1, chosen=" x", rejected=" x"), r"row 1 of the train dataset are the same"),
    "step is a number": ([{**row, "chosen": 5} for row in step_rows(4)], r"`chosen` of row 0 .* is 5"),
    "assistant turn and prefix": (
        [
            {**row, "prompt": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Well"}]}
            for row in step_rows(4)[1:]
        ],
        r"`prompt` of row 0 of the train dataset ends with an assistant turn",
    ),
    "images": (
        [{**row, "images": []} for row in step_rows(4)],
        r"The train dataset has images, but a \w+ cannot process them",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize(("rows", "message"), CASES.values(), ids=CASES.keys())
def test_bad_rows(rows, message, stream, chat_model, tmp_path):
    dataset = Dataset.from_list(rows)
    if stream:  # rows of a stream have no index, so errors quote the prompt
        dataset = dataset.to_iterable_dataset()
        message = re.sub(r"row \d", "the row", message).replace("of the train dataset", "of the train dataset.*")
    with pytest.raises(ValueError, match=message):
        make_trainer(chat_model, tmp_path, dataset, max_steps=4).train()


@pytest.mark.parametrize(
    "dataset", [Dataset.from_list(step_rows(1)).select([]), IterableDataset.from_generator(lambda: iter([]))]
)
def test_empty_dataset(dataset, chat_model, tmp_path):
    with pytest.raises(ValueError, match=r"The train dataset is empty"):
        make_trainer(chat_model, tmp_path, dataset, max_steps=4)


def test_error_has_row_index_with_several_processes(chat_model, tmp_path):
    with pytest.raises(ValueError, match=r"`chosen` of row 3 of the train dataset is None"):
        make_trainer(chat_model, tmp_path, rows_with(3, chosen=None), dataset_num_proc=2)


def test_error_has_name_of_eval_dataset(chat_model, tmp_path):
    evals = {"gsm8k": Dataset.from_list(rows_with(2, chosen=" x", rejected=" x"))}
    with pytest.raises(ValueError, match=r"row 2 of the gsm8k dataset are the same"):
        make_trainer(chat_model, tmp_path, eval_dataset=evals)


def test_null_prefix_equals_empty_prefix(chat_model, tmp_path):
    null = make_trainer(chat_model, tmp_path, rows_with(1, initial_reason_steps=None))
    empty = make_trainer(chat_model, tmp_path, rows_with(1, initial_reason_steps=""))
    assert null.train_dataset["prompt_ids"] == empty.train_dataset["prompt_ids"]


def test_stream_with_step_pairs_and_plain_pairs(chat_model, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([*step_rows(3), *plain_rows(3)]))
    with pytest.raises(
        ValueError,
        match=r"`initial_reason_steps` is missing from the row of the train dataset with the prompt 'What is 0",
    ):
        make_trainer(chat_model, tmp_path, stream, max_steps=4).train()


def test_images_in_training_and_step_pairs_in_evaluation(chat_model, tmp_path):
    rows = [{**row, "images": []} for row in plain_rows(4)]
    with pytest.raises(
        ValueError,
        match="eval dataset has `initial_reason_steps`, but the train dataset has ordinary preference pairs with "
        "images",
    ):
        make_trainer(chat_model, tmp_path, rows, eval_dataset=Dataset.from_list(step_rows(4)))


def test_prefix_column_of_released_scripts(plain_model, tmp_path, caplog):
    rows = [{**row, "prefix": "Step 1:"} for row in plain_rows(4)]
    make_trainer(plain_model, tmp_path, rows)
    assert "its column `prefix` is ignored. Rename `prefix` to `initial_reason_steps`" in caplog.text


def test_no_pad_and_no_eos_token(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"neither a pad token nor an EOS token.*`tokenizer.pad_token = \.\.\.`"):
        make_trainer(tiny_model(300), tmp_path, processing_class=tokenizer)
    # The same error for a tokenizer that the trainer loads
    path = save_tiny_model(tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match="pad"):
        make_trainer(path, tmp_path)


def test_max_length_shorter_than_a_step(chat_model, tmp_path):
    with pytest.raises(ValueError, match=r"row 0 of the train dataset has \d+ tokens, which leaves no room"):
        make_trainer(chat_model, tmp_path, max_length=3)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="older TRL supports LoRA on lm_head")
def test_lora_on_lm_head(chat_model, tmp_path):
    with pytest.raises(ValueError, match=r"`lm_head` is not supported.*Remove"):
        make_trainer(chat_model, tmp_path, peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]))


def test_options_are_checked_in_the_config(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'step-dpo'"):
        StepDPOConfig(str(tmp_path), use_cpu=True, prompt_suffix="stepdpo")
    with pytest.raises(TypeError, match="overlong_prefixes"):
        StepDPOConfig(str(tmp_path), use_cpu=True, overlong_prefixes="drop")


# --- overlong rows: always logged ---


def overlong_limit(model, output_dir, fits):
    """Return the `max_length` for which `fits` of the eight rows are short enough."""
    rows = make_trainer(model, output_dir).train_dataset
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    return sorted(lengths)[fits - 1]


@pytest.mark.parametrize(
    ("overlong_prefix", "left", "message"),
    [
        (
            "truncate",
            8,
            "3 rows of the train dataset are longer than max_length={} and have been truncated from the left",
        ),
        ("drop", 5, "3 rows of the train dataset are longer than max_length={} and have been dropped"),
    ],
)
def test_overlong_rows_are_counted(overlong_prefix, left, message, chat_model, tmp_path, caplog):
    limit = overlong_limit(chat_model, tmp_path, fits=5)
    with caplog.at_level(logging.WARNING, "stepdpo_trl"):
        trainer = make_trainer(chat_model, tmp_path, max_length=limit, overlong_prefix=overlong_prefix)
    assert message.format(limit) in caplog.text
    assert len(trainer.train_dataset) == left
    whole = make_trainer(chat_model, tmp_path)
    if overlong_prefix == "truncate":
        assert trainer.train_dataset["chosen_ids"] == whole.train_dataset["chosen_ids"]
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["input_ids"].shape[1] <= limit


def test_overlong_rows_of_a_stream_are_counted(chat_model, tmp_path, caplog):
    limit = overlong_limit(chat_model, tmp_path, fits=5)
    stream = Dataset.from_list(step_rows()).to_iterable_dataset()
    trainer = make_trainer(chat_model, tmp_path, stream, max_steps=1, max_length=limit, overlong_prefix="drop")
    with caplog.at_level(logging.WARNING, "stepdpo_trl"):
        caplog.clear()
        assert len(list(trainer.train_dataset)) == 5
    # The length of a stream is unknown, so the count is logged at the 1st, 2nd, 4th, ... overlong row
    counts = re.findall(r"(\d+) of the (\d+) rows drawn so far of the train dataset are longer", caplog.text)
    assert counts
    assert all(int(overlong) <= int(drawn) for overlong, drawn in counts)


def test_stream_with_only_overlong_rows(chat_model, tmp_path):
    stream = Dataset.from_list(step_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"train dataset, without the rows longer than max_length=5, is empty"):
        make_trainer(chat_model, tmp_path, stream, max_steps=1, max_length=5, overlong_prefix="drop")


def test_only_overlong_rows(chat_model, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"train dataset is empty after dropping all of its 8 rows, which are longer than max_length=5",
    ):
        make_trainer(chat_model, tmp_path, max_length=5, overlong_prefix="drop")


def test_no_log_without_overlong_rows(chat_model, tmp_path, caplog):
    assert len(make_trainer(chat_model, tmp_path).train_dataset) == 8
    assert "longer than" not in caplog.text
