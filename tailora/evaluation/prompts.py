"""From a question to the ids that the model goes on from."""

from dataclasses import dataclass
from typing import Any

from tailora.data.codec import codec_of
from tailora.data.shapes import Conversation, Messages, Pair, Sample, Text
from tailora.data.tokenize import prompt_ids

OPENING = 12  # words of a plain text that stand as its prompt


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str  # what a reader is shown: the last thing said before the answer
    ids: list[int]


def prompt_of(asked: str | Sample, tokenizer: Any) -> Prompt:
    """A question, or what stands before a sample's last reply. Raises DataError when the template refuses it."""
    if isinstance(asked, str):
        return Prompt(asked, chat_ids([{"role": "user", "content": asked}], tokenizer))
    if isinstance(asked, Text):
        opening = " ".join(asked.text.split()[:OPENING])
        return Prompt(opening, plain_ids(opening, tokenizer))
    return Prompt(_last_said(asked), prompt_ids(asked, tokenizer))


def chat_ids(messages: Messages, tokenizer: Any) -> list[int]:
    """The chat up to the reply that comes next; without a chat template the words alone, to be continued.

    Raises DataError when the template refuses the messages.
    """
    codec = codec_of(tokenizer)
    if codec.template is None:
        return plain_ids("\n".join(message["content"] for message in messages), tokenizer)
    return codec.ids(codec.render(messages, reply_next=True))


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    codec = codec_of(tokenizer)
    return codec.prefix + codec.ids(text)


def _last_said(sample: Conversation | Pair) -> str:
    if isinstance(sample, Pair):
        return sample.prompt
    replies = [place for place, message in enumerate(sample.messages) if message["role"] == "assistant"]
    return sample.messages[replies[-1] - 1]["content"] if replies else sample.messages[-1]["content"]
