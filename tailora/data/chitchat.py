"""The demo's conversations: two people, alternating turns, nothing private or profane, in a fixed order."""

import hashlib
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

Messages = list[dict[str, str]]

TURNS = 6  # a training example is the opening of a chat: many short ones teach more than few long ones
PROFANE = """
    ass asses asshole bastard bitch bullshit cock crap crappy cunt damn damned dammit dick dicks dickhead fag faggot
    fuck fucked fucker fucking goddamn hell motherfucker nigga nigger nude nudes penis piss pissed porn pornography
    pussy retard retarded sex sexual sexy shit shitty slut sluttiest sluts tits vagina whore whores wtf
""".split()
REFUSED = re.compile(
    rf"\b(?:{'|'.join(PROFANE)})\b"
    r"|\S+@\S+\.\w"  # e-mail
    r"|https?:|www\.|\b[\w-]+\.(?:com|org|net|edu|gov|io|games)\b"  # address of a page
    r"|\(?\d{3}\)?[ .-]?\d{3}[ .-]?\d{4}\b",  # telephone
    re.IGNORECASE,
)


def conversations(dataset: dict[str, Any]) -> Iterator[Messages]:
    """What is kept of `dataset.json`, each once, ordered by the hash of its id: shuffled, and the same everywhere."""
    seen = set()
    for key in sorted(dataset, key=lambda key: hashlib.sha256(key.encode()).digest()):
        turns = spoken_turns(dataset[key])
        opening = tuple(text for _, text in turns[: min(TURNS, len(turns) // 2 * 2)])
        if (
            len(opening) >= 4
            and opening not in seen
            and len({sender for sender, _ in turns}) == 2
            and not refused(turns)
        ):
            seen.add(opening)
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(opening)]


def spoken_turns(chat: dict[str, Any]) -> list[tuple[str, str]]:
    """(sender, text) of each turn; what one sender wrote in a row is one turn."""
    said = [(line["sender"], " ".join(line["text"].split())) for block in chat["messages"] for line in block]
    grouped = groupby((line for line in said if line[1]), key=lambda line: line[0])
    return [(sender, " ".join(text for _, text in lines)) for sender, lines in grouped]


def refused(turns: list[tuple[str, str]]) -> bool:
    return any(REFUSED.search(text) for _, text in turns)
