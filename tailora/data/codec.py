"""What the rest needs to know about a tokenizer, looked up once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tailora.data.shapes import Messages
from tailora.errors import DataError


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
