"""An embedding model, with the trainer of sentence-transformers (pip install 'tailora[examples]').

    python examples/embedding.py --output-dir out

The model learns to find the German translations of English phrases. The training triplets are (phrase, translation,
different translation); retrieval is measured on held-out pairs. The base model is a BERT with random weights, so
nothing has to be downloaded. To use one from the Hub, load it with SentenceTransformer("owner/name").
"""

import argparse
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tailora import LoRAConfig, LoRAModel
from tailora.train.huggingface import adapting

ADJECTIVES = "red rot, small klein, old alt, fast schnell, loud laut, warm heiter, young jung, round rund, cheap billig"
NOUNS = "dog hund, house haus, tree baum, book buch, car auto, bread brot, chair stuhl, window fenster, bird vogel"
PAIRS = [
    tuple(f"{adjective} {noun}" for adjective, noun in zip(first.split(), second.split(), strict=True))
    for first in ADJECTIVES.split(", ")
    for second in NOUNS.split(", ")
]  # ("red dog", "rot hund"), ...


def tiny_model() -> SentenceTransformer:
    """Returns a BERT with random weights and mean pooling."""
    words = sorted({word for pair in PAIRS for phrase in pair for word in phrase.split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with TemporaryDirectory() as folder:
        BertModel(BertConfig(vocab_size=len(vocabulary), **sizes), add_pooling_layer=False).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(folder), Pooling(sizes["hidden_size"])], device="cpu")


def retrieval(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> float:
    """Returns the share of phrases whose nearest translation, among all, is the right one."""
    queries = model.encode([english for english, _ in pairs], convert_to_tensor=True)
    documents = model.encode([german for _, german in PAIRS], convert_to_tensor=True)
    nearest = util.cos_sim(queries, documents).argmax(dim=1).tolist()
    return sum(PAIRS[index] == pair for index, pair in zip(nearest, pairs, strict=True)) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter for an embedding model.")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=60)
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    pairs = random.sample(PAIRS, len(PAIRS))
    held_out, seen = pairs[:25], pairs[25:]
    triplets = [{"anchor": a, "positive": p, "negative": random.choice(seen)[1]} for a, p in seen]
    base_model = tiny_model()
    before = retrieval(base_model, held_out)
    model = LoRAModel(base_model, LoRAConfig(r=8))
    settings = {"max_steps": options.max_steps, "learning_rate": 1e-2, "per_device_train_batch_size": 28}
    trainer = adapting(SentenceTransformerTrainer)(
        model=model,
        args=SentenceTransformerTrainingArguments(options.output_dir, **settings, report_to=[], save_strategy="no"),
        train_dataset=Dataset.from_list(triplets),
        loss=MultipleNegativesRankingLoss(base_model),
    )
    trainer.train()
    trainer.save_model()  # writes the adapter as a PEFT folder
    print(f"right translation found: {before:.0%} before, {retrieval(base_model, held_out):.0%} after")
    merged = model.merge_and_unload()  # a plain sentence-transformers model
    merged.save_pretrained(str(Path(options.output_dir) / "merged"))


if __name__ == "__main__":
    main()
