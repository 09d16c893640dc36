"""The settings of evidence.py: two models and three data sets, and the studies that are made of each.

    markov    the tiny model of markov.py; a quarter of its language's contexts are new
    reviews   the demo's model; film reviews as plain texts (snippets.py)
    chats     the demo's model; the demo's chats
    letters   the demo's model; answers with the first letter of a word, by rewards

A study is what `tailora compare --config STUDY.yaml` gets. All studies of a setting share their plain arm, LoRA with
r = 8 and alpha = 16 on every linear layer, and "attention" and "mlp" train about as many parameters as that arm.
Learning rates are where an arm's search begins.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies import markov
from benchmarks.studies.snippets import labelled_folder
from tailora.data.demo import eval_file

Study = dict[str, Any]  # settings of TrainConfig and CompareConfig, as in a YAML file
PLAIN, FULL = "lora", "full"
TRIES = 6  # learning rates of an arm at most; 5 if the first is at most two octaves from the best one
TEXTS, FEW_TEXTS, HELD_OUT_TEXTS = 1280, 64, 240  # of the tiny model
REVIEWS, HELD_OUT_REVIEWS = 96, 120
CHAT_STEPS, HELD_OUT_CHATS = 16, 60
OTHER_CHATS = 4  # on which it is measured what learning from the reviews has changed
PROMPTS = {"markov": (600, 160), "letters": (200, 64)}  # for rewards, and held out
TINY, DEMO = ("markov",), ("reviews", "chats", "letters")
MODEL_OF = {
    **dict.fromkeys(TINY, "tiny model"),
    **dict.fromkeys(DEMO, "SmolLM2-135M-Instruct"),
    "tiny_lm": "tiny model",
}
STUDIES = {  # setting -> its studies, the most important first
    "markov": ("full", "few", "loraplus", "alpha", "batch", "rslora", "layers", "dora", "pissa", "rewards"),
    "reviews": ("rank", "dora", "layers", "loraplus", "pissa", "alpha", "rslora", "full", "batch"),
    "chats": ("rank", "layers", "dora", "pissa", "loraplus", "full"),
    "letters": ("rewards",),
}
COMMON: dict[str, Study] = {
    "reviews": {"model": "demo", "per_device_train_batch_size": 4, "num_train_epochs": 1, "max_length": 128},
    "chats": {"model": "demo", "per_device_train_batch_size": 4, "max_steps": CHAT_STEPS, "max_length": 128},
    "letters": {"model": "demo"},
}
TINY_COMMON = {"model": "model", "per_device_train_batch_size": markov.BATCH, "num_train_epochs": 1, "dtype": "float32"}
REWARDS = {"task": "grpo", "reward": ["rewards.py:score"], "data": "prompts.jsonl", "eval_data": "held_out.jsonl"}
REWARDS |= {"num_generations": 8}
REWARDS_OF = {
    "markov": {"per_device_train_batch_size": 8, "max_completion_length": 8, "max_steps": 60, "seeds": 5},
    "letters": {
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "max_steps": 10,
        "seeds": 3,
        "workers": 3,
    },
}
LARGE_BATCH = 4  # times the batch, and a quarter of the steps
ATTENTION_RANKS = {"tiny model": 23, "SmolLM2-135M-Instruct": 21}
MLP_RANKS = {"tiny model": 12, "SmolLM2-135M-Instruct": 13}


def study(setting: str, name: str, *, quick: bool = False) -> Study:
    """Returns the settings of one study. quick: a few steps, to see that it works."""
    is_tiny = setting in TINY
    data = "demo" if setting == "chats" else "train.jsonl"
    common = {**(TINY_COMMON if is_tiny else COMMON[setting]), "data": data, "eval_data": "eval.jsonl"}
    common |= {"r": 8, "lora_alpha": 16.0, "seeds": 3 if name in ("full", "few") else 2, "rate_tries": TRIES}
    if setting != "chats":
        common["forgetting_data"] = "old.jsonl"
    if name == "few":
        common |= {"data": "few.jsonl", "num_train_epochs": TEXTS // FEW_TEXTS}
    if name == "rewards":
        common = {key: value for key, value in common.items() if key != "num_train_epochs"}
        common |= REWARDS | REWARDS_OF[setting]
    if name == "batch":
        common["per_device_train_batch_size"] *= LARGE_BATCH
    if quick:
        common |= {"max_steps": 2, "rate_tries": 1, "seeds": 2}
    return {**common, "arms": arms(name, MODEL_OF[setting])}


def arms(name: str, model: str) -> dict[str, dict[str, Any]]:
    """Returns the arms of a study, the one that the others are compared with first."""
    first = (lambda octave: 2.0 ** (octave + 2)) if model == "tiny model" else (lambda octave: 2.0**octave)
    plain = {"learning_rate": first(-9)}
    return {
        "full": {FULL: {"method": "full", "learning_rate": first(-12)}, PLAIN: plain},
        "batch": {FULL: {"method": "full", "learning_rate": first(-11)}, PLAIN: {"learning_rate": first(-8)}},
        "dora": {PLAIN: plain, "dora": {"use_dora": True, "learning_rate": first(-9)}},
        "pissa": {PLAIN: plain, "pissa": {"init_lora_weights": "pissa", "learning_rate": first(-10)}},
        "loraplus": {PLAIN: plain, "loraplus": {"loraplus_lr_ratio": 16.0, "learning_rate": first(-11)}},
        "rank": {"r64": {"r": 64, "learning_rate": first(-8)}, "r1": {"r": 1, **plain}},
        "few": {
            "r64": {"r": 64, "learning_rate": first(-9)},
            PLAIN: {"learning_rate": first(-10)},
            "r1": {"r": 1, "learning_rate": first(-10)},
        },
        "layers": {
            PLAIN: plain,
            "attention": {"target_modules": markov.ATTENTION, "r": ATTENTION_RANKS[model], "learning_rate": first(-8)},
            "mlp": {"target_modules": markov.MLP, "r": MLP_RANKS[model], "learning_rate": first(-9)},
        },
        "alpha": {
            PLAIN: plain,
            "alpha-r": {"lora_alpha": 8.0, "learning_rate": first(-8)},
            "alpha-16r": {"lora_alpha": 128.0, "learning_rate": first(-11)},
        },
        "rewards": {
            FULL: {"method": "full", "learning_rate": first(-14)},
            "r16": {"r": 16, "learning_rate": first(-10)},
            "r1": {"r": 1, "learning_rate": first(-12)},
        },
        "rslora": {
            "r64": {"r": 64, "learning_rate": first(-8)},
            "rslora": {"r": 64, "use_rslora": True, "learning_rate": first(-9)},
        },
    }[name]


# ---- Files


def write_setting(setting: str, folder: Path, *, base_steps: int) -> None:
    """Writes the data of a setting, and the tiny model, into a folder, where the commands are typed."""
    folder.mkdir(parents=True)
    if setting in TINY:
        write_tiny(folder, base_steps)
    elif setting == "letters":
        write_letters(folder)
    elif setting == "reviews":
        for name, count in (("train", REVIEWS), ("eval", HELD_OUT_REVIEWS)):
            lines = (labelled_folder() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            write_texts(folder / f"{name}.jsonl", [json.loads(line)["text"] for line in lines])
    if setting in DEMO:
        file, count = ("eval", HELD_OUT_CHATS) if setting == "chats" else ("old", OTHER_CHATS)
        chats = eval_file().read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{file}.jsonl").write_text("\n".join(chats) + "\n", encoding="utf-8")


def write_tiny(folder: Path, base_steps: int) -> None:
    from benchmarks.studies.tiny_lm import base_model

    base_model(base_steps).save_pretrained(folder / "model")
    markov.tokenizer().save_pretrained(folder / "model")
    counts = {"train": TEXTS, "few": FEW_TEXTS, "eval": HELD_OUT_TEXTS, "old": 64}
    for seed, (name, count) in enumerate(counts.items(), start=20):
        generator = torch.Generator().manual_seed(seed)
        ids = markov.texts(markov.table() if name == "old" else markov.new_table(), count, generator)
        write_texts(folder / f"{name}.jsonl", [" ".join(f"w{word}" for word in row[:-1]) for row in ids.tolist()])
    prompts = markov.texts(markov.new_table(), sum(PROMPTS["markov"]), torch.Generator().manual_seed(30))
    rows = [{"prompt": " ".join(f"w{word}" for word in row[:8])} for row in prompts.tolist()]
    write_prompts("markov", folder, rows, f"LIKELY = {markov.new_table().argmax(-1).tolist()}{REWARD_OF_WORDS}")


def write_letters(folder: Path) -> None:
    words = sorted({*re.findall(r"\b[a-z]{4,8}\b", eval_file().read_text(encoding="utf-8"))})
    first = [{"role": "system", "content": "First letter"}, {"role": "user", "content": "cat"}]
    first.append({"role": "assistant", "content": "c"})
    rows = [
        {"messages": [*first, {"role": "user", "content": word}], "answer": word[0]}
        for word in random.Random(0).sample(words, sum(PROMPTS["letters"]))
    ]
    write_prompts("letters", folder, rows, REWARD_OF_LETTERS)


def write_prompts(setting: str, folder: Path, rows: Sequence[Study], reward: str) -> None:
    (folder / "rewards.py").write_text(reward)
    _, count = PROMPTS[setting]
    for name, part in {"held_out": rows[:count], "prompts": rows[count:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


REWARD_OF_WORDS = """  # word, word -> the most likely next one


def score(prompts, completions, **columns):
    \"\"\"The share of 8 words that are the most likely ones after the two before them.\"\"\"
    rewards = []
    for prompt, completion in zip(prompts, completions):
        words = [int(word[1:]) for word in (prompt + " " + completion).split()]
        new = range(len(prompt.split()), len(words))
        rewards.append(sum(LIKELY[words[i - 2]][words[i - 1]] == words[i] for i in new) / 8)
    return rewards
"""
REWARD_OF_LETTERS = """def score(completions, answer, **columns):
    \"\"\"1 for the letter alone, 0.2 for other texts that begin with it.\"\"\"
    texts = [completion[0]["content"].strip() for completion in completions]
    return [1.0 if text == right else 0.2 * text.startswith(right) for text, right in zip(texts, answer)]
"""


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
