"""Names of TRL and friends that this package overrides or leans on. A failure says what moved."""

import dataclasses
import inspect
import re

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.nn.attention.varlen import varlen_attn
from transformers import Trainer, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from trl import DPOConfig, DPOTrainer, TrlParser, get_dataset, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.commands.training import _subtract_subsequence
from trl.trainer import dpo_trainer
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id

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
    used = set(re.findall(r"self\.(\w+)", SOURCE["_prepare_dataset"]))
    assert used == {"_tokenizer"}, "inspection prepares rows with a tokenizer alone"


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


STAGED = {
    "train": ["resume_from_checkpoint"],
    "get_train_dataloader": [],
    "set_initial_training_values": ["args", "dataloader"],
    "_init_training_state": [],
    "_prepare_for_training": [],
    "_run_epoch": ["epoch", "epochs_trained", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch"],
    "_finalize_training": [],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "save_model": ["output_dir", "_internal_call"],
    "_save_rng_state": ["output_dir"],
    "_load_from_checkpoint": [],
    "_precompute_ref_logps": ["dataset", "name", "batch_size"],
    "compute_ref_log_probs": ["model", "inputs"],
    "compute_loss": ["model", "inputs"],
}


@pytest.mark.parametrize("name", STAGED)
def test_methods_that_stages_answer(name):
    assert set(STAGED[name]) <= set(parameters(getattr(DPOTrainer, name))), f"StagedTraining.{name} must follow"


def test_training_loop_asks_in_the_order_that_stages_rely_on():
    loop = inspect.getsource(Trainer._inner_training_loop)
    asked = ["get_train_dataloader", "set_initial_training_values", "_init_training_state", "_prepare_for_training"]
    asked += ["on_train_begin", "_run_epoch", "_finalize_training"]
    places = [loop.index(f"{name}(") for name in asked]
    assert places == sorted(places), "the Trainer's loop goes another way: StagedTraining must follow"
    assert "epoch=epoch," in loop, "StagedTraining._run_epoch takes its arguments by name"


def test_a_checkpoint_is_whole_when_its_state_is_written():
    saving = inspect.getsource(Trainer._save_checkpoint)
    places = [saving.index(name) for name in ("_save_rng_state", "save_to_json", "rotate_checkpoints")]
    assert places == sorted(places), "stage_files.find_checkpoint takes trainer_state.json for the last file written"


def test_reference_adapter_is_used_where_it_is():
    reference = inspect.getsource(DPOTrainer.compute_ref_log_probs)
    for source in (SOURCE["_compute_loss"], reference):
        assert 'adapter_name="ref" if "ref" in' in source, "DPOTrainer names its reference adapter otherwise"
    assert "self.ref_model is None and is_peft_model" in reference, "scoring with the policy must follow"
    assert "self.beta" in SOURCE["_compute_loss"]
    assert all(callable(function) for function in (create_model_from_path, disable_dropout_in_model))


def test_names_of_the_command_line():
    assert parameters(resolve_accelerate_config_argument) == ["launch_args"]
    assert _subtract_subsequence(["a", "b", "a"], ["b"]) == ["a", "a"]
    assert "separate_remaining_strings" in parameters(TrlParser.parse_args_and_config)
    assert all(callable(function) for function in (get_dataset, get_peft_config, get_quantization_config))


def test_loss_and_reference_are_computed_from_rows_and_what_a_model_says_of_them():
    assert parameters(DPOTrainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]
    assert parameters(DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    reference = inspect.getsource(DPOTrainer.compute_ref_log_probs)
    for source in (SOURCE["_compute_loss"], reference):
        assert "for k, v in inputs.items() if k not in _non_model_keys" in source, "a tree no longer reaches the model"
    assert 'inputs["attention_mask"].sum()' in SOURCE["_compute_loss"], "num_tokens is counted in another way"


def test_collator_that_trees_are_built_from():
    collator = dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}])
    assert {"input_ids", "attention_mask", "completion_mask"} == batch.keys()


def test_attention_is_looked_up_by_name_with_keyword_arguments_handed_through():
    source = inspect.getsource(modeling_llama)
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in source
    assert "eager_attention_forward" in vars(modeling_llama)
    assert ALL_ATTENTION_FUNCTIONS.get("eager") is None, "transformers registers an eager attention of its own"
    masks = inspect.getsource(masking_utils._preprocess_mask_arguments)
    assert "len(attention_mask.shape) == 4" in masks, "a mask of four dimensions is no longer handed through"


def test_variable_length_attention():
    expected = {
        "query",
        "key",
        "value",
        "cu_seq_q",
        "cu_seq_k",
        "max_q",
        "max_k",
        "scale",
        "window_size",
        "enable_gqa",
    }
    assert expected <= set(parameters(varlen_attn)), "without these, CUDA goes the slow way"


def test_order_of_training_is_asked_for_in_one_place():
    assert parameters(Trainer._get_train_sampler) == ["self", "train_dataset"]
