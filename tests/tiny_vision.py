"""Small random vision-language models of many families with their processors, and images to train them on."""

import base64
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from tiny import chat_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

VISION_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 28  # pixels of the images that most models read
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

Parts = tuple[PreTrainedModel, ProcessorMixin]


def tiny_vlm(family: str) -> Parts:
    """Returns a small random model of one of FAMILIES, always with the same weights, and its processor."""
    torch.manual_seed(0)
    return FAMILIES[family]()


def tiny_llava() -> Parts:
    """Returns a model with 4 tokens per image of SIDE x SIDE pixels."""
    return tiny_vlm("llava")


def outspoken_llava() -> Parts:
    """Returns a LLaVA whose answers differ for each image, because its weights are large."""
    model, processor = tiny_llava()
    for parameter in model.parameters():
        parameter.data *= 10 if parameter.ndim > 1 else 1
    return model.eval(), processor


def plain_answer(model: Any, processor: Any, chat: list[dict[str, Any]], tokens: int) -> str:
    """Returns what transformers alone generates for a chat whose images have paths."""
    inputs = plain_inputs(processor, chat)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


def plain_inputs(processor: Any, chat: list[dict[str, Any]]) -> Any:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template([chat], **options)


def save_tiny_llava(folder: Path) -> Path:
    return save_tiny_vlm(folder, "llava")


def save_tiny_vlm(folder: Path, family: str) -> Path:
    return save(folder, *tiny_vlm(family))


def save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_image(path: Path, color: Any, size: tuple[int, int] = (SIDE, SIDE), seed: int | None = None) -> str:
    """Writes an image in one color, or with noise; returns its name."""
    image = PIL.Image.new("RGB", size, color)
    if seed is not None:
        noise = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3))
        image = PIL.Image.fromarray((np.asarray(image) // 2 + noise).astype(np.uint8))
    image.save(path)
    return path.name


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG file that claims this size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- Families


def _tokenizer(*tokens: str, **named: str) -> PreTrainedTokenizerBase:
    """named: tokens that the processor of a family reads as attributes of the tokenizer, such as image_token."""
    special: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if named:
        special["extra_special_tokens"] = named
    tokenizer = chat_tokenizer(["red green blue square"] * 4, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    return tokenizer


def _template(image: str) -> str:
    return VISION_CHATML.replace("IMAGE", image)


def _text(tokenizer: PreTrainedTokenizerBase, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **more,
    }


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llava() -> Parts:
    tokenizer, size = _tokenizer("<image>"), {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=14, projection_dim=16),
        text_config=transformers.LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _llava_next() -> Parts:
    tokenizer, size = _tokenizer("<image>"), {"height": SIDE, "width": SIDE}
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=grid),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=14, projection_dim=16),
        text_config=transformers.LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        image_grid_pinpoints=grid,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def _llava_onevision() -> Parts:
    tokenizer, size = _tokenizer("<image>", "<video>"), {"height": SIDE, "width": SIDE}
    grid = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE]]
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=_template("<image>"),
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=14, vision_use_head=False),
        text_config=transformers.Qwen2Config(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids([*QWEN]), strict=True))


def _qwen_processor(tokenizer: PreTrainedTokenizerBase, name: str, patch_size: int) -> ProcessorMixin:
    side = 2 * patch_size
    image_processor = transformers.Qwen2VLImageProcessor(
        patch_size=patch_size, size={"shortest_edge": side * side, "longest_edge": 8 * side * side}
    )
    videos = transformers.Qwen3VLVideoProcessor() if name == "Qwen3VL" else transformers.Qwen2VLVideoProcessor()
    template = _template("<|vision_start|><|image_pad|><|vision_end|>")
    processor: ProcessorMixin = getattr(transformers, f"{name}Processor")(
        image_processor, tokenizer, videos, chat_template=template
    )
    return processor


QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def _qwen2_vl() -> Parts:
    tokenizer = _tokenizer(*QWEN)
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    text = _text(tokenizer, rope_parameters=MROPE)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    return transformers.Qwen2VLForConditionalGeneration(config), _qwen_processor(tokenizer, "Qwen2VL", 14)


def _qwen2_5_vl() -> Parts:
    tokenizer = _tokenizer(*QWEN)
    vision = {**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 56}
    text = _text(tokenizer, rope_parameters=MROPE)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    return transformers.Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(tokenizer, "Qwen2_5_VL", 14)


def _qwen3_vl() -> Parts:
    tokenizer = _tokenizer(*QWEN)
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = _text(tokenizer, head_dim=8, rope_parameters=MROPE)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    return transformers.Qwen3VLForConditionalGeneration(config), _qwen_processor(tokenizer, "Qwen3VL", 16)


LOCAL_AND_FULL = ["sliding_attention", "full_attention"]


def _gemma3() -> Parts:
    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(**tokens)
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        image_seq_length=4,
        chat_template=_template("<start_of_image>"),
    )
    config = transformers.Gemma3Config(
        text_config=_text(
            tokenizer, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config={**VISION, "image_size": SIDE, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def _gemma4() -> Parts:
    names = ("image", "boi", "eoi", "audio", "boa", "eoa")
    tokenizer = _tokenizer(**{f"{name}_token": f"<|{name}|>" for name in names})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|video|>"]})
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer,
        transformers.Gemma4VideoProcessor(patch_size=4, pooling_kernel_size=2),
        image_seq_length=70,
        chat_template=_template("<|image|>"),
    )
    config = transformers.Gemma4Config(
        text_config=_text(
            tokenizer,
            head_dim=8,
            global_head_dim=8,
            layer_types=LOCAL_AND_FULL,
            sliding_window=16,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=len(tokenizer),
        ),
        vision_config={
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 256,
        },
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
    )
    return transformers.Gemma4ForConditionalGeneration(config), processor


def _idefics3(name: str = "Idefics3") -> Parts:
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokens = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *cells)
    named = {"fake_image_token": tokens[0], "image_token": tokens[1], "end_of_utterance_token": tokens[2]}
    tokenizer = _tokenizer(*tokens, **(named | {"global_image_token": tokens[3]} if name == "SmolVLM" else {}))
    images = getattr(transformers, f"{name}ImageProcessor")(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    videos = [] if name == "Idefics3" else [transformers.SmolVLMVideoProcessor()]
    processor = getattr(transformers, f"{name}Processor")(
        images, tokenizer, *videos, image_seq_len=1, chat_template=_template("<image>")
    )
    config = getattr(transformers, f"{name}Config")(
        text_config=transformers.LlamaConfig(**_text(tokenizer)),
        vision_config={**VISION, "image_size": SIDE, "patch_size": 14},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _internvl() -> Parts:
    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    tokenizer = _tokenizer(**{f"{name}_token": token for name, token in names.items()})
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=3, min_patches=1
        ),
        tokenizer,
        transformers.InternVLVideoProcessor(),
        image_seq_length=1,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**_text(tokenizer)),
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [14, 14]},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=1,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def _pixtral_processor(tokenizer: PreTrainedTokenizerBase, merge: int) -> ProcessorMixin:
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(patch_size={"height": 8, "width": 8}, size={"longest_edge": 64}),
        tokenizer,
        patch_size=8,
        spatial_merge_size=merge,
        chat_template=_template("[IMG]"),
    )


PIXTRAL_VISION = {**VISION, "head_dim": 8, "image_size": 64, "patch_size": 8}


def _mistral3() -> Parts:
    tokenizer = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**_text(tokenizer, head_dim=8)),
        vision_config=transformers.PixtralVisionConfig(**PIXTRAL_VISION),
        image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config), _pixtral_processor(tokenizer, 2)


def _pixtral() -> Parts:
    tokenizer = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**_text(tokenizer, head_dim=8)),
        vision_config=transformers.PixtralVisionConfig(**PIXTRAL_VISION),
        image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config), _pixtral_processor(tokenizer, 1)


def _glm4v() -> Parts:
    names = [f"<|{place}_of_{kind}|>" for kind in ("image", "video") for place in ("begin", "end")]
    tokenizer = _tokenizer("<|image|>", "<|video|>", *names)
    processor = transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(size={"shortest_edge": SIDE**2, "longest_edge": 8 * SIDE**2}),
        tokenizer,
        transformers.Glm4vVideoProcessor(),
        chat_template=_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    config = transformers.Glm4vConfig(
        text_config=_text(tokenizer, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": SIDE,
            "out_hidden_size": 32,
            "intermediate_size": 32,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        image_start_token_id=ids[names[0]],
        image_end_token_id=ids[names[1]],
        video_start_token_id=ids[names[2]],
        video_end_token_id=ids[names[3]],
    )
    return transformers.Glm4vForConditionalGeneration(config), processor


def _lfm2_vl() -> Parts:
    cells = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = _tokenizer("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *cells)
    processor = transformers.Lfm2VlProcessor(
        transformers.Lfm2VlImageProcessor(
            tile_size=32, encoder_patch_size=8, min_image_tokens=1, max_image_tokens=4, max_tiles=4
        ),
        tokenizer,
        chat_template=_template("<image>"),
    )
    config = transformers.Lfm2VlConfig(
        text_config=transformers.Lfm2Config(**_text(tokenizer, layer_types=["conv", "full_attention"])),
        vision_config=transformers.Siglip2VisionConfig(**VISION, patch_size=8, num_patches=16, vision_use_head=False),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=16,
    )
    return transformers.Lfm2VlForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], Parts]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "internvl": _internvl,
    "mistral3": _mistral3,
    "pixtral": _pixtral,
    "glm4v": _glm4v,
    "lfm2_vl": _lfm2_vl,
}


# ---- Processors that are not supported


def paligemma_processor() -> ProcessorMixin:
    """Moves BOS behind the images and writes a newline after the text."""
    tokenizer = _tokenizer("<image>")
    tokenizer.bos_token = "<|im_start|>"
    images = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, image_seq_length=4)
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, tokenizer, chat_template=_template("<image>"))


def mllama_processor() -> ProcessorMixin:
    """Returns a mask of which text attends to which image."""
    tokenizer = _tokenizer("<|image|>", "<|python_tag|>")
    tokenizer.bos_token = "<|im_start|>"
    images = transformers.MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, max_image_tiles=2)
    return transformers.MllamaProcessor(images, tokenizer, chat_template=_template("<|image|>"))
