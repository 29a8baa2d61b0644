"""Small vision-language models, processors and step pairs with images. Needs neither torchvision nor a model hub."""

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Gemma3Processor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .tiny import byte_level_tokenizer

TEXT_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def vision_chat_template(placeholder: str) -> str:
    """Return a ChatML template that accepts only lists of parts, and writes a placeholder for each image."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}" + placeholder + "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def vision_tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with special tokens for images."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """Processor of Qwen2.5-VL without the video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen2_5_vl_processor() -> ProcessorMixin:
    """Return a processor whose images take 4 to 16 tokens, as their size says."""
    tokenizer = vision_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 256, "longest_edge": 1024}
    )
    template = vision_chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    return ImageOnlyQwenProcessor(images, tokenizer, chat_template=template)


def qwen2_5_vl_model(processor: ProcessorMixin, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Return a Qwen2.5-VL of two layers, with windowed and full attention in its vision tower."""
    tokenizer = processor.tokenizer
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT_SIZES,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 16,
            "out_hidden_size": TEXT_SIZES["hidden_size"],
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).float()


def llava_processor() -> ProcessorMixin:
    """Return a processor whose images take 9 tokens."""
    tokenizer = vision_tokenizer("<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=vision_chat_template("<image>\n"),
        num_additional_image_tokens=1,
    )


def llava_model(processor: ProcessorMixin, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a LLaVA 1.5 of two layers."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT_SIZES),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=12,
            patch_size=4,
            projection_dim=16,
            initializer_range=0.2,
            initializer_factor=5.0,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).float()


# Functions that create a processor, and a model for it
VISION_MODELS = {
    "qwen2_5_vl": (qwen2_5_vl_processor, qwen2_5_vl_model),
    "llava": (llava_processor, llava_model),
}


def idefics3_processor() -> ProcessorMixin:
    """Return a processor that splits images into tiles, and pads their number in a batch."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(
        images, vision_tokenizer(*special, *tiles), image_seq_len=4, chat_template=vision_chat_template("<image>")
    )


def gemma3_processor() -> ProcessorMixin:
    """Return a processor with other placeholders in the text than in the tokens, and with token types."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = vision_tokenizer(*names.values())
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    template = vision_chat_template("<start_of_image>")
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


def llava_next_processor() -> ProcessorMixin:
    """Return a processor whose images take several patches, by their aspect ratio."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 12},
        crop_size={"height": 12, "width": 12},
        image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
    )
    return LlavaNextProcessor(
        images,
        vision_tokenizer("<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=vision_chat_template("<image>\n"),
    )


# Functions that create a processor, for tests without a model
PROCESSORS = {
    **{name: processor for name, (processor, _) in VISION_MODELS.items()},
    "gemma3": gemma3_processor,
    "idefics3": idefics3_processor,
    "llava_next": llava_next_processor,
}


def make_image(seed: int = 0, width: int = 20, height: int = 16) -> Image.Image:
    """Return an image of random colors."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def vision_step_rows(number: int = 6) -> list[dict]:
    """Return step pairs with 0, 1 or 2 images of several sizes."""
    return [
        {
            "prompt": f"How many bars are higher than {i}?",
            "images": [make_image(10 * i + k, 16 + 8 * k, 16 + 8 * (i % 2)) for k in range(i % 3)],
            "initial_reason_steps": f"Step 1: there are {i} bars\nStep 2:" if i % 2 else "",
            "chosen": f" {i} of them" + " indeed" * (i % 2),
            "rejected": f" {i + 1} of them",
        }
        for i in range(1, number + 1)
    ]


def vision_plain_rows(number: int = 6) -> list[dict]:
    """Return ordinary preference pairs with 1 or 2 images of several sizes, as messages."""
    return [
        {
            "prompt": [{"role": "user", "content": f"How many bars are higher than {i}?"}],
            "images": [make_image(10 * i + k, 16 + 8 * k, 16 + 8 * (i % 2)) for k in range(1 + i % 2)],
            "chosen": [{"role": "assistant", "content": f"There are {i} of them." + " Indeed." * (i % 2)}],
            "rejected": [{"role": "assistant", "content": f"{i + 1}"}],
        }
        for i in range(1, number + 1)
    ]
