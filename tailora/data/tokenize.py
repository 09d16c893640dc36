"""Token ids and labels of samples. Tokens that the loss mask leaves out get the label -100."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from tailora.data.chat_template import (
    ChatTokenizer,
    Tokens,
    fit_to_template,
    to_conversation,
)
from tailora.data.dataset import IGNORED, Example, Int32, Int64
from tailora.data.loss_mask import RenderedSample, loss_mask, render_sample
from tailora.data.schemas import Conversation, Pair, Sample, Text
from tailora.errors import DataError

# A text of many megabytes is not tokenized whole, only to be cut at max_length. If the tokenizer is local, a beginning
# of the text gives the same tokens, but for the last few: 5 at most, in random and in periodic texts.
CHARACTERS = 64  # of a text, read at first for each token that is needed; where they do not suffice, more is read
MARGIN = 256  # last tokens of such a beginning, which are not used

# A document of many megabytes is tokenised in windows: as one text it takes minutes, and gigabytes.
WINDOW = 2**16  # characters
OVERLAP = 2**11  # characters that two neighbours share
AGREEING = 16  # tokens before and after the seam of two windows, which must be the same in both
WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """length: before cutting at max_length.    is_whole: False if only the beginning was read, of `length` tokens.
    untrained_replies: replies that could not be located.
    has_target: True if something is learned of it, whatever its tokens are.
    """

    example: Example
    length: int
    is_whole: bool
    untrained_replies: int = 0
    has_target: bool = False

    @property
    def is_learned(self) -> bool:
        """False if the cut took all that would be learned."""
        return self.has_target or self.example.supervised > 0


def encode_sample(sample: Sample, tokenizer: Any, max_length: int) -> Example:
    """Returns the tokens and labels of one sample. Raises DataError with the cause if it cannot be trained on."""
    (result,) = encode_samples([sample], ChatTokenizer.of(tokenizer), max_length)
    if isinstance(result, DataError):
        raise result
    return result.example


def encode_samples(
    samples: Sequence[Sample], tokenizer: ChatTokenizer, max_length: int
) -> list[EncodedSample | DataError]:
    """Returns the tokens and labels of every sample, or the reason why it has none."""
    rendered: list[RenderedSample | DataError] = []
    for sample in samples:
        try:
            rendered.append(render_sample(sample, tokenizer))
        except DataError as error:
            rendered.append(error)
    size = (max_length + MARGIN) * CHARACTERS if tokenizer.is_local else sys.maxsize
    chosen = [result for result in rendered if isinstance(result, RenderedSample)]
    at_once = [result for result in chosen if not _is_long_text(result, size, tokenizer)]
    tokens = iter(tokenizer.tokenize([result.beginning(size).text for result in at_once]))
    encoded: list[EncodedSample | DataError] = []
    for result in rendered:
        if isinstance(result, DataError):
            encoded.append(result)
        elif _is_long_text(result, size, tokenizer):
            encoded.append(_encode_long_text(result, tokenizer))
        else:
            encoded.append(_encode(result, size, next(tokens), tokenizer, max_length))
    return encoded


def _is_long_text(rendered: RenderedSample, size: int, tokenizer: ChatTokenizer) -> bool:
    """Returns whether all of a long text is needed and trained, so that it is read window by window."""
    is_whole = rendered.trained_spans == [(0, len(rendered.text))] and len(rendered.text) <= size
    return is_whole and tokenizer.is_local and len(rendered.text) > 2 * WINDOW


def _encode_long_text(rendered: RenderedSample, tokenizer: ChatTokenizer) -> EncodedSample:
    ids = ids_by_windows(rendered.text, tokenizer)
    has_bos = not rendered.add_bos or ids[: len(tokenizer.bos_ids)].tolist() == tokenizer.bos_ids
    bos = np.array([] if has_bos else tokenizer.bos_ids, dtype=np.int32)
    has_eos = not rendered.add_eos or tokenizer.eos_id in (None, ids[-1])
    eos = np.array([] if has_eos else [tokenizer.eos_id], dtype=np.int32)
    input_ids = np.concatenate([bos, ids, eos])
    example = Example.of_text(input_ids, np.arange(len(input_ids)) >= len(bos))
    return EncodedSample(example, len(input_ids), is_whole=True, untrained_replies=0)


def ids_by_windows(text: str, tokenizer: ChatTokenizer) -> Int32:
    """Returns the ids of a text, which is tokenised in windows that overlap, by a tokenizer that is local.

    Neighbours are joined in the middle of their overlap, at a token that both have, as the tokens around it.
    """
    starts = range(0, len(text) - OVERLAP, WINDOW - OVERLAP)
    parts: list[Int32] = []
    ids, offsets = np.zeros(0, np.int32), np.zeros(0, np.int64)
    for number in range(0, len(starts), WINDOWS_AT_ONCE):
        batch = starts[number : number + WINDOWS_AT_ONCE]
        windows = tokenizer.tokenize([text[start : start + WINDOW] for start in batch])
        for start, window in zip(batch, windows, strict=True):
            next_ids = np.array(window.ids, dtype=np.int32)
            next_offsets = np.array([first for first, _ in window.offsets or []], dtype=np.int64) + start
            if start:
                seam = _seam((ids, offsets), (next_ids, next_offsets), start + OVERLAP // 2)
                if seam is None:
                    return np.array(tokenizer.token_ids(text), dtype=np.int32)
                parts.append(ids[: seam[0]])
                next_ids, next_offsets = next_ids[seam[1] :], next_offsets[seam[1] :]
            ids, offsets = next_ids, next_offsets
    return np.concatenate([*parts, ids])


def _seam(before: tuple[Int32, Int64], after: tuple[Int32, Int64], middle: int) -> tuple[int, int] | None:
    """Returns the index in both of a token near the character `middle` around which they agree; None if none does."""
    (ids, offsets), (next_ids, next_offsets) = before, after
    first = int(np.searchsorted(offsets, middle))
    for i in range(first, min(first + AGREEING, len(ids))):
        j = int(np.searchsorted(next_offsets, offsets[i]))
        is_first = offsets[i - 1] < offsets[i]  # of the tokens of one character
        around = slice(max(0, i - AGREEING), i + AGREEING), slice(max(0, j - AGREEING), j + AGREEING)
        if is_first and j >= AGREEING and np.array_equal(ids[around[0]], next_ids[around[1]]):
            return i, j
    return None


def _encode(
    rendered: RenderedSample, size: int, tokens: Tokens, tokenizer: ChatTokenizer, max_length: int
) -> EncodedSample | DataError:
    """tokens: of the first `size` characters of the text."""
    ids, mask = loss_mask(rendered.beginning(size), tokens, tokenizer, max_length)
    while len(rendered.text) > size and len(ids) - MARGIN <= max_length:
        size *= 4
        (tokens,) = tokenizer.tokenize([rendered.beginning(size).text])
        ids, mask = loss_mask(rendered.beginning(size), tokens, tokenizer, max_length)
    is_whole = len(rendered.text) <= size
    example = Example.of_text(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))
    if is_whole and not example.supervised:
        return DataError("all labels masked: no token of this row would be learned")
    length = len(ids) if is_whole else len(ids) - MARGIN
    return EncodedSample(example.beginning(max_length), length, is_whole, rendered.untrained_replies)


def encode_seq2seq(
    samples: Sequence[Pair], tokenizer: ChatTokenizer, max_length: int
) -> list[EncodedSample | DataError]:
    """Returns the prompt as what an encoder reads, and the completion as what a decoder predicts.

    Each has at most max_length tokens, with the special tokens that the tokenizer writes around texts.
    """
    results: list[EncodedSample | DataError] = []
    for sample in samples:
        parts, lengths = [], []
        for name, text in (("text", sample.prompt), ("text_target", sample.completion)):
            ids = np.array(tokenizer.tokenizer(**{name: text}, verbose=False)["input_ids"], dtype=np.int32)
            lengths.append(len(ids))
            parts.append(ids if len(ids) <= max_length else np.concatenate([ids[: max_length - 1], ids[-1:]]))
        if not all(lengths):
            results.append(DataError("nothing to learn: prompt or completion has no tokens"))
            continue
        source, target = parts
        example = Example.of_two(Example(source, np.full_like(source, IGNORED)), Example(target, target))
        results.append(EncodedSample(example, max(lengths), is_whole=True))
    return results


# ---- Prompts and replies of samples, for generation and for people


def prompt_ids(sample: Conversation | Pair, tokenizer: Any) -> list[int]:
    """Returns the ids to generate the sample's last reply from."""
    chat_tokenizer = ChatTokenizer.of(tokenizer)
    if chat_tokenizer.template is None and isinstance(sample, Pair):
        return chat_tokenizer.bos_ids + chat_tokenizer.token_ids(sample.prompt)
    chat = fit_to_template(to_conversation(sample), chat_tokenizer)
    before_reply = chat.messages[: last_reply(chat)]
    return chat_tokenizer.token_ids(chat_tokenizer.render(before_reply, tools=chat.tools, add_generation_prompt=True))


def last_reply(chat: Conversation) -> int | None:
    """Returns the number of the last reply that is trained; None if the conversation has no reply."""
    return max(chat.trained_replies or chat.replies, default=None)


def reply_text(sample: Sample, tokenizer: Any) -> str:
    """Returns the last text that is trained; of tool calls, what the template writes for them."""
    if isinstance(sample, Text):
        return sample.text
    if isinstance(sample, Pair):
        return sample.completion
    index = last_reply(sample)
    assert index is not None  # rows without a reply are refused
    message = sample.messages[index]
    if "tool_calls" not in message:
        return str(message["content"])
    ids = encode_sample(replace(sample, messages=sample.messages[: index + 1]), tokenizer, sys.maxsize).input_ids
    return str(tokenizer.decode(ids[len(prompt_ids(sample, tokenizer)) :].tolist(), skip_special_tokens=True))


def preview(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Returns (text, is trained) pieces in order; joined they are the decoded example with its special tokens."""
    pieces = []
    end, previous = 0, ""
    for is_trained, run in groupby(example.labels.tolist(), key=lambda label: label != IGNORED):
        end += len(list(run))
        # Decodes all tokens so far and removes the text before: a run decoded alone would lose its leading space.
        ids = example.input_ids[:end].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text[len(previous) :], is_trained))
        previous = text
    return pieces
