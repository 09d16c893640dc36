"""What was dropped or cut of the data: told by `data` and at the start of a run, whenever there is any."""

from collections.abc import Mapping
from typing import Any

MEANINGS = {  # count of the report -> name, meaning
    "truncated": ("cut", "examples are longer than --max-length"),
    "cut_away": ("left out", "examples whose learned tokens were all cut away"),
    "replies_not_learned": ("not learned", "replies that the chat template rewrites once the chat goes on"),
    "repeated": ("repeated", "rows are copies of an earlier row"),
    "duplicates": ("DUPLICATES", "held-out rows are trained on too: the held-out loss will look too good"),
}


def counted(report: Mapping[str, Any]) -> dict[str, str]:
    """Name -> count and meaning, for every count that is not 0."""
    return {name: f"{report[key]:,} {meaning}" for key, (name, meaning) in MEANINGS.items() if report[key]}
