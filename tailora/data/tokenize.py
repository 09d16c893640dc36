"""Token ids and labels of samples. Untrained tokens get the label -100.

language models     texts, conversations, pairs; both replies of preferences
seq2seq             the prompt for the encoder, the completion for the decoder
classification      texts with a target, words with their tags
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, cast

import numpy as np

from tailora.data.chat_template import (
    ChatTokenizer,
    DataSettings,
    Tokens,
    fit_to_template,
    to_conversation,
    with_system,
)
from tailora.data.dataset import IGNORED, Example, Int32
from tailora.data.image_processor import text_tokenizer
from tailora.data.image_tokens import image_owners
from tailora.data.labels import Labels
from tailora.data.loss_mask import RenderedSample, loss_mask, render_sample
from tailora.data.samples import (
    AnySample,
    Choices,
    Conversation,
    Feedback,
    Labelled,
    Pair,
    Preference,
    Prompt,
    Sample,
    Tagged,
    Text,
)
from tailora.data.schemas import GRPO, SEQ2SEQ
from tailora.errors import DataError


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """An example and its source."""

    sample: AnySample  # for two replies the preferred one, for choices the correct one, for a split chat its part
    example: Example
    length: int  # in tokens before truncation to max_length
    part: int = 0  # index among the examples of its row
    parts: int = 1  # number of these
    choices: Choices | None = None  # with `sample` as the correct answer
    location: str = ""  # of its row
    row: Mapping[str, Any] = field(default_factory=dict)  # all columns

    @property
    def is_learned(self) -> bool:
        """False if no trained token is left after truncation."""
        return isinstance(self.sample, Labelled | Prompt) or self.example.supervised > 0


def encode_sample(sample: Sample, tokenizer: Any, max_length: int) -> Example:
    """Returns the tokens and labels of one sample, or of its last reply if every reply needs a separate example.

    Raises DataError with the cause if it cannot be used for training.
    """
    (result,) = encode_samples([sample], ChatTokenizer.of(tokenizer, DataSettings(max_length=max_length)))
    if isinstance(result, DataError):
        raise result
    return result[-1].example


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Returns the end tokens of the model and the tokenizer, and those that end a reply in training.

    A reply in the middle of a conversation may end with a different token than the last one, as in Phi 3 and GLM.
    """
    end = model.generation_config.eos_token_id
    ids = {*(end if isinstance(end, list) else [end]), text_tokenizer(tokenizer).eos_token_id}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
        with suppress(DataError):  # the template can be chatted with, but not trained on
            labels = encode_sample(Conversation(turns), tokenizer, max_length=100_000).labels
            ends = labels[np.diff(labels != IGNORED, append=False) & (labels != IGNORED)].tolist()
            ids |= set(ends) & ChatTokenizer.of(tokenizer).special_ids
    return sorted(ids - {None})


def encode_samples(
    samples: Sequence[AnySample | DataError], tokenizer: ChatTokenizer
) -> list[list[EncodedSample] | DataError]:
    """Returns the tokens and labels of every sample, or the error that prevents it. Errors stay in their place.

    A conversation becomes several examples if the template cannot render all its replies in one text as in generation.
    """
    prepared = [result_of(with_system, sample, tokenizer) for sample in samples]
    if tokenizer.settings.task in (SEQ2SEQ, GRPO) or tokenizer.settings.labels is not None:
        return [result_of(_encode_one, sample, tokenizer) for sample in prepared]
    rendered = [result_of(_render, sample, tokenizer) for sample in prepared]
    tokens = iter(tokenizer.tokenize([part.text for parts in rendered if isinstance(parts, list) for part in parts]))
    tokenized = [[(part, next(tokens)) for part in parts] if isinstance(parts, list) else parts for parts in rendered]
    return [
        result_of(_encode_texts, parts, sample, tokenizer) for parts, sample in zip(tokenized, prepared, strict=True)
    ]


def result_of(function: Callable[..., Any], sample: Any, *arguments: Any) -> Any:
    """Returns the function's result for a sample or row, or the DataError that it or an earlier step raised."""
    if isinstance(sample, DataError):
        return sample
    try:
        return function(sample, *arguments)
    except DataError as error:
        return error


def _encode_one(sample: AnySample, tokenizer: ChatTokenizer) -> list[EncodedSample]:
    """Encodes a sample of a task that tokenizes one sample at a time."""
    encoders: Any = {Tagged: _encode_tagged, Labelled: _encode_labelled, Prompt: _encode_prompt, Pair: _encode_pair}
    return [encoders[type(sample)](sample, tokenizer)]


# ---- Language models


def tokenized_parts(sample: AnySample) -> list[Sample]:
    """Returns the parts of a sample that a language model reads."""
    match sample:
        case Choices():
            return [sample.options[sample.answer]]
        case Preference():
            return [sample.chosen, sample.rejected]
        case Feedback():
            return [sample.reply]
        case Prompt():
            return [sample.chat]
        case Conversation() | Pair() | Text():
            return [sample]
    return []


def _render(sample: AnySample, tokenizer: ChatTokenizer) -> list[RenderedSample]:
    return [text for part in tokenized_parts(sample) for text in render_sample(part, tokenizer)]


def _encode_texts(
    texts: Sequence[tuple[RenderedSample, Tokens]], sample: AnySample, tokenizer: ChatTokenizer
) -> list[EncodedSample]:
    """Encodes the texts of one sample. If truncation removes one of two compared replies, nothing is trained."""
    examples = [_encode_text(text, tokens, tokenizer) for text, tokens in texts]
    if not all(example.supervised for example in examples):
        raise DataError("the row has no tokens to train on")
    max_length = tokenizer.settings.max_length
    encoded = [
        EncodedSample(text.sample, example.beginning(max_length), len(example.input_ids), number, len(texts))
        for number, ((text, _), example) in enumerate(zip(texts, examples, strict=True))
    ]
    if isinstance(sample, Conversation | Pair | Text):
        return encoded
    if len(encoded) > len(tokenized_parts(sample)):
        raise DataError(
            "only one message of a compared reply can be trained, because the chat template rewrites earlier ones: "
            'mark the others with "train": false, or move them into the prompt'
        )
    first, last = replace(encoded[0], parts=1), encoded[-1]
    if isinstance(sample, Choices):
        return [replace(first, choices=sample)]
    if isinstance(sample, Feedback):
        return [replace(first, example=replace(first.example, target=np.array([float(sample.desirable)])))]
    example = Example.of_two(first.example, last.example)
    are_same = first.example.hash == last.example.hash
    if are_same and max(first.length, last.length) == len(first.example.input_ids):  # nothing was truncated
        raise DataError("chosen and rejected have the same tokens, so there is nothing to learn")
    if are_same or not (first.example.supervised and last.example.supervised):
        example = replace(example, labels=np.full_like(example.labels, IGNORED))
    return [replace(first, example=example, length=max(first.length, last.length))]


def _encode_text(rendered: RenderedSample, tokens: Tokens, tokenizer: ChatTokenizer) -> Example:
    ids, is_trained = loss_mask(rendered, tokens, tokenizer)
    if rendered.images:
        is_image = np.isin(ids, cast(Any, tokenizer.processor).image_token_ids)
        is_trained &= ~is_image  # models do not generate images
        if is_image[tokenizer.settings.max_length :].any():
            raise DataError(
                f"the row has {len(ids):,} tokens, and truncation to {tokenizer.settings.max_length:,} would cut an "
                "image; raise --max-length, or use smaller or fewer images"
            )
    return replace(Example.of_text(ids, is_trained), images=rendered.images)


# ---- Sequence to sequence


def _encode_pair(sample: Pair, tokenizer: ChatTokenizer) -> EncodedSample:
    """Returns the prompt for the encoder and the completion for the decoder to predict.

    Each has at most max_length tokens, including the tokenizer's special tokens.
    """
    max_length, parts, lengths = tokenizer.settings.max_length, [], []
    for name, text in (("text", sample.prompt), ("text_target", sample.completion)):
        ids = np.array(tokenizer.tokenizer(**{name: text}, verbose=False)["input_ids"], dtype=np.int32)
        lengths.append(len(ids))
        parts.append(ids if len(ids) <= max_length else np.concatenate([ids[: max_length - 1], ids[-1:]]))
    if not all(lengths):
        raise DataError("prompt or completion has no tokens, so there is nothing to learn")
    source, target = parts
    example = Example.of_two(Example(source, np.full_like(source, IGNORED)), Example(target, target))
    return EncodedSample(sample, example, max(lengths))


# ---- Prompts for reinforcement learning


def _encode_prompt(sample: Prompt, tokenizer: ChatTokenizer) -> EncodedSample:
    if tokenizer.template is None and isinstance(sample.chat, Conversation):
        raise DataError("messages need a chat template, but the tokenizer has none; use a text instead")
    ids, most = prompt_ids(sample.chat, tokenizer), tokenizer.settings.max_length
    if not 0 < len(ids) <= most:
        raise DataError(f"the prompt has {len(ids):,} tokens; expected 1 to {most:,}. Cut it, or raise --max-length")
    input_ids = np.array(ids, dtype=np.int32)
    return EncodedSample(replace(sample, ids=ids), Example(input_ids, np.full_like(input_ids, IGNORED)), len(ids))


# ---- Labels: the tokenizer adds its special tokens, such as [CLS] and [SEP]


def _labels_of(tokenizer: ChatTokenizer) -> Labels:
    assert tokenizer.settings.labels is not None
    return tokenizer.settings.labels


def _encode_labelled(sample: Labelled, tokenizer: ChatTokenizer) -> EncodedSample:
    """Encodes a text, two texts or a conversation with its target, which is arbitrary without a label."""
    labels, max_length, second_start = _labels_of(tokenizer), tokenizer.settings.max_length, 0
    target = labels.target(sample.label) if sample.label is not None else np.zeros(labels.targets)
    if sample.messages:
        if tokenizer.template is None:
            raise DataError("messages need a chat template, but the tokenizer has none; use text instead")
        ids = tokenizer.token_ids(tokenizer.render(sample.messages))
        length = len(ids)
    else:
        encode, pair = tokenizer.tokenizer, (sample.text, *([] if sample.second is None else [sample.second]))
        length = len(encode(*pair, verbose=False)["input_ids"])
        encoding = encode(*pair, truncation=True, max_length=max_length, return_token_type_ids=True, verbose=False)
        ids, segments = encoding["input_ids"], list(encoding["token_type_ids"])
        second_start = segments.index(1) if 1 in segments else 0
    input_ids = np.array(ids[:max_length], dtype=np.int32)
    if not len(input_ids):
        raise DataError("the text has no tokens, so there is nothing to learn")
    example = Example(input_ids, np.full_like(input_ids, IGNORED), second_start=second_start, target=target)
    return EncodedSample(sample, example, length)


def _encode_tagged(sample: Tagged, tokenizer: ChatTokenizer) -> EncodedSample:
    """Encodes words with their tags, which are arbitrary for a sample without tags."""
    labels, (input_ids, firsts, length) = _labels_of(tokenizer), first_tokens(sample.tokens, tokenizer)
    tags = np.full_like(input_ids, IGNORED)
    values = [0] * len(firsts) if sample.tags is None else [labels.index(tag) for tag in sample.tags]
    for first, value in zip(firsts, values, strict=True):
        if first >= 0:
            tags[first] = value
    return EncodedSample(sample, Example(input_ids, tags), length)


def first_tokens(words: Sequence[str], tokenizer: ChatTokenizer) -> tuple[Int32, list[int], int]:
    """Returns the ids of the words joined by spaces, the index of each word's first token, and the untruncated length.

    The index is -1 for a word that is truncated or that the tokenizer drops completely.
    """
    if not tokenizer.tokenizer.is_fast:
        raise DataError("token-classification needs the character offsets of a fast tokenizer; use a model with one")
    max_length = tokenizer.settings.max_length
    ends = np.cumsum([len(word) + 1 for word in words]) - 1  # of each word in the text
    text = " ".join(words)
    options: dict[str, Any] = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    encoding = tokenizer.tokenizer(text, **options)
    length = len(encoding["input_ids"])
    if length > max_length:
        encoding = tokenizer.tokenizer(text, truncation=True, max_length=max_length, **options)
    firsts = [-1] * len(words)
    spans = zip(encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True)
    for index, ((start, end), is_special) in enumerate(spans):
        if is_special or start == end:
            continue
        word = int(np.searchsorted(ends, end))  # a token may begin with the space before its word
        if firsts[word] < 0 and text[start:end].strip():
            firsts[word] = index
    return np.array(encoding["input_ids"], dtype=np.int32), firsts, length


# ---- Prompts and replies of samples, for generation and display


def prompt_ids(sample: Conversation | Pair, tokenizer: Any) -> list[int]:
    """Returns the prompt ids for generating the sample's last reply."""
    chat_tokenizer = tokenizer if isinstance(tokenizer, ChatTokenizer) else ChatTokenizer.of(tokenizer)
    if chat_tokenizer.template is None and isinstance(sample, Pair):
        return chat_tokenizer.bos_ids + chat_tokenizer.token_ids(sample.prompt)
    chat = fit_to_template(to_conversation(sample), chat_tokenizer)
    return chat_tokenizer.prompt_ids(chat.messages[: last_reply(chat)], chat.tools)


def last_reply(chat: Conversation) -> int | None:
    """Returns the index of the last trained reply; None if the conversation has no reply."""
    return max(chat.trained_replies or chat.replies, default=None)


def reply_text(sample: Sample, tokenizer: Any) -> str:
    """Returns the last trained text; for tool calls, their rendering by the template."""
    if isinstance(sample, Text):
        return sample.text
    if isinstance(sample, Pair):
        return sample.completion
    index = last_reply(sample)
    assert index is not None  # rows without a reply are rejected
    message = sample.messages[index]
    if "tool_calls" not in message:
        return str(message["content"])
    ids = encode_sample(replace(sample, messages=sample.messages[: index + 1]), tokenizer, sys.maxsize).input_ids
    return str(tokenizer.decode(ids[len(prompt_ids(sample, tokenizer)) :].tolist(), skip_special_tokens=True))


def preview(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Returns (text, is trained) pieces in order: the decoded example with its special tokens.

    All tokens of an image are one piece, such as [image 640x480].
    """
    ids, sizes = example.input_ids.tolist(), [(image.width, image.height) for image in example.images]
    owners = image_owners(tokenizer, ids, sizes) if sizes else [-1] * len(ids)
    pieces = []
    end, previous = 0, ""
    for (is_trained, image), run in groupby(zip((example.labels != IGNORED).tolist(), owners, strict=True)):
        end += len(list(run))
        # Decode all tokens so far and remove the previous text: a run decoded alone would lose its leading space.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        shown = text[len(previous) :] if image < 0 else "[image {}x{}]".format(*sizes[image])
        pieces.append((shown, is_trained))
        previous = text
    return pieces
