"""Tiny vision-language models of many architectures, and batches for them as their processors create them."""

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from ..tiny import byte_level_tokenizer
from .architectures import EXPERTS, MIXED, SIZE, VOCABULARY

PLACEHOLDER = VOCABULARY - 1  # id of the placeholder token
TEXT = {**SIZE, "num_hidden_layers": 3}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IDS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": PLACEHOLDER - 1,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
}
QWEN = {
    **IDS,
    "text_config": {**TEXT, "rope_parameters": ROPE},
}
PATCH = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN3 = {
    **PATCH,
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.2,
}
ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
LLAVA = {
    "image_token_index": PLACEHOLDER,
    "image_token_id": PLACEHOLDER,
    "text_config": {**TEXT, "model_type": "llama"},
}
TILES = {
    "image_token_id": PLACEHOLDER,
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
    "qwen3_vl": {**QWEN, "vision_config": QWEN3},
    "qwen3_vl_moe": {**QWEN, "text_config": {**QWEN["text_config"], **EXPERTS}, "vision_config": QWEN3},
    "llava": {**LLAVA, "vision_config": {"model_type": "clip_vision_model", **ENCODER}, "vision_feature_layer": -2},
    "llava_onevision": {
        **LLAVA,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {"model_type": "siglip_vision_model", **ENCODER, "vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
    },
    "gemma3": {
        "image_token_index": PLACEHOLDER,
        "mm_tokens_per_image": 4,
        "text_config": {**TEXT, **MIXED, "layer_types": [*MIXED["layer_types"], "sliding_attention"]},
        "vision_config": {"model_type": "siglip_vision_model", **ENCODER, "vision_use_head": False},
    },
    "smolvlm": TILES,
    "idefics3": TILES,
    "internvl": {
        "image_token_id": PLACEHOLDER,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**ENCODER, "image_size": [16, 16], "patch_size": [4, 4]},
        "vision_feature_layer": -1,
        "downsample_ratio": 0.5,
    },
}

# Without prefix sharing
OTHER = {
    "aya_vision": {
        **LLAVA,
        "text_config": {**TEXT, "model_type": "cohere2"},
        "vision_config": {"model_type": "siglip_vision_model", **ENCODER, "vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "glm4v": {
        **QWEN,
        "vision_config": {**PATCH, "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
        | {"out_hidden_size": 32, "image_size": 32},
    },
    "qwen3_5": {
        **QWEN,
        "text_config": {
            **QWEN["text_config"],
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": {name: value for name, value in QWEN3.items() if "deepstack" not in name},
    },
}


def tiny_vision_model(name: str, seed: int = 0, **options) -> torch.nn.Module:
    """Create a model in float32, with weights large enough for its probabilities to differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**{**VISION, **OTHER}[name], **options})
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

    if "qwen" in kind or kind == "glm4v":
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


VISION_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Processor of Qwen2.5-VL without videos, whose processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen_processor() -> ImageTextProcessor:
    """Create a processor of Qwen2.5-VL for images of 16 to 256 patches of 4 x 4 pixels."""
    tokenizer = byte_level_tokenizer(VISION_CHATML)
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    size = {"shortest_edge": 16 * 4**2, "longest_edge": 256 * 4**2}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    return ImageTextProcessor(images, tokenizer, chat_template=VISION_CHATML)


def qwen_model(processor: ImageTextProcessor, seed: int = 0) -> torch.nn.Module:
    """Create a Qwen2.5-VL for the tokens of a processor."""
    tokenizer = processor.tokenizer
    text = {**QWEN["text_config"], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    names = ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names}
    return tiny_vision_model("qwen2_5_vl", seed, text_config=text, **ids)


def llava_processor() -> LlavaProcessor:
    """Create a processor of LLaVA for images of 4 x 4 patches, which `AutoProcessor` loads without torchvision."""
    chat_template = VISION_CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    tokenizer = byte_level_tokenizer(chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,
    )


def save_llava(path: str, seed: int = 0) -> str:
    """Save a tiny LLaVA and its processor, and return the path."""
    processor = llava_processor()
    tokenizer = processor.tokenizer
    text = {**LLAVA["text_config"], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id}
    ids = dict.fromkeys(("image_token_id", "image_token_index"), tokenizer.convert_tokens_to_ids("<image>"))
    tiny_vision_model("llava", seed, text_config=text, **ids).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def vision_rows(number: int = 6) -> list[dict]:
    """Return preference pairs with zero to two images, where the first two pairs have the same problem."""
    generator = np.random.default_rng(0)

    def draw(width: int, height: int) -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))

    images = [draw(16, 16), draw(32, 16), draw(16, 16), draw(24, 40)]
    own = [[0], [0], [2], [], [1, 3], [3]]
    rows = []
    for i in range(number):
        rows.append(
            {
                "images": [images[k] for k in own[i % 6]],
                "prompt": [{"role": "user", "content": "What is this?" + " Please." * (i % 6 > 2)}],
                "chosen": [{"role": "assistant", "content": f"The answer is {i}."}],
                "rejected": [{"role": "assistant", "content": f"Step 1: 12 + {i}"}],
            }
        )
    return rows
