"""Tiny vision-language models of many architectures, and batches for them as their processors create them."""


import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from .architectures import SIZE, VOCABULARY

IMAGE = VOCABULARY - 1  # id of the placeholder token
TEXT = {**SIZE, "num_hidden_layers": 3}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IDS = {"image_token_id": IMAGE, "video_token_id": IMAGE - 1, "vision_start_token_id": 3, "vision_end_token_id": 4}
QWEN = {**IDS, "text_config": {**TEXT, "rope_parameters": ROPE}}
PATCH = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
LLAVA = {"image_token_index": IMAGE, "image_token_id": IMAGE, "text_config": {**TEXT, "model_type": "llama"}}
TILES = {
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": ENCODER,
}

# Options of each model type's config
VISION = {
    "qwen2_5_vl": {
        **QWEN,
        "vision_config": {
            **PATCH,
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
    },
    "qwen2_vl": {
        **QWEN,
        "vision_config": {**PATCH, "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    },
    "qwen3_vl": {
        **QWEN,
        "vision_config": {
            **PATCH,
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
    },
    "llava": {**LLAVA, "vision_config": {"model_type": "clip_vision_model", **ENCODER}, "vision_feature_layer": -2},
    "llava_onevision": {
        **LLAVA,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {"model_type": "siglip_vision_model", **ENCODER, "vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
    },
    "smolvlm": TILES,
    "idefics3": TILES,
    "internvl": {
        "image_token_id": IMAGE,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**ENCODER, "image_size": [16, 16], "patch_size": [4, 4]},
        "vision_feature_layer": -1,
        "downsample_ratio": 0.5,
    },
}


def tiny_vision_model(name: str, seed: int = 0, **options) -> torch.nn.Module:
    """Create a model in float32, with weights large enough for its probabilities to differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**VISION[name], **options})
    model = AutoModelForImageTextToText.from_config(config).float().train()
    with torch.no_grad():  # towers and projectors initialize with small weights, some of them with zeros
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "text_model" not in name and "language_model" not in name:
                parameter.normal_(std=0.2)
    return model


def draw_images(model: torch.nn.Module, number: int) -> list[dict[str, torch.Tensor]]:
    """Return the inputs of images of several sizes."""
    kind, generator = model.config.model_type, torch.Generator().manual_seed(number)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if "qwen" in kind:
        sizes = [(4, 4), (4, 8), (8, 4), (4, 4)][:number]
        grids = [torch.tensor([[1, height, width]]) for height, width in sizes]
        return [{"pixel_values": pixels(int(g.prod()), 3 * 2 * 4 * 4), "image_grid_thw": g} for g in grids]
    if kind == "llava_onevision":
        sizes = [torch.tensor([[20, 14]]), torch.tensor([[30, 30]]), torch.tensor([[14, 30]]), torch.tensor([[9, 9]])]
        return [{"pixel_values": pixels(1, 5, 3, 16, 16), "image_sizes": size} for size in sizes[:number]]
    if kind in ("smolvlm", "idefics3"):
        masks = [torch.ones(1, 1, 16, 16, dtype=torch.long) for _ in range(number)]
        masks[0][..., 12:] = 0  # the first image has padding
        return [{"pixel_values": pixels(1, 1, 3, 16, 16), "pixel_attention_mask": mask} for mask in masks]
    return [{"pixel_values": pixels(1, 3, 16, 16)} for _ in range(number)]


def collate(model: torch.nn.Module, images: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Return the images of several rows as the processor of the model returns them."""
    flat = [image for own in images for image in own]
    if not flat:
        return {}
    if model.config.model_type in ("smolvlm", "idefics3"):  # padded to the row with most images
        width = max(map(len, images))
        batch = {}
        for name, example in flat[0].items():
            batch[name] = example.new_zeros(len(images), width, *example.shape[2:])
            for row, own in enumerate(images):
                for i, image in enumerate(own):
                    batch[name][row, i] = image[name][0, 0]
        return batch
    batch = {name: torch.cat([image[name] for image in flat]) for name in flat[0]}
    if model.config.model_type == "llava_onevision":
        batch["batch_num_images"] = torch.tensor([len(own) for own in images])
    return batch


def count_tokens(model: torch.nn.Module, images: list[dict[str, torch.Tensor]]) -> list[int]:
    """Return the number of placeholders of each image of a row, measured with the model's own tower."""
    if not images:
        return []
    with torch.no_grad():
        pooled = model.base_model.get_image_features(**collate(model, [images]), return_dict=True).pooler_output
    if model.config.model_type in ("smolvlm", "idefics3"):
        return [len(pooled[0]) // len(images)] * len(images)
    return [len(features) for features in pooled]
