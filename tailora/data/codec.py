"""What the rest needs to know about a tokenizer, looked up once."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from tailora.errors import DataError

Messages = list[dict[str, str]]


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
    bos: str | None
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
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_next)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from None
        return str(text)


def codec_of(tokenizer: Any) -> Codec:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    eos, bos = tokenizer.eos_token, tokenizer.bos_token
    names = {str(name) for name in tokenizer.convert_ids_to_tokens(sorted(special))}
    return Codec(
        tokenizer=tokenizer,
        template=_template(tokenizer),
        prefix=_prefix(tokenizer),
        bos=bos,
        eos=eos,
        eos_id=tokenizer.eos_token_id,
        special_ids=frozenset(special),
        stops=tuple(sorted(names - ({bos} - {eos}))),
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
    count = next(place for place in range(len(framed)) if framed[place : place + len(bare)] == bare)
    return list(framed[:count])
