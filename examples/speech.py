"""Speech to text with a small Whisper model and the Seq2SeqTrainer of transformers.

    python examples/speech.py --output-dir out

The audio is synthetic: each word is a tone, and an utterance has three words and noise. The model has random weights,
so nothing has to be downloaded. To use one from the Hub, load it with WhisperForConditionalGeneration.from_pretrained,
and use its WhisperProcessor.
"""

import argparse

import numpy as np
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tailora import LoRAConfig, LoRAModel
from tailora.train.huggingface import adapting

RATE = 16_000  # samples per second
TONES = [300, 600, 1200, 2400]  # Hz; word k has token FIRST_WORD + k
PAD, END, START, FIRST_WORD = 0, 1, 2, 3
WORDS = 3  # per utterance
EXTRACTOR = WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1)


def utterances(count: int, random: np.random.Generator) -> list[dict[str, torch.Tensor]]:
    """Returns log-mel spectrograms of one second each, (16, 100), and the token ids of their words."""
    rows = []
    time = np.arange(RATE // WORDS) / RATE
    for words in random.integers(len(TONES), size=(count, WORDS)):
        audio = np.concatenate([np.sin(2 * np.pi * TONES[word] * time) for word in words])
        audio += 0.1 * random.standard_normal(len(audio))
        features = EXTRACTOR(audio, sampling_rate=RATE, return_tensors="pt").input_features[0]
        labels = torch.tensor([*(words + FIRST_WORD), END])
        rows.append({"input_features": features, "labels": labels})
    return rows


def tiny_model() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=FIRST_WORD + len(TONES),
        num_mel_bins=EXTRACTOR.feature_size,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,  # half of the spectrogram's frames
        max_target_positions=8,
        init_std=0.1,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


@torch.no_grad()
def word_accuracy(model: LoRAModel, rows: list[dict[str, torch.Tensor]]) -> float:
    """Returns the share of words that the model generates correctly."""
    features = torch.stack([row["input_features"] for row in rows])
    ids = model.eval().generate(input_features=features, max_new_tokens=WORDS, min_new_tokens=WORDS, do_sample=False)
    words = torch.stack([row["labels"][:WORDS] for row in rows])
    return float((ids[:, -WORDS:] == words).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter for a speech model.")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=70)
    options = parser.parse_args()
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = LoRAModel(tiny_model(), LoRAConfig(r=16))
    held_out = utterances(50, random)
    before = word_accuracy(model, held_out)
    settings = {"max_steps": options.max_steps, "learning_rate": 5e-3, "per_device_train_batch_size": 32}
    trainer = adapting(Seq2SeqTrainer)(
        model=model,
        args=Seq2SeqTrainingArguments(options.output_dir, **settings, report_to=[], save_strategy="no"),
        train_dataset=utterances(400, random),
    )
    trainer.train()
    trainer.save_model()  # writes the adapter as a PEFT folder
    print(f"words recognized: {before:.0%} before, {word_accuracy(model, held_out):.0%} after")


if __name__ == "__main__":
    main()
