"""A small BART that restores capitals and punctuation, and chats to adapt it to.

It is trained here, from random weights on film reviews, so that no model has to be fetched; once, in tailora's cache
folder. A row is the first words of a review's sentence, or of a message of the demo's chats.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.studies.snippets import fetch_package, table, write_rows
from tailora.core.cache import cache_folder
from tailora.data.demo import build_once, data_folder

WORDS = 12  # of a row, at most
START, END = "<s>", "</s>"  # the decoder begins with the first, which is also the padding; texts end with the second
SIZES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"vocab_size": 1500, "d_model": 128, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
IDS = {"pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
TRAINING = ["--dtype=float32", "--learning-rate=2e-3", "--per-device-train-batch-size=32", "--num-train-epochs=6"]


def capitals_folder() -> Path:
    """Returns the folder of base/ (the model), train.jsonl and eval.jsonl (chats), reviews.jsonl. Raises FetchError."""
    return build_once(cache_folder() / "benchmarks-3" / "capitals", build)


def build(folder: Path) -> None:
    for name in ("train", "eval"):
        lines = (data_folder() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        messages = [message["content"] for line in lines for message in json.loads(line)["messages"]]
        write_rows(folder / f"{name}.jsonl", rows_of(messages))
    reviews = [line.split("\t", maxsplit=2)[2] for line in table(fetch_package(folder)).splitlines()]
    rows = rows_of(sentence for review in reviews for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z'])", review))
    write_rows(folder / "reviews.jsonl", rows)
    random, run = folder / "random", folder / "run"
    begin(random, [text for row in rows for text in row.values()])
    data = ["--model", str(random), "--data", str(folder / "reviews.jsonl"), "--output-dir", str(run)]
    command = [sys.executable, "-m", "tailora.cli", "train", "--task", "seq2seq", "--method", "full", *TRAINING, *data]
    subprocess.run(command, stdout=sys.stderr, check=True)
    (run / "model").rename(folder / "base")
    shutil.rmtree(run)
    shutil.rmtree(random)


def rows_of(texts: Iterable[str]) -> list[dict[str, str]]:
    """Returns each text, and before it what is left without capitals and punctuation. Only ASCII is kept."""
    rows = []
    for text in texts:
        text = " ".join(re.sub(r"[^ -~]", " ", text).split()[:WORDS])
        bare = " ".join(re.sub(r"[^\w\s]", "", text).lower().split())
        if bare:
            rows.append({"prompt": bare, "completion": text})
    return rows


def begin(folder: Path, texts: list[str]) -> None:
    """Writes a model of random weights, and a tokenizer of these texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WIDTHS["vocab_size"],
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=START, bos_token=START, eos_token=END, model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BartConfig(
        **SIZES, **WIDTHS, **IDS, forced_eos_token_id=None, max_position_embeddings=128, dropout=0.0, init_std=0.05
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
