"""Support of prefix sharing: the conditions under which it is exact, with a reason where it is not."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from .forward import text_decoder
from .repeated_images import takes_encoded_images
from .vision import BLOCKS, ENCODED_ONCE, VISION_MODEL_TYPES

# Model types that the tests compare with separate sequences
TESTED_MODEL_TYPES = (
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
# Collators whose batches are known. Others, and subclasses, must be added because they can add keys to a batch
COLLATORS: list[type] = [DataCollatorForPreference, DataCollatorForVisionPreference]
ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def why_not_shared(trainer: DPOTrainer) -> str | None:
    """
    Return the reason why a trainer cannot share prefixes.

    Args:
        trainer (`DPOTrainer`):
            The trainer, with its models.

    Returns:
        `str` or `None`: The reason, to follow "because" in a message. `None` if prefixes can be shared.
    """
    return _trainer_reason(trainer) or _model_reason(trainer.model) or _model_reason(trainer.ref_model)


def _trainer_reason(trainer: Any) -> str | None:
    args, accelerator = trainer.args, trainer.accelerator
    if type(trainer.data_collator) not in COLLATORS:
        return f"the data collator is a {type(trainer.data_collator).__name__}, and only DPOTrainer's is supported"
    if accelerator.dataloader_config.dispatch_batches:
        return "`dispatch_batches=True` slices batches, and a prefix tree cannot be sliced"
    if args.torch_compile:
        return "`torch_compile=True` has not been tested with shared prefixes"
    if args.use_liger_kernel and hasattr(DPOTrainer, "_compute_loss_liger"):
        return "the loss of `use_liger_kernel=True` in this version of TRL needs whole sequences"
    parallelism = accelerator.parallelism_config
    kinds = {"cp": "context", "sp": "sequence", "tp": "tensor"}
    used = [kind for short, kind in kinds.items() if getattr(parallelism, f"{short}_enabled", False)]
    return f"{used[0]} parallelism splits sequences or heads" if used else None


def has_images(trainer: Any) -> bool:
    """Return whether a trainer has ordinary pairs or step pairs with images."""
    return bool(trainer._is_vision_dataset or getattr(trainer, "has_step_images", False))


def encodes_images_once(trainer: Any) -> bool:
    """Return whether padded rows can use each encoded image twice, for the chosen and for the rejected row."""
    models = [decoder(model) for model in (trainer.model, trainer.ref_model) if model is not None]
    return (
        has_images(trainer)
        and type(trainer.data_collator) in COLLATORS
        and not trainer.args.torch_compile
        and all(model.config.model_type in ENCODED_ONCE and takes_encoded_images(model) for model in models)
    )


def decoder(model: Any) -> Any:
    """Return the causal language model without the wrappers of PEFT, DDP, DeepSpeed and FSDP."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _model_reason(model: Any) -> str | None:
    if model is None:
        return None
    adapters = getattr(getattr(model, "module", model), "peft_config", {}).values()
    prompt_learning = [config.peft_type.value for config in adapters if config.is_prompt_learning]
    if prompt_learning:
        return f"the adapter prepends virtual tokens to each sequence ({prompt_learning[0]})"
    model = decoder(model)
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a Transformers model"
    config = model.config.get_text_config()
    if config is not model.config and model.config.model_type not in VISION_MODEL_TYPES:
        return f"it has not been tested for {model.config.model_type!r}, only for {', '.join(VISION_MODEL_TYPES)}"
    if config is not model.config and not takes_encoded_images(model):
        return f"{type(model).__name__} does not accept encoded images in this version of Transformers"
    if getattr(getattr(model.config, "vision_config", None), "model_type", None) == "pixtral":
        return f"{type(model).__name__} has a Pixtral vision tower, which has not been tested"
    text_model = text_decoder(model.base_model)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    if other or model._is_stateful or any(isinstance(module, torch.nn.Conv1d) for module in text_model.modules()):
        kinds = ", ".join(other) or "state-space or convolution"
        return f"{type(model).__name__} has layers that carry a state from token to token ({kinds})"
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return f"{type(model).__name__} lets tokens attend to later tokens"
    if any(name.endswith("sinks") for name, _ in text_model.named_parameters()):
        return f"{type(model).__name__} has attention sinks"
    if config._attn_implementation == "flex_attention":
        return "`attn_implementation='flex_attention'` uses its own masks ('sdpa' is supported)"
    if model.config.model_type in BLOCKS and "flash" in config._attn_implementation:
        return f"{type(model).__name__} lets the tokens of an image attend to later ones, unlike FlashAttention"
    # A vision-language model either has one of these, or its own
    if config.model_type not in (*TESTED_MODEL_TYPES, f"{model.config.model_type}_text"):
        return f"it has not been tested for {config.model_type!r}, only for {', '.join(TESTED_MODEL_TYPES)}"
    return None
