"""Where sharing prefixes is exact, and where not, with a reason for users."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

# Model types of transformers that the tests compare with separate sequences
CHECKED_MODEL_TYPES = (
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
ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def why_not_shared(trainer: DPOTrainer) -> str | None:
    """
    Why a trainer cannot share prefixes.

    Args:
        trainer (`DPOTrainer`): The trainer, with its models.

    Returns:
        `str`, *optional*: The reason, as the end of a sentence. `None` where it can.
    """
    return _of_trainer(trainer) or next(filter(None, map(_of_model, (trainer.model, trainer.ref_model))), None)


def _of_trainer(trainer: Any) -> str | None:
    args, accelerator = trainer.args, trainer.accelerator
    if trainer._is_vision_dataset:
        return "the data has images"
    if type(trainer.data_collator) is not DataCollatorForPreference:  # one derived from it may add to a batch
        return f"batches of a {type(trainer.data_collator).__name__} are not known; DPOTrainer's own collator is"
    if accelerator.dataloader_config.dispatch_batches:
        return "`dispatch_batches=True` cuts batches into parts, and a tree cannot be cut"
    if args.torch_compile:
        return "`torch_compile=True` has not been checked with it"
    if args.use_liger_kernel and hasattr(DPOTrainer, "_compute_loss_liger"):
        return "the loss of `use_liger_kernel=True` in this TRL needs whole sequences"
    parallelism = accelerator.parallelism_config
    kinds = {"cp": "context", "sp": "sequence", "tp": "tensor"}
    used = [kind for short, kind in kinds.items() if getattr(parallelism, f"{short}_enabled", False)]
    return f"{used[0]} parallelism splits sequences or heads" if used else None


def decoder(model: Any) -> Any:
    """The causal language model in the wrappers of PEFT, DDP, DeepSpeed and FSDP."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _of_model(model: Any) -> str | None:
    if model is None:
        return None
    adapters = getattr(getattr(model, "module", model), "peft_config", {}).values()
    prompt_learning = [config.peft_type.value for config in adapters if config.is_prompt_learning]
    if prompt_learning:
        return f"the adapter puts virtual tokens before each sequence ({prompt_learning[0]})"
    model = decoder(model)
    if not isinstance(model, PreTrainedModel):
        return f"a {type(model).__name__} is not a model of transformers"
    config = model.config
    if config.get_text_config() is not config:
        return f"{type(model).__name__} has parts beside a decoder of text"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    if other or model._is_stateful or any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        kinds = ", ".join(other) or "state-space or convolution"
        return f"{type(model).__name__} has layers that pass on a state from token to token ({kinds})"
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return f"{type(model).__name__} lets tokens attend to what follows them"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return f"{type(model).__name__} has attention sinks"
    if config._attn_implementation == "flex_attention":
        return "`attn_implementation='flex_attention'` takes masks of its own; 'sdpa' is supported"
    if config.model_type not in CHECKED_MODEL_TYPES:
        return f"it has not been checked for {config.model_type!r}, only for {', '.join(CHECKED_MODEL_TYPES)}"
    return None
