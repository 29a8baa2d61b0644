"""Tiny decoders of many architectures, created from their configs."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 40
WINDOW = 5
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# Options of each model type's config in addition to the sizes
SHARED = {
    "llama": {},
    "qwen2": {},
    "qwen2 with windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "output_router_logits": True, "decoder_sparse_step": 1},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "sliding_window": WINDOW, "output_router_logits": True},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {**MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 8},
    "olmo3": MIXED,
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "cohere2": MIXED,
    "glm4": {},
    "ministral3": {},
    "exaone4": MIXED,
}


def tiny_decoder(name: str, seed: int = 0, **options) -> torch.nn.Module:
    """Create a model in float32, with weights large enough for its probabilities to differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.split()[0], **{**SIZE, **SHARED.get(name, {}), **options})
    return AutoModelForCausalLM.from_config(config).float().train()
