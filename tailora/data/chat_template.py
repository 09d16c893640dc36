"""From a sample to text with the spans that are learned.

A chat is written by the model's own template, and its replies are found from the template too:
  - a template with {% generation %} says where they are;
  - any other is asked twice per reply, for the text before it (ending as `generate` would begin) and for the text
    up to its end. Both must be prefixes of the whole; a template that rewrites earlier turns fails this for the
    turns it rewrites, and those are read but not learned.
A reply's span ends with its end-of-turn token; what the template writes after it is never generated.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tailora.data.schemas import Conversation, Messages, Pair, Sample, Text
from tailora.errors import DataError

# ---- What the rest needs to know about a tokenizer, looked up once.


class Offsets(NamedTuple):
    """Where each token begins and ends in its text, in characters."""

    starts: list[int]
    ends: list[int]


class Tokens(NamedTuple):
    ids: list[int]
    offsets: Offsets | None  # None where the tokenizer cannot tell


@dataclass(frozen=True, slots=True)
class Codec:
    tokenizer: Any
    template: str | None
    prefix: list[int]  # what the tokenizer writes before a plain text: [BOS] or nothing
    eos: str | None
    eos_id: int | None
    special_ids: frozenset[int]
    stops: tuple[str, ...]  # special tokens that may end a turn
    memo: dict[str, list[int]] = field(default_factory=dict)

    def tokens(self, texts: list[str]) -> list[Tokens]:
        """Tokens of every text as it stands, no special token added."""
        if not texts:
            return []
        fast = self.tokenizer.is_fast
        out = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast, verbose=False
        )
        if not fast:
            return [Tokens(ids, None) for ids in out["input_ids"]]
        pairs = zip(out["input_ids"], out["offset_mapping"], strict=True)
        return [Tokens(ids, Offsets([start for start, _ in spans], [end for _, end in spans])) for ids, spans in pairs]

    def ids(self, text: str) -> list[int]:
        """Ids of a text that is likely to come again, such as the header of a reply."""
        if text not in self.memo:
            self.memo[text] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.memo[text]

    def render(self, messages: Messages, *, reply_next: bool = False) -> str:
        """The template's text for the messages, as `generate` would see it with `reply_next`.

        Raises DataError with the template's own words when it refuses them.
        """
        with _refusal_as_data_error():
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_next))

    def render_marked(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and the character spans that it puts between {% generation %} and its end."""
        with _refusal_as_data_error():
            (text,), (spans,) = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return str(text), [(start, end) for start, end in spans]


@contextmanager
def _refusal_as_data_error() -> Iterator[None]:
    try:
        yield
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None


def codec_of(tokenizer: Any) -> Codec:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    names = {str(name) for name in tokenizer.convert_ids_to_tokens(sorted(special))}
    return Codec(
        tokenizer=tokenizer,
        template=_template(tokenizer),
        prefix=_prefix(tokenizer),
        eos=tokenizer.eos_token,
        eos_id=tokenizer.eos_token_id,
        special_ids=frozenset(special),
        stops=tuple(sorted(names)),
    )


def _template(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(f"the tokenizer has several chat templates and no default: {error}") from None


def _prefix(tokenizer: Any) -> list[int]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    count = next((place for place in range(len(framed)) if framed[place : place + len(bare)] == bare), 0)
    return list(framed[:count])


# ----


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
