"""Names and behavior of TRL and its dependencies that this package relies on. A failure says what changed."""

import dataclasses
import inspect
import re
from importlib import resources

import accelerate
import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import fsdp_utils
from packaging.version import Version
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from trl import (
    DPOConfig,
    DPOTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    prepare_multimodal_messages,
)
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.commands.training import _subtract_subsequence
from trl.trainer import dpo_trainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id

from stepdpo_trl.shared_prefix.memory import CHECKPOINTING
from stepdpo_trl.shared_prefix.vision import ANYRES, PATCHES, STACKED, TILES, VISION_MODEL_TYPES
from stepdpo_trl.step_dpo.model_card import METHOD, QUICK_START

from ..shared_prefix.vision_architectures import collate, count_tokens, draw_images, tiny_vision_model

SOURCE = {
    name: inspect.getsource(getattr(DPOTrainer, name))
    for name in ("__init__", "_prepare_dataset", "_compute_loss", "evaluate")
}


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_constructor_arguments_are_passed_on_by_name():
    expected = ["self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset"]
    assert parameters(DPOTrainer.__init__)[:8] == [*expected, "processing_class"], "DPOTrainer.__init__ changed"


def test_rows_are_tokenized_only_in_prepare_dataset():
    expected = ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert parameters(DPOTrainer._prepare_dataset) == expected, "StepDPOTrainer._prepare_dataset must follow"
    assert SOURCE["__init__"].count("self._prepare_dataset(") == 3, (
        "train, eval and dicts of eval datasets are prepared there"
    )
    assert "self._prepare_dataset(" in SOURCE["evaluate"], "evaluate() no longer prepares new data"
    used = set(re.findall(r"self\.(\w+)", SOURCE["_prepare_dataset"]))
    assert used == {"_tokenizer"}, "inspection prepares rows with only a tokenizer"


@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_columns_of_a_prepared_dataset(column):
    assert f'"{column}"' in SOURCE["_prepare_dataset"], f"DPOTrainer no longer prepares the column {column}"
    collator = inspect.getsource(dpo_trainer.DataCollatorForPreference.torch_call)
    assert f'["{column}"]' in collator, f"the collator no longer reads {column}"


def test_loss_reads_the_mask_of_the_collator():
    collator = dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}])
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert 'inputs["completion_mask"]' in SOURCE["_compute_loss"], "the loss no longer reads the completion mask"


def test_collator_truncates():
    fields = dpo_trainer.DataCollatorForPreference.__dataclass_fields__
    assert "max_length" in fields, "truncation moved out of the collator: check that steps are kept whole"


@pytest.mark.parametrize("name", ["_tag_names", "_name", "_paper"])
def test_model_card_attributes(name):
    assert hasattr(DPOTrainer, name), f"DPOTrainer.{name}, which the model card uses, was removed"


def test_tokenizer_attribute():
    assert "self._tokenizer = " in SOURCE["__init__"], "DPOTrainer no longer keeps its tokenizer in _tokenizer"


def test_vision_datasets_are_not_prepared():
    detected = 'self._is_vision_dataset = "image" in dataset_sample or "images" in dataset_sample'
    assert detected in SOURCE["__init__"], "DPOTrainer no longer detects images by the columns in IMAGE_COLUMNS"
    # StepDPOTrainer overrides the attribute for step pairs, which all of these then handle like text
    assert "if self._is_vision_dataset and args.precompute_ref_log_probs" in SOURCE["__init__"]
    assert "skip_prepare_dataset = self._is_vision_dataset" in SOURCE["__init__"]
    assert "if not self._is_vision_dataset and eval_dataset is not None" in SOURCE["evaluate"]
    other = {name for name, method in vars(DPOTrainer).items() if "_is_vision_dataset" in source_of(method)}
    assert other == {"__init__", "evaluate", "_set_signature_columns_if_needed"}, "the attribute is used elsewhere too"
    assert DPOTrainer._set_signature_columns_if_needed.__code__.co_argcount == 1


def source_of(method):
    return inspect.getsource(method) if inspect.isfunction(method) else ""


def test_vision_collator_passes_strings_and_tokens_to_the_processor():
    """The collator must call the processor for prompts and completions separately, and only join the results."""
    calls = []

    class Processor:
        tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 0})

        def __call__(self, text, images=None, **kwargs):
            calls.append((text, images, kwargs))
            ids = torch.tensor([[1, 2]] * 2 if images else [[3]])
            types = {"mm_token_type_ids": torch.ones_like(ids), "pixel_values": images} if images else {}
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}

    batch = dpo_trainer.DataCollatorForVisionPreference(Processor())(
        [{"prompt": "a", "chosen": [3], "rejected": [4, 5], "images": ["image"]}]
    )
    assert [text for text, *_ in calls] == [["a", "a"], [[3]], [[4, 5]]]
    assert [images for _, images, _ in calls] == [[["image"], ["image"]], None, None]
    assert all(options["add_special_tokens"] is False for *_, options in calls)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert batch["mm_token_type_ids"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert batch["pixel_values"] == [["image"], ["image"]]


def test_fields_and_images_of_the_vision_collator():
    fields = dpo_trainer.DataCollatorForVisionPreference.__dataclass_fields__
    assert {"processor", "max_length", "pad_to_multiple_of"} <= fields.keys()
    assert fields["max_length"].default is None, "VisionStepCollator relies on no truncation"
    source = inspect.getsource(dpo_trainer.DataCollatorForVisionPreference.torch_call)
    assert "images = None" in source, "batches without images no longer leave them out"
    read = set(re.findall(r"self\.processor\.?([\w.]*)", source))
    assert read == {"", "tokenizer.pad_token_id", "tokenizer.eos_token_id"}, "TokenizedSteps must have these too"


def test_parts_of_the_model_card_that_images_replace():
    template = resources.files("trl").joinpath("templates/lm_model_card.md").read_text()
    assert len(QUICK_START.findall(template)) == len(METHOD.findall(template)) == 1
    source = inspect.getsource(DPOTrainer.create_model_card)
    assert 'model_card.save(os.path.join(self.args.output_dir, "README.md"))' in source, "describe_images reads it"


# Names of each architecture that shared_prefix/vision.py reads
IMAGE_ARGUMENTS = {
    **dict.fromkeys(PATCHES, ("pixel_values", "image_grid_thw")),
    **dict.fromkeys(ANYRES, ("pixel_values", "image_sizes", "batch_num_images")),
    **dict.fromkeys(TILES, ("pixel_values", "pixel_attention_mask")),
    **dict.fromkeys(STACKED, ("pixel_values",)),
}


@pytest.mark.parametrize("name", VISION_MODEL_TYPES)
def test_names_of_a_vision_language_model(name):
    model = tiny_vision_model(name)
    backbone = model.base_model
    assert "pixel_values" in parameters(type(model).forward)
    assert set(IMAGE_ARGUMENTS[name]) <= set(parameters(backbone.get_image_features))
    expected = {"input_ids", "position_ids", "attention_mask"}
    if Version(transformers.__version__) >= Version("5.19"):  # before, each row encodes its images
        expected.add("mm_encoder_outputs")
    assert expected <= set(parameters(type(backbone).forward))
    assert isinstance(model.config.image_token_id, int)
    assert getattr(backbone, "language_model", None) or getattr(backbone, "text_model", None)
    if name in PATCHES:
        assert isinstance(model.config.vision_config.spatial_merge_size, int)
        arguments = {"input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"}
        assert arguments <= set(parameters(backbone.get_rope_index))
    else:
        assert not hasattr(backbone, "get_rope_index"), "it now needs positions on three axes"
    images = draw_images(model, 2)
    counts = [sum(count_tokens(model, [image])) for image in images]
    inputs = collate(model, [[image] for image in images])
    features = backbone.get_image_features(**inputs, return_dict=True).pooler_output
    assert len(features) >= 2, "features are no longer a list or a batch of images"
    assert sum(feature.shape[:-1].numel() for feature in features) == sum(counts)


def test_head_of_a_vision_language_model_under_fsdp2():
    if hasattr(trl_utils, "add_fused_lm_head"):  # older versions call the head
        source = inspect.getsource(trl_utils.add_fused_lm_head)
        assert "weight = weight.full_tensor()" in source, "TRL gathers the head in another way: remove the override?"
    if Version(accelerate.__version__) < Version("1.14"):  # it does not look for the norm
        return
    norm = fsdp_utils._find_final_norm
    assert norm(tiny_vision_model("llava")) is None, "Accelerate finds the final norm: remove the override"
    assert norm(AutoModelForCausalLM.from_config(tiny_vision_model("llava").config.text_config)) is not None


def test_multimodal_messages():
    assert parameters(prepare_multimodal_messages) == ["messages", "images"]
    messages = [{"role": "user", "content": "a"}]
    parts = prepare_multimodal_messages(messages, images=["image"])[0]["content"]
    assert parts == [{"type": "image", "image": "image"}, {"type": "text", "text": "a"}]


def test_weights_of_a_checkpoint_are_loaded_by_these_methods():
    assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert parameters(Trainer._load_best_model) == ["self"]


def test_config_has_the_fields_that_are_read():
    fields = DPOConfig.__dataclass_fields__
    assert {"max_length", "dataset_num_proc"} <= fields.keys()


def test_model_id_helper():
    assert parameters(get_config_model_id) == ["config"]


def test_fsdp2_policy_is_set_with_the_accelerator():
    assert parameters(Trainer.create_accelerator_and_postprocess) == ["self"]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=None)
    plugin.set_mixed_precision("bf16")
    policy = plugin.mixed_precision_policy
    assert dataclasses.replace(policy, output_dtype=None).output_dtype is None
    assert policy.output_dtype == torch.bfloat16, "Accelerate no longer rounds outputs: remove the override"


STAGED_METHODS = {
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


@pytest.mark.parametrize("name", STAGED_METHODS)
def test_methods_overridden_by_staged_training(name):
    assert set(STAGED_METHODS[name]) <= set(parameters(getattr(DPOTrainer, name))), (
        f"StagedTraining.{name} must follow"
    )


def test_order_of_calls_in_the_training_loop():
    loop = inspect.getsource(Trainer._inner_training_loop)
    called = ["get_train_dataloader", "set_initial_training_values", "_init_training_state", "_prepare_for_training"]
    called += ["on_train_begin", "_run_epoch", "_finalize_training"]
    places = [loop.index(f"{name}(") for name in called]
    assert places == sorted(places), "the order of the Trainer's loop changed: StagedTraining must follow"
    assert "epoch=epoch," in loop, "StagedTraining._run_epoch expects keyword arguments"


def test_state_is_the_last_file_of_a_checkpoint():
    saving = inspect.getsource(Trainer._save_checkpoint)
    places = [saving.index(name) for name in ("_save_rng_state", "save_to_json", "rotate_checkpoints")]
    assert places == sorted(places), "sdpo.files.find_checkpoint expects trainer_state.json last"


def test_reference_adapter_is_named_ref():
    reference = inspect.getsource(DPOTrainer.compute_ref_log_probs)
    for source in (SOURCE["_compute_loss"], reference):
        assert 'adapter_name="ref" if "ref" in' in source, "DPOTrainer renamed its reference adapter"
    assert "self.ref_model is None and is_peft_model" in reference, "scoring with the policy (sdpo) must follow"
    assert "self.beta" in SOURCE["_compute_loss"]
    assert all(callable(function) for function in (create_model_from_path, disable_dropout_in_model))


def test_functions_of_the_command_line():
    assert parameters(resolve_accelerate_config_argument) == ["launch_args"]
    assert _subtract_subsequence(["a", "b", "a"], ["b"]) == ["a", "a"]
    assert "separate_remaining_strings" in parameters(TrlParser.parse_args_and_config)
    assert all(callable(function) for function in (get_dataset, get_peft_config, get_quantization_config))


def test_batch_is_passed_to_the_model_as_keyword_arguments():
    assert parameters(DPOTrainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]
    assert parameters(DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    reference = inspect.getsource(DPOTrainer.compute_ref_log_probs)
    for source in (SOURCE["_compute_loss"], reference):
        assert "for k, v in inputs.items() if k not in _non_model_keys" in source, (
            "the prefix tree no longer reaches the model"
        )
    assert 'inputs["attention_mask"].sum()' in SOURCE["_compute_loss"], (
        "num_tokens is no longer counted by the attention mask"
    )


def test_keys_of_a_batch():
    collator = dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}])
    assert {"input_ids", "attention_mask", "completion_mask"} == batch.keys()


def test_attention_is_looked_up_by_name_and_4d_masks_are_unchanged():
    source = inspect.getsource(modeling_llama)
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in source
    assert "eager_attention_forward" in vars(modeling_llama)
    assert ALL_ATTENTION_FUNCTIONS.get("eager") is None, "Transformers now registers an eager attention function"
    masks = inspect.getsource(masking_utils._preprocess_mask_arguments)
    assert "len(attention_mask.shape) == 4" in masks, "4D masks are no longer passed through unchanged"


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
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch<2.10 has no variable-length attention")
    if Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch<2.12 has no variable-length attention with grouped heads")
    assert expected <= set(parameters(varlen.varlen_attn)), "without these arguments, CUDA uses the slow fallback"


def test_order_of_training_comes_from_get_train_sampler():
    assert parameters(Trainer._get_train_sampler) == ["self", "train_dataset"]


def test_persistent_workers_of_a_data_loader():
    loader = DataLoader([0])
    assert loader._iterator is None, "stop_workers deletes the iterator, which holds the persistent workers"
    assert "self.base_dataloader.__iter__()" in inspect.getsource(DataLoaderShard.__iter__), "stop_workers must follow"
    source = inspect.getsource(Trainer)
    assert "self._eval_dataloaders = {dataloader_key: dataloader}" in source, "StageScoring._stop_workers must follow"


def test_names_of_activation_checkpointing(tmp_path):
    config = DPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert getattr(config, CHECKPOINTING), "StepDPOConfig enables it by default because DPOConfig does"
    assert config.gradient_checkpointing, "TRL reads the older name, which mirrors the new one"
    other = "activation_checkpointing" in inspect.getsource(DPOTrainer)
    assert not other, "TRL has followed the renaming, so `RENAMED` and `CHECKPOINTING` can become simpler"
