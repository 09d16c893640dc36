"""The chats of `tailora demo`, in tailora/data/chitchat: made once from a wheel on PyPI, and shipped in the package.

    python -m benchmarks.site.demo_data      # writes the same bytes again

The README.md in their folder says how they were chosen. Their licence is that of the wheel.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tailora.data.demo import SHIPPED_DATA, Wheel, extract_from_wheel
from tailora.data.messages import Messages

DATA = Wheel("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
CHATS = "chitchat_dataset/dataset.json"
TRAIN, HELD_OUT = 280, 100  # conversations; the demo trains for one epoch


def main(folder: Path = SHIPPED_DATA) -> None:
    with TemporaryDirectory() as temporary:
        dataset = json.loads(extract_from_wheel(DATA, CHATS, Path(temporary)).read_bytes())
    chats = list(conversations(dataset))
    write_jsonl(folder / "train.jsonl", chats[:TRAIN])
    write_jsonl(folder / "eval.jsonl", chats[TRAIN : TRAIN + HELD_OUT])


def write_jsonl(path: Path, conversations: Iterable[Messages]) -> None:
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)
    path.write_text("".join(lines), encoding="utf-8")


# ---- The conversations: two people, alternating turns, nothing private or profane, in a fixed order

TURNS = 4  # from the beginning of each chat: for the same tokens, many short chats worked better than few long ones
MAX_TURN = 500  # characters; longer turns are the same word pasted over and over
PROFANE = r"""
    ass|asses|asshole|bastard|bitch|bullshit|cock|crap|crappy|cunt|damn|damned|dammit|dick|dicks|dickhead|fag|faggot|
    fuck|fucked|fucker|fucking|goddamn|hell|motherfucker|nigga|nigger|nude|nudes|penis|piss|pissed|porn|pornography|
    pussy|retard|retarded|sex|sexual|sexy|shit|shitty|slut|sluttiest|sluts|tits|vagina|whore|whores|wtf
"""
PRIVATE = r"""
    \S+@\S+\.\w                                                  # e-mail
    | https?: | \bwww\.\w | \b[\w-]+\.(?:com|org|net|edu|gov|io)\b   # address of a page
    | \(?\d{3}\)? [ .-]? \d{3} [ .-]? \d{4}\b                    # telephone
"""
REFUSED = re.compile(rf"\b(?:{PROFANE})\b | {PRIVATE}", re.IGNORECASE | re.VERBOSE)


def conversations(dataset: dict[str, Any]) -> Iterator[Messages]:
    """Yields the suitable beginnings of chats in `dataset.json`, each once, sorted by the hashes of the chat ids."""
    seen = set()
    for key in sorted(dataset, key=lambda key: hashlib.sha256(key.encode()).digest()):
        messages = chain.from_iterable(dataset[key]["messages"])
        lines = [(message["sender"], " ".join(message["text"].split())) for message in messages]
        by_sender = groupby((line for line in lines if line[1]), key=lambda line: line[0])  # one turn each
        turns = [(sender, " ".join(text for _, text in turn)) for sender, turn in by_sender]
        opening = tuple(text for _, text in turns[:TURNS])
        has_two_people = len({sender for sender, _ in turns}) == 2
        is_suitable = has_two_people and len(turns) >= TURNS and not any(is_refused(text) for _, text in turns)
        if is_suitable and opening not in seen:
            seen.add(opening)
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(opening)]


def is_refused(text: str) -> bool:
    return len(text) > MAX_TURN or REFUSED.search(text) is not None


if __name__ == "__main__":
    main()
