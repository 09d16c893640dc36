"""Token ids and labels of samples. Tokens that the loss mask leaves out get the label -100."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tailora.data.chat_template import ChatTokenizer, RenderedSample, render_sample, to_conversation
from tailora.data.dataset import IGNORED, Example
from tailora.data.loss_mask import loss_mask
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
            results.append(DataError("all labels masked: no token of this row would be learned"))
    return results


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
    end, previous = 0, ""
    for is_trained, run in groupby(example.labels.tolist(), key=lambda label: label != IGNORED):
        end += len(list(run))
        # Decodes all tokens so far and removes the text before: a run decoded alone would lose its leading space.
        ids = example.input_ids[:end].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text[len(previous) :], is_trained))
        previous = text
    return pieces
