"""Token ids and labels of samples. `loss_mask` says which tokens are trained; the others get the label -100."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tailora.data.chat_template import ChatTokenizer, RenderedSample, Tokens, render_sample, to_conversation
from tailora.data.dataset import IGNORED, Example
from tailora.data.schemas import Conversation, Pair, Sample, Text
from tailora.errors import DataError


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """length: before cutting at max_length.    untrained_replies: replies that could not be located."""

    example: Example
    length: int
    untrained_replies: int


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
    tokens = iter(tokenizer.tokenize([result.text for result in rendered if isinstance(result, RenderedSample)]))
    results: list[EncodedSample | DataError] = []
    for result in rendered:
        if isinstance(result, DataError):
            results.append(result)
            continue
        ids, mask = loss_mask(result, next(tokens), tokenizer)
        input_ids = np.array(ids[:max_length], dtype=np.int32)
        labels = np.where(mask[:max_length], input_ids, IGNORED).astype(np.int32)
        labels[:1] = IGNORED  # nothing predicts the first token
        if any(mask[1:]):
            results.append(EncodedSample(Example(input_ids, labels), len(ids), result.untrained_replies))
        else:
            results.append(DataError("all labels masked: no token of it would be learned"))
    return results


# ---- The loss mask


def loss_mask(rendered: RenderedSample, tokens: Tokens, tokenizer: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Returns token ids, with BOS and EOS where they belong, and for each whether it is trained.

    tokens: those of the rendered text as a whole. They are taken if the prompts in it have the tokens that generation
    sees; otherwise prompts and replies are tokenised one by one.
    """
    ids, mask = _mask_from_offsets(rendered, tokens, tokenizer) or _mask_from_pieces(rendered, tokenizer)
    if rendered.add_bos and ids[: len(tokenizer.bos_ids)] != tokenizer.bos_ids:
        ids, mask = tokenizer.bos_ids + ids, [False] * len(tokenizer.bos_ids) + mask
    if rendered.add_eos and tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
        ids, mask = [*ids, tokenizer.eos_id], [*mask, True]
    return ids, mask


def _mask_from_offsets(
    rendered: RenderedSample, tokens: Tokens, tokenizer: ChatTokenizer
) -> tuple[list[int], list[bool]] | None:
    """None if the whole text has other prompt tokens than generation sees, or if there are no offsets."""
    if tokens.offsets is None:
        return None
    ends = [end for _, end in tokens.offsets]
    mask = [False] * len(tokens.ids)
    for start, end in rendered.trained_spans:
        first, last = bisect_right(ends, start), bisect_right(ends, end)
        # Special tokens split a text before anything else is done to it, so only what follows the last one can differ.
        split = next((i for i in range(first - 1, 0, -1) if tokens.ids[i] in tokenizer.special_ids), 0)
        split_start = tokens.offsets[split][0] if split else 0
        if tokenizer.token_ids(rendered.text[split_start:start]) != tokens.ids[split:first]:
            return None
        mask[first:last] = [True] * (last - first)
    return tokens.ids, mask


def _mask_from_pieces(rendered: RenderedSample, tokenizer: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Prompts and replies tokenised one by one."""
    ids: list[int] = []
    mask: list[bool] = []
    previous_end = 0
    for start, end in rendered.trained_spans:
        for piece, is_trained in ((rendered.text[previous_end:start], False), (rendered.text[start:end], True)):
            piece_ids = tokenizer.token_ids(piece) if piece else []
            ids += piece_ids
            mask += [is_trained] * len(piece_ids)
        previous_end = end
    return ids, mask


# ---- Prompts and replies of samples, for generation and for people


def prompt_ids(sample: Conversation | Pair, tokenizer: Any) -> list[int]:
    """Returns the ids to generate the sample's last reply from."""
    chat_tokenizer = ChatTokenizer.of(tokenizer)
    if chat_tokenizer.template is None and isinstance(sample, Pair):
        return chat_tokenizer.bos_ids + chat_tokenizer.token_ids(sample.prompt)
    messages = to_conversation(sample).messages
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    before_reply = messages[: replies[-1]] if replies else messages
    return chat_tokenizer.token_ids(chat_tokenizer.render(before_reply, add_generation_prompt=True))


def reply_text(sample: Sample) -> str:
    """Returns the last text that is trained."""
    if isinstance(sample, Conversation):
        return next(message["content"] for message in reversed(sample.messages) if message["role"] == "assistant")
    return sample.text if isinstance(sample, Text) else sample.completion


def preview(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Returns (text, is trained) pieces in order; joined they are the decoded example with its special tokens."""
    pieces = []
    end, shown = 0, ""
    for is_trained, run in groupby(example.labels.tolist(), key=lambda label: label != IGNORED):
        end += len(list(run))
        # The whole so far, less what was shown: decoding a run alone would lose its leading space.
        ids = example.input_ids[:end].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text[len(shown) :], is_trained))
        shown = text
    return pieces
