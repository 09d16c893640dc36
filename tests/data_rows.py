"""Rows of training data, and the functions that prepare them, with settings as keywords."""

from collections.abc import Iterator
from typing import Any

from tailora.data import prepare as preparation
from tailora.data.chat_template import DataSettings
from tailora.data.dataset import Example
from tailora.data.prepare import PreparedData, stream_examples
from tailora.data.row_checks import RowCounts

PAIRS = [{"prompt": f"hello {number}", "completion": f" {number} you"} for number in range(40)]


def prepare(source: Any, tokenizer: Any, eval_source: str | None = None, **settings: Any) -> PreparedData:
    return preparation.prepare(source, tokenizer, DataSettings(**settings), eval_source=eval_source)


def stream(source: str, tokenizer: Any, counts: RowCounts | None = None, **settings: Any) -> Iterator[Example]:
    return stream_examples(source, tokenizer, DataSettings(**settings), counts)


def chat_row(*contents: str) -> dict[str, list[dict[str, str]]]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def texts_of(*lengths: int) -> list[dict[str, str]]:
    return [{"text": " ".join(f"{n}.{k}" for k in range(length))} for n, length in enumerate(lengths)]
