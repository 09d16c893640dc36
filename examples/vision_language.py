"""A vision-language model that learns to name colors, with TRL's SFTTrainer (pip install 'tailora[examples]').

    python examples/vision_language.py --output-dir out

The model is a LLaVA with random weights, so nothing has to be downloaded. To use one from the Hub, load it with
AutoModelForImageTextToText and AutoProcessor. Set HF_HUB_DISABLE_TELEMETRY=1 to keep TRL from reporting its use.
"""

import argparse
import random

import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from tailora import LoRAConfig, LoRAModel
from tailora.train.huggingface import adapting

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 50)}
TEMPLATE = """{%- for message in messages %}{{ message['role'] }} {% for part in message['content'] %}
{%- if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}assistant {% endif %}"""


def tiny_model() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    words = ["<pad>", "<eos>", "<image>", "user", "assistant", "which", "color", *COLORS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "extra_special_tokens": {"image_token": "<image>"}}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)
    patches = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = LlavaProcessor(images, tokenizer, **patches, chat_template=TEMPLATE)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.2),
        text_config=LlamaConfig(**sizes, vocab_size=len(words), pad_token_id=0, eos_token_id=1, initializer_range=0.2),
        image_token_index=2,
    )
    return LlavaForConditionalGeneration(config), processor


def example(name: str) -> dict[str, object]:
    shade = tuple(min(max(value + random.randint(-30, 30), 0), 255) for value in COLORS[name])
    return {
        "images": [Image.new("RGB", (16, 16), shade)],
        "prompt": [{"role": "user", "content": "which color"}],
        "completion": [{"role": "assistant", "content": name}],
    }


def accuracy(model: LoRAModel, processor: LlavaProcessor, names: list[str]) -> float:
    """Returns the share of new images whose color the model names correctly."""
    inputs = processor(
        [example(name)["images"] for name in names],
        ["user <image> which color assistant"] * len(names),
        return_tensors="pt",
    )
    ids = model.eval().generate(**inputs.to(model.device), max_new_tokens=1, do_sample=False)
    answers = processor.batch_decode(ids[:, -1:])
    return sum(answer.strip() == name for answer, name in zip(answers, names, strict=True)) / len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter for a vision-language model.")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=40)
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    base_model, processor = tiny_model()
    model = LoRAModel(base_model, LoRAConfig(r=8))
    names = [*COLORS] * 16
    before = accuracy(model, processor, names)
    settings = {"max_steps": options.max_steps, "learning_rate": 5e-3, "per_device_train_batch_size": 16}
    trainer = adapting(SFTTrainer)(
        model=model,
        args=SFTConfig(options.output_dir, **settings, max_length=None, bf16=False, report_to=[], save_strategy="no"),
        train_dataset=Dataset.from_list([example(name) for name in names]),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()  # writes the adapter as a PEFT folder
    print(f"colors named correctly: {before:.0%} before, {accuracy(model, processor, names):.0%} after")


if __name__ == "__main__":
    main()
