"""A tiny language, a tiny Llama pretrained on it, and arms that learn a changed version of it (tiny_lm.py).

The language is an order-2 Markov table: the next word depends on the two before it. The new task replaces the
probabilities of a quarter of the contexts; the others must be kept. Since all probabilities are known, so is the lowest
possible loss (`lowest_loss`).
"""

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tailora import LoRAConfig, LoRAModel

WORDS, END = 32, 32  # words 0..31, and the end of a text
LENGTH = 64  # tokens of a text, the end included
SHARPNESS = 2.5  # standard deviation of the logits of the table
REPLACED = 0.25  # share of the contexts whose probabilities are new
BATCH = 16  # texts a step
WARM_UP = 0.05  # share of the steps; then a cosine
ALPHA = 32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
RANKS = (1, 2, 4, 8, 16, 32, 64)

Arm = Mapping[str, Any] | None  # settings of LoRAConfig in addition to alpha; None is full fine-tuning
ARMS: dict[str, Arm] = {
    **{f"r{r}": {"r": r} for r in RANKS},
    "attention": {"r": 15, "target_modules": ATTENTION},  # 15 (64 + 64) 4 parameters a layer
    "mlp": {"r": 8, "target_modules": MLP},  # as many: 8 (64 + 256) 3
    "dora": {"r": 8, "use_dora": True},
    "pissa": {"r": 8, "init_lora_weights": "pissa"},
    "full": None,
}


# ---- The language


@cache
def table() -> Tensor:
    """Returns (words, words, words): the probability of the third word after the first two."""
    return _random_table(0)


@cache
def new_table() -> Tensor:
    """Returns the table with other probabilities for a quarter of the contexts."""
    is_new = torch.rand(WORDS, WORDS, generator=torch.Generator().manual_seed(2)) < REPLACED
    return torch.where(is_new[..., None], _random_table(1), table())


def _random_table(seed: int) -> Tensor:
    logits = torch.randn(WORDS, WORDS, WORDS, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(SHARPNESS * logits, -1)


def texts(language: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns (count, LENGTH) ids: two random words, then words by the table, and the end."""
    cumulative = language.flatten(0, 1).cumsum(-1)  # (contexts, words)
    ids = torch.full((count, LENGTH), END)
    ids[:, :2] = torch.randint(WORDS, (count, 2), generator=generator)
    for i in range(2, LENGTH - 1):
        rows = cumulative[ids[:, i - 2] * WORDS + ids[:, i - 1]]
        uniform = torch.rand(count, 1, generator=generator)
        ids[:, i] = torch.searchsorted(rows, uniform)[:, 0].clamp(max=WORDS - 1)
    return ids


def lowest_loss(language: Tensor, ids: Tensor) -> float:
    """Returns nats per predicted token of a model that knows the table and when the end comes.

    The first word is given; the second can only be guessed.
    """
    by_table = -language[ids[:, :-3], ids[:, 1:-2], ids[:, 2:-1]].log()  # (count, LENGTH - 3)
    second = torch.tensor(float(WORDS)).log() * len(ids)
    return float((by_table.sum() + second) / (len(ids) * (LENGTH - 1)))


def held_out(count: int = 512) -> Tensor:
    return texts(new_table(), count, torch.Generator().manual_seed(3))


# ---- The model


def pretrained(steps: int, rate: float = 3e-3, batch: int = 2 * BATCH) -> LlamaForCausalLM:
    """Returns a model that was trained on the first table."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config())
    train(model, list(model.parameters()), table(), rate, steps, seed=0, batch=batch)
    return model.eval()


def model_config() -> LlamaConfig:
    sizes = {**SIZES, "max_position_embeddings": 4 * LENGTH, "tie_word_embeddings": False}
    return LlamaConfig(vocab_size=WORDS + 1, bos_token_id=None, eos_token_id=END, **sizes)


def train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    language: Tensor,
    rate: float,
    steps: int,
    *,
    seed: int,
    batch: int = BATCH,
) -> None:
    """AdamW on new texts in every step, without weight decay, with clipping at 1, warm-up and cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False, final_div_factor=1e9
    )
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(steps):
        loss(model, texts(language, batch, generator)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns nats per predicted token, 0-dimensional."""
    mean: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return mean


def train_arm(base: LlamaForCausalLM, arm: Arm, rate: float, steps: int, seed: int = 0) -> nn.Module:
    """Returns a copy of the base that was trained on the new table."""
    model: nn.Module = copy.deepcopy(base)
    torch.manual_seed(seed)
    if arm is not None:
        model = LoRAModel(model, LoRAConfig(lora_alpha=ALPHA, **arm))
    trained = model.parameters() if arm is None else model.lora_layers.parameters()
    train(model.train(), list(trained), new_table(), rate, steps, seed=seed)
    return model.eval()


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    return float(loss(model, held_out()))


def trainable_parameters(base: LlamaForCausalLM, arm: Arm) -> int:
    if arm is None:
        return sum(parameter.numel() for parameter in base.parameters())
    return LoRAModel(copy.deepcopy(base), LoRAConfig(lora_alpha=ALPHA, **arm)).summary().trainable_parameters


# ---- Files for the commands


def write_folder(base: LlamaForCausalLM, folder: Path, train_texts: int, eval_texts: int) -> None:
    """Writes model/ with its tokenizer, train.jsonl and eval.jsonl of the new table, and old.jsonl of the first."""
    base.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    files = {"train": (new_table(), train_texts), "eval": (new_table(), eval_texts), "old": (table(), 64)}
    for seed, (name, (language, count)) in enumerate(files.items(), start=10):
        ids = texts(language, count, torch.Generator().manual_seed(seed))
        rows = [json.dumps({"text": " ".join(f"w{word}" for word in row[:-1])}) for row in ids.tolist()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of the words w0, w1, ... and the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {**{f"w{i}": i for i in range(WORDS)}, "<end>": END}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
