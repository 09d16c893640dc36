"""Small random vision-language models with their processors."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tiny import chat_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

VISION_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 28  # pixels of the images that the models read


def tiny_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Returns a LLaVA with 4 tokens per image, which reads images of SIDE x SIDE pixels."""
    tokenizer = chat_tokenizer(["red green blue square"] * 4, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VISION_CHATML,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), processor


def outspoken_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Returns a LLaVA whose answers differ for each image, because its weights are large."""
    model, processor = tiny_llava()
    for parameter in model.parameters():
        parameter.data *= 10 if parameter.ndim > 1 else 1
    return model.eval(), processor


def plain_answer(model: Any, processor: Any, chat: list[dict[str, Any]], tokens: int) -> str:
    """Returns what transformers alone generates for a chat whose images have paths."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template([chat], **options)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


def save_tiny_llava(folder: Path) -> Path:
    return save(folder, *tiny_llava())


def save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def save_image(path: Path, color: Any, size: tuple[int, int] = (SIDE, SIDE), seed: int | None = None) -> str:
    """Writes an image in one color, or with noise; returns its name."""
    image = PIL.Image.new("RGB", size, color)
    if seed is not None:
        noise = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3))
        image = PIL.Image.fromarray((np.asarray(image) // 2 + noise).astype(np.uint8))
    image.save(path)
    return path.name
