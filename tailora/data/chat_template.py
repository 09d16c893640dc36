"""From a sample to text with the spans that are learned.

A chat is written by the model's own template, and its replies are found from the template too:
  - a template with {% generation %} says where they are;
  - any other is asked twice per reply, for the text before it (ending as `generate` would begin) and for the text
    up to its end. Both must be prefixes of the whole; a template that rewrites earlier turns fails this for the
    turns it rewrites, and those are read but not learned.
A reply's span ends with its end-of-turn token; what the template writes after it is never generated.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from tailora.data.codec import Codec
from tailora.data.shapes import Conversation, Messages, Pair, Sample, Text
from tailora.errors import DataError

Span = tuple[int, int]
MARK = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class Layout:
    text: str
    spans: list[Span]  # characters that are learned
    plain: bool = False  # no template: the tokenizer's own first token goes before
    add_eos: bool = False  # the text has no end of its own
    lost: int = 0  # replies that are not learned: the template rewrites them, or nothing comes before them


class Turn(NamedTuple):
    start: int
    stop: int
    ended: bool  # its last token tells generation to stop


def lay_out(sample: Sample, codec: Codec) -> Layout:
    """Raises DataError with the cause when the sample cannot be written or has nothing to learn."""
    if isinstance(sample, Text):
        return Layout(sample.text, [(0, len(sample.text))], plain=True, add_eos=codec.eos is not None)
    if codec.template is None:
        return _lay_out_pair(sample, codec)
    return _lay_out_chat(as_chat(sample), codec)


def as_chat(sample: Conversation | Pair) -> Conversation:
    """A pair becomes a user turn and its reply; the white space that parted them is the template's matter now."""
    if isinstance(sample, Conversation):
        return sample
    messages = [
        {"role": "user", "content": sample.prompt.strip()},
        {"role": "assistant", "content": sample.completion.strip()},
    ]
    return Conversation(messages)


def _lay_out_pair(sample: Conversation | Pair, codec: Codec) -> Layout:
    if isinstance(sample, Conversation):
        raise DataError(
            "the tokenizer has no chat template to write messages with: take the instruct version of the model, "
            "set tokenizer.chat_template, or give the data as prompt and completion"
        )
    _needs_eos(codec)
    text = sample.prompt + sample.completion
    return Layout(text, [(len(sample.prompt), len(text))], plain=True, add_eos=True)


def _needs_eos(codec: Codec) -> None:
    if codec.eos_id is None:
        raise DataError("the tokenizer has no EOS token, so the model could not learn to stop: set tokenizer.eos_token")


def _lay_out_chat(chat: Conversation, codec: Codec) -> Layout:
    replies = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
    find = _marked if MARK.search(codec.template or "") else _between_prefixes
    text, found = find(chat, replies, codec)
    turns = [turn for turn in (_turn(text, span, codec) for span in found) if turn.start < turn.stop]
    if not turns:
        raise DataError(_unlocated(replies))
    if not turns[-1].ended:
        _needs_eos(codec)
    wanted = sum(place >= chat.first for place in replies)
    return Layout(
        text=text[: turns[-1].stop],  # what follows teaches nothing
        spans=[(turn.start, turn.stop) for turn in turns],
        add_eos=not turns[-1].ended,
        lost=max(0, wanted - len(turns)),
    )


def _unlocated(replies: list[int]) -> str:
    if not any(replies):
        return "nothing to learn: the conversation has no reply, or only one that it begins with"
    return (
        "no reply can be located: the chat template writes replies otherwise than it prompts for them; "
        "put {% generation %} ... {% endgeneration %} around the reply in the template"
    )


def _marked(chat: Conversation, replies: list[int], codec: Codec) -> tuple[str, list[Span]]:
    """Text and learned spans as {% generation %} marks them."""
    text, spans = codec.render_marked(chat.messages)
    earlier = sum(place < chat.first for place in replies)
    if earlier and len(spans) != len(replies):
        raise DataError(f"the chat template marks {len(spans)} replies where the conversation has {len(replies)}")
    return text, spans[earlier:]


def _between_prefixes(chat: Conversation, replies: list[int], codec: Codec) -> tuple[str, list[Span]]:
    text = codec.render(chat.messages)
    spans = (_span(chat.messages, place, text, codec) for place in replies if place >= chat.first)
    return text, [span for span in spans if span is not None]


def _span(messages: Messages, place: int, text: str, codec: Codec) -> Span | None:
    """Where message `place` stands in the text of them all, or None when the template does not keep it there."""
    if place == 0:
        return None  # no model is ever asked to speak first
    before = codec.render(messages[:place], reply_next=True)
    if not text.startswith(before):
        return None
    if place == len(messages) - 1:
        return len(before), len(text)
    upto = codec.render(messages[: place + 1])
    # Some templates close the whole chat, not the turn, with EOS.
    for end in (upto, upto.removesuffix(codec.eos or "")):
        if text.startswith(end) and len(end) >= len(before):
            return len(before), len(end)
    return None


def _turn(text: str, span: Span, codec: Codec) -> Turn:
    """The reply up to the token that ends it: EOS, or else the first of the special tokens that close the span."""
    start, stop = span
    closing = _closing(text[start:stop], codec.stops)
    if closing:
        eos = [end for token, end in closing if token == codec.eos]
        return Turn(start, start + min(eos or [end for _, end in closing]), ended=True)
    if codec.eos and text.startswith(codec.eos, stop):
        return Turn(start, stop + len(codec.eos), ended=True)  # {% generation %} around the words alone
    return Turn(start, stop, ended=False)


def _closing(reply: str, stops: tuple[str, ...]) -> list[tuple[str, int]]:
    """The special tokens, white space between them allowed, that the reply ends with, and where each ends."""
    found = []
    rest = reply.rstrip()
    while rest.endswith(stops):
        token = max((stop for stop in stops if rest.endswith(stop)), key=len)
        found.append((token, len(rest)))
        rest = rest[: -len(token)].rstrip()
    return found
