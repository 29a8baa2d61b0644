"""Names of TRL and friends that this package overrides or leans on. A failure says what moved."""

import dataclasses
import inspect

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, TrlParser, get_dataset, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.commands.training import _subtract_subsequence
from trl.trainer import dpo_trainer
from trl.trainer.utils import get_config_model_id

SOURCE = {
    name: inspect.getsource(getattr(DPOTrainer, name))
    for name in ("__init__", "_prepare_dataset", "_compute_loss", "evaluate")
}


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_constructor_arguments_are_passed_on_by_name():
    expected = ["self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset"]
    assert parameters(DPOTrainer.__init__)[:8] == [*expected, "processing_class"], "DPOTrainer.__init__ changed"


def test_prepare_dataset_is_the_one_place_where_rows_become_tokens():
    expected = ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert parameters(DPOTrainer._prepare_dataset) == expected, "StepDPOTrainer._prepare_dataset must follow"
    assert SOURCE["__init__"].count("self._prepare_dataset(") == 3, "train, eval and dict of evals are prepared there"
    assert "self._prepare_dataset(" in SOURCE["evaluate"], "evaluate() no longer prepares new data"


@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_columns_of_a_prepared_data_set(column):
    assert f'"{column}"' in SOURCE["_prepare_dataset"], f"DPOTrainer prepares another column than {column}"
    collator = inspect.getsource(dpo_trainer.DataCollatorForPreference.torch_call)
    assert f'["{column}"]' in collator, f"the collator no longer reads {column}"


def test_collator_makes_the_mask_and_the_loss_reads_it():
    collator = dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}])
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert 'inputs["completion_mask"]' in SOURCE["_compute_loss"], "the loss takes its mask from elsewhere"


def test_truncation_leaves_rows_that_fit_alone():
    fields = dpo_trainer.DataCollatorForPreference.__dataclass_fields__
    assert "max_length" in fields, "truncation moved out of the collator: see who cuts steps now"


@pytest.mark.parametrize("name", ["_tag_names", "_name", "_paper"])
def test_model_card_attributes(name):
    assert hasattr(DPOTrainer, name), f"DPOTrainer.{name}, which the model card is made of, is gone"


def test_tokenizer_attribute():
    assert "self._tokenizer = " in SOURCE["__init__"], "DPOTrainer no longer keeps its tokenizer in _tokenizer"


def test_vision_data_sets_are_not_prepared():
    assert '"image" in dataset_sample or "images" in dataset_sample' in SOURCE["__init__"], (
        "DPOTrainer recognises images in another way; StepDPOTrainer refuses step pairs by the same columns"
    )


def test_config_is_a_dataclass_with_the_fields_read_here():
    fields = DPOConfig.__dataclass_fields__
    assert {"max_length", "dataset_num_proc"} <= fields.keys()


def test_model_id_helper():
    assert parameters(get_config_model_id) == ["config"]


def test_fsdp2_policy_is_set_when_the_accelerator_is_made():
    assert parameters(Trainer.create_accelerator_and_postprocess) == ["self"]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=None)
    plugin.set_mixed_precision("bf16")
    policy = plugin.mixed_precision_policy
    assert dataclasses.replace(policy, output_dtype=None).output_dtype is None
    assert policy.output_dtype == torch.bfloat16, "accelerate no longer rounds: the override can go"


def test_names_of_the_command_line():
    assert parameters(resolve_accelerate_config_argument) == ["launch_args"]
    assert _subtract_subsequence(["a", "b", "a"], ["b"]) == ["a", "a"]
    assert "separate_remaining_strings" in parameters(TrlParser.parse_args_and_config)
    assert all(callable(function) for function in (get_dataset, get_peft_config, get_quantization_config))
