"""From samples to token ids with labels."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tailora.data.chat_template import Codec, Layout, Tokens, as_chat, codec_of, lay_out
from tailora.data.dataset import IGNORED, Example
from tailora.data.schemas import Conversation, Pair, Sample, Text
from tailora.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    example: Example
    length: int  # before cutting at max_length
    lost: int  # replies that could not be located


def encode(sample: Sample, tokenizer: Any, max_length: int) -> Example:
    """One sample's tokens and labels. Raises DataError with the cause when it cannot be learned from."""
    (result,) = encode_all([sample], codec_of(tokenizer), max_length)
    if isinstance(result, DataError):
        raise result
    return result.example


def encode_all(samples: Sequence[Sample], codec: Codec, max_length: int) -> list[Encoded | DataError]:
    """Tokens and labels of every sample, or the reason why it has none."""
    layouts = [_laid_out(sample, codec) for sample in samples]
    tokens = iter(codec.tokens([layout.text for layout in layouts if isinstance(layout, Layout)]))
    return [
        _encoded(layout, next(tokens), codec, max_length) if isinstance(layout, Layout) else layout
        for layout in layouts
    ]


def prompt_ids(sample: Conversation | Pair, tokenizer: Any) -> list[int]:
    """What the model sees before it writes the sample's last reply: the ids to generate from."""
    codec = codec_of(tokenizer)
    if codec.template is None and isinstance(sample, Pair):
        return codec.prefix + codec.ids(sample.prompt)
    messages = as_chat(sample).messages
    last = max(
        (place for place, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages)
    )
    return codec.ids(codec.render(messages[:last], reply_next=True))


def reply_text(sample: Sample) -> str:
    """The last text that the sample teaches."""
    if isinstance(sample, Conversation):
        return next(message["content"] for message in reversed(sample.messages) if message["role"] == "assistant")
    return sample.text if isinstance(sample, Text) else sample.completion


def _laid_out(sample: Sample, codec: Codec) -> Layout | DataError:
    try:
        return lay_out(sample, codec)
    except DataError as error:
        return error


def _encoded(layout: Layout, tokens: Tokens, codec: Codec, max_length: int) -> Encoded | DataError:
    ids, learned = _together(layout, tokens, codec) or _apart(layout, codec)
    if layout.plain and ids[: len(codec.prefix)] != codec.prefix:
        ids, learned = codec.prefix + ids, [False] * len(codec.prefix) + learned
    if layout.add_eos and codec.eos_id is not None and ids[-1:] != [codec.eos_id]:
        ids, learned = [*ids, codec.eos_id], [*learned, True]
    input_ids = np.array(ids[:max_length], dtype=np.int32)
    labels = np.where(learned[:max_length], input_ids, IGNORED).astype(np.int32)
    labels[:1] = IGNORED  # nothing predicts the first token
    if not any(learned[1:]):
        return DataError("all labels masked: no token of it would be learned")
    return Encoded(Example(input_ids, labels), length=len(ids), lost=layout.lost)


def _together(layout: Layout, tokens: Tokens, codec: Codec) -> tuple[list[int], list[bool]] | None:
    """The text tokenised as one. None where that would show the model other prompt tokens than generation does."""
    if tokens.offsets is None:
        return None
    ends = tokens.offsets.ends
    learned = [False] * len(tokens.ids)
    for start, stop in layout.spans:
        first, last = bisect_right(ends, start), bisect_right(ends, stop)
        if not _same_alone(layout.text[:start], tokens.ids[:first], tokens.offsets.starts, codec):
            return None
        learned[first:last] = [True] * (last - first)
    return tokens.ids, learned


def _same_alone(prompt: str, ids: list[int], starts: list[int], codec: Codec) -> bool:
    """Whether the prompt alone gives these ids, which are its part of the whole.

    Special tokens cut a text before anything else is done to it, so only what follows the last one can differ.
    """
    cut = next((place for place in range(len(ids) - 1, 0, -1) if ids[place] in codec.special_ids), 0)
    return codec.ids(prompt[starts[cut] if cut else 0 :]) == ids[cut:]


def _apart(layout: Layout, codec: Codec) -> tuple[list[int], list[bool]]:
    """Prompts and replies tokenised one by one."""
    ids: list[int] = []
    learned: list[bool] = []
    done = 0
    for start, stop in layout.spans:
        for piece, flag in ((layout.text[done:start], False), (layout.text[start:stop], True)):
            part = codec.ids(piece) if piece else []
            ids += part
            learned += [flag] * len(part)
        done = stop
    return ids, learned


# ---- An example as people read it: its text in pieces, each learned or only read.


def preview(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, learned) pieces in order; joined they are the decoded example, special tokens shown."""
    pieces = []
    end, shown = 0, ""
    for learned, run in groupby(example.labels.tolist(), key=lambda label: label != IGNORED):
        end += len(list(run))
        # The whole so far, less what was shown: decoding a run alone would lose its leading space.
        ids = example.input_ids[:end].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text[len(shown) :], learned))
        shown = text
    return pieces
