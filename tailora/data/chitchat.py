"""The demo's conversations: two people, alternating turns, nothing private or profane, in a fixed order."""

import hashlib
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tailora.data.shapes import Messages

TURNS = 4  # of each chat's opening: with the same tokens, many short conversations taught more than few long ones
LONGEST = 500  # characters of a turn; beyond are pasted walls of one word
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
    """What is kept of `dataset.json`, each once, ordered by the hash of its id: shuffled, and the same everywhere."""
    seen = set()
    for key in sorted(dataset, key=lambda key: hashlib.sha256(key.encode()).digest()):
        turns = spoken_turns(dataset[key])
        opening = tuple(text for _, text in turns[:TURNS])
        if fit(turns) and opening not in seen:
            seen.add(opening)
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(opening)]


def fit(turns: list[tuple[str, str]]) -> bool:
    """Two people, long enough, and nothing in the whole chat that is refused."""
    senders = {sender for sender, _ in turns}
    return len(senders) == 2 and len(turns) >= TURNS and not any(refused(text) for _, text in turns)


def refused(text: str) -> bool:
    return len(text) > LONGEST or REFUSED.search(text) is not None


def spoken_turns(chat: dict[str, Any]) -> list[tuple[str, str]]:
    """(sender, text) of each turn; what one sender wrote in a row is one turn."""
    said = [(line["sender"], " ".join(line["text"].split())) for block in chat["messages"] for line in block]
    grouped = groupby((line for line in said if line[1]), key=lambda line: line[0])
    return [(sender, " ".join(text for _, text in lines)) for sender, lines in grouped]
