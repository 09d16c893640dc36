"""The loss mask: which tokens of a sample are trained.

`render_sample` renders the sample as text and finds the trained spans; `loss_mask` maps them to tokens.

Assistant replies, including tool calls, are located with the chat template itself:
  - a template with {% generation %} marks them;
  - any other template renders the conversation twice per reply: up to the reply (the prompt of `generate`) and up to
    its end. Both must be prefixes of the full text. If not, because the template rewrites earlier turns, the reply
    becomes a separate example with the conversation up to it.
A reply's span ends with its end-of-turn token, since the model never generates the text after it. Tokens are trained
only if the model sees the same tokens before them during generation.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tailora.data.chat_template import ChatTokenizer, Span, Tokens, fit_to_template, to_conversation
from tailora.data.dataset import Int32
from tailora.data.images import Image, images_of
from tailora.data.messages import REASONING
from tailora.data.samples import Conversation, Pair, Sample, Text
from tailora.errors import DataError

Bools: TypeAlias = NDArray[np.bool_]

# ---- A sample -> its text and trained spans


@dataclass(frozen=True, slots=True)
class RenderedSample:
    """A text and its trained spans."""

    sample: Sample  # if a conversation became several texts, the part up to the last trained reply
    text: str
    trained_spans: list[Span]
    add_bos: bool = False  # unless the text begins with it; of chats, only processors add what a template omits
    add_eos: bool = False  # because the text does not end with it
    images: tuple[Image, ...] = ()  # those whose placeholders are in the text


def render_sample(sample: Sample, tokenizer: ChatTokenizer) -> list[RenderedSample]:
    """Returns the text of a sample, or several texts for a conversation whose replies need separate renderings.

    Raises DataError with the cause if the sample cannot be rendered or one of its replies cannot be trained.
    """
    if isinstance(sample, Text):
        spans, has_eos = [(0, len(sample.text))], tokenizer.eos is not None
        return [RenderedSample(sample, sample.text, spans, add_bos=True, add_eos=has_eos)]
    if tokenizer.template is not None:
        return _render_chat(sample, tokenizer)
    if isinstance(sample, Conversation):
        raise DataError(
            "messages need a chat template, but the tokenizer has none; use the instruct version of the model, set "
            "tokenizer.chat_template, or provide the data as prompt and completion"
        )
    if tokenizer.settings.assistant_only_loss:
        raise DataError(
            "--assistant-only-loss needs messages or a chat template, but the row has prompt and completion and the "
            "tokenizer has no template; remove --assistant-only-loss"
        )
    _check_eos(tokenizer)
    text = sample.prompt + sample.completion
    start = 0 if tokenizer.settings.completion_only_loss is False else len(sample.prompt)
    return [RenderedSample(sample, text, [(start, len(text))], add_bos=True, add_eos=True)]


def _check_eos(tokenizer: ChatTokenizer) -> None:
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer has no EOS token, so the model cannot learn to stop; set tokenizer.eos_token")


def _render_chat(sample: Conversation | Pair, tokenizer: ChatTokenizer) -> list[RenderedSample]:
    """Returns the full conversation with the replies that it renders as in generation, and the others separately."""
    chat = fit_to_template(to_conversation(sample), tokenizer)
    only_replies, everything = tokenizer.settings.assistant_only_loss, tokenizer.settings.completion_only_loss is False
    if everything:
        chat = replace(chat, first=0)
    if only_replies is False or (only_replies is None and everything):
        return [_render_all(sample, chat, tokenizer)]
    remaining = [index for index in chat.trained_replies if index > 0]  # models do not generate the first message
    if not remaining:
        raise DataError("no reply follows the first message, so there is nothing to learn")
    find = _marked_replies if tokenizer.marks_replies else _unmarked_replies
    size = len(chat.messages)
    rendered: list[RenderedSample] = []
    add_bos = tokenizer.processor is not None
    while remaining:
        part, last = replace(chat, messages=chat.messages[:size]), remaining[-1]
        text, located, spans = find(part, remaining, tokenizer)
        if not located and size == last + 1:
            raise DataError(
                f"message {last} cannot be trained: the chat template renders a different prompt when it is included "
                "than during generation (some templates drop earlier reasoning or an unclosed thinking block). Remove "
                'the dropped part, mark the reply with "train": false, or put {% generation %} ... '
                "{% endgeneration %} around replies in the template"
            )
        is_whole = not rendered and located == remaining
        remaining = [index for index in remaining if index not in located]
        size = last + 1 if last in remaining else max(remaining, default=0) + 1
        turns = [turn for turn in (_end_turn(text, span, tokenizer) for span in spans) if turn[0] < turn[1]]
        if turns:
            _, end, has_end = turns[-1]
            if not has_end:
                _check_eos(tokenizer)
            source = sample if is_whole else replace(part, untrained=frozenset(part.replies) - {*located})
            trained = [turn[:2] for turn in turns]  # nothing is trained after the last one
            images = images_of(part.messages[: max(located) + 1])
            rendered.append(RenderedSample(source, text[:end], trained, add_bos, add_eos=not has_end, images=images))
    if not rendered:
        raise DataError("the chat template renders no text for the replies, so there is nothing to learn")
    return rendered[::-1]


def _render_all(sample: Sample, chat: Conversation, tokenizer: ChatTokenizer) -> RenderedSample:
    """Renders a conversation that is trained completely, or from its completion on if it has one."""
    if chat.untrained:
        raise DataError(
            f"message {min(chat.untrained)} is marked as not trained, which requires training on replies only; remove "
            "--no-assistant-only-loss, or the train and weight keys of the messages"
        )
    text = tokenizer.render(chat.messages, tools=chat.tools)
    last = chat.messages[-1]
    if last["role"] == "assistant" and (part := _missing_part(last, text)) is not None:
        raise _not_written_error(part, len(chat.messages) - 1)
    begins_with_reply = chat.messages[chat.first]["role"] == "assistant"
    before = chat.messages[: chat.first]
    prompt = tokenizer.render(before, tools=chat.tools, add_generation_prompt=begins_with_reply) if before else ""
    if not text.startswith(prompt):
        raise DataError(
            "prompt and completion cannot be separated, because the chat template renders the prompt differently when "
            "the completion follows; remove --no-assistant-only-loss, or use a different template"
        )
    start, end, has_end = _end_turn(text, (len(prompt), len(text)), tokenizer)
    if not has_end:
        _check_eos(tokenizer)
    images, add_bos = images_of(chat.messages), tokenizer.processor is not None
    return RenderedSample(sample, text[:end], [(start, end)], add_bos, add_eos=not has_end, images=images)


Located: TypeAlias = tuple[str, list[int], list[Span]]  # text, replies rendered as in generation, their spans


def _marked_replies(chat: Conversation, replies: list[int], tokenizer: ChatTokenizer) -> Located:
    """Finds the replies that the template renders completely between its marks."""
    text, marked = tokenizer.render_generation_spans(chat)
    if len(marked) != len(chat.replies):
        raise DataError(
            f"the chat template marks {len(marked)} replies, but the chat has {len(chat.replies)}; put "
            "{% generation %} ... {% endgeneration %} around every reply in the template"
        )
    located, spans = [], []
    for index, (start, end) in zip(chat.replies, marked, strict=True):
        if index not in replies:
            continue
        part = _missing_part(chat.messages[index], text[start:end])
        if part is None:
            located.append(index)
            spans.append(_with_next_special(text, (start, end), tokenizer))
        elif index == len(chat.messages) - 1:
            raise _not_written_error(part, index)
    return text, located, spans


def _unmarked_replies(chat: Conversation, replies: list[int], tokenizer: ChatTokenizer) -> Located:
    """Finds the replies that directly follow their prompt in the text of the full conversation.

    Raises DataError if the template drops a part of one.
    """
    text = tokenizer.render(chat.messages, tools=chat.tools)
    located, spans, prompt = [], [], ""
    for index in replies:
        prompt = tokenizer.render(chat.messages[:index], tools=chat.tools, add_generation_prompt=True)
        is_last = index == len(chat.messages) - 1
        up_to_end = text if is_last else tokenizer.render(chat.messages[: index + 1], tools=chat.tools)
        # Some templates close the chat instead of the turn with EOS.
        for prefix in (up_to_end, up_to_end.removesuffix(tokenizer.eos or "")):
            if text.startswith(prefix) and prefix.startswith(prompt):
                if (part := _missing_part(chat.messages[index], prefix[len(prompt) :])) is not None:
                    raise _not_written_error(part, index)
                located.append(index)
                span = len(prompt), len(prefix)
                spans.append(_with_next_special(text, span, tokenizer) if prefix == up_to_end else span)
                break
    if not located and replies[-1] == len(chat.messages) - 1:
        reply = _after_header(prompt, text, chat.messages[-1], tokenizer)
        if reply:
            return prompt + reply, replies[-1:], [(len(prompt), len(prompt + reply))]
    return text, located, spans


def _after_header(prompt: str, text: str, message: dict[str, Any], tokenizer: ChatTokenizer) -> str:
    """Returns the reply at the end of a text that does not begin with the prompt, or "" if it cannot be found.

    It follows the header at the end of the prompt. Mistral's template drops the system message after the last reply.
    """
    start = max((prompt.rfind(token) for token in tokenizer.special_tokens), default=-1)
    reply = text.rpartition(prompt[start:])[2] if start >= 0 and prompt[start:] in text else ""
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    parts = [message["content"].strip(), message.get(REASONING, "").strip(), *names]
    return reply if len(names) <= 1 and all(part in reply for part in parts) else ""


def _missing_part(message: dict[str, Any], reply: str) -> str | None:
    """Returns the part of a message that is missing in its rendered text; None if it is complete."""
    if str(message.get(REASONING, "")).strip() not in reply:
        return REASONING
    if "tool_calls" in message and message["content"].strip() not in reply:
        return "content next to the tool calls"
    return None


def _not_written_error(part: str, index: int) -> DataError:
    return DataError(
        f"the chat template drops the {part} of message {index}, so it cannot be trained; remove it, or write it into "
        "the content in the format that the model should generate"
    )


def _with_next_special(text: str, span: Span, tokenizer: ChatTokenizer) -> Span:
    """Extends a span without a special token at its end by the special token that follows, if any.

    That token may be outside of {% generation %}, or begin the next turn: GLM's replies end with the next <|user|>.
    """
    start, end = span
    if text[start:end].rstrip().endswith(tokenizer.special_tokens):
        return span
    candidates = (token for token in tokenizer.special_tokens if token != tokenizer.tokenizer.bos_token)
    following = max((token for token in candidates if text.startswith(token, end)), key=len, default="")
    return start, end + len(following)


def _end_turn(text: str, span: Span, tokenizer: ChatTokenizer) -> tuple[int, int, bool]:
    """Ends the reply at EOS, or else at the first of the special tokens that close the span.

    Returns its start and end, and whether its last token stops generation.
    """
    start, end = span
    # The special tokens at the end of the reply, possibly separated by whitespace, with the end of each
    closing = []
    rest = text[start:end].rstrip()
    while rest.endswith(tokenizer.special_tokens):
        token = max((token for token in tokenizer.special_tokens if rest.endswith(token)), key=len)
        closing.append((token, start + len(rest)))
        rest = rest[: -len(token)].rstrip()
    if closing:
        eos_ends = [token_end for token, token_end in closing if token == tokenizer.eos]
        return start, min(eos_ends or [token_end for _, token_end in closing]), True
    return start, end, False


# ---- Spans -> tokens


def loss_mask(rendered: RenderedSample, tokens: Tokens, tokenizer: ChatTokenizer) -> tuple[Int32, Bools]:
    """Returns token ids, including BOS and EOS, and whether each one is trained; both (length,).

    The tokens of the full text are used if its prompts have the same ones as in generation. Otherwise, prompts and
    replies are tokenized separately.
    """
    ids, mask = _mask_from_offsets(rendered, tokens, tokenizer) or _mask_from_pieces(rendered, tokenizer)
    bos, eos = tokenizer.bos_ids, [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if rendered.add_bos and ids[: len(bos)].tolist() != bos:
        ids, mask = np.concatenate([bos, ids]), np.concatenate([np.zeros(len(bos), bool), mask])
    if rendered.add_eos and eos and ids[-1:].tolist() != eos:
        ids, mask = np.append(ids, eos), np.append(mask, True)
    return ids.astype(np.int32), mask


def _mask_from_offsets(
    rendered: RenderedSample, tokens: Tokens, tokenizer: ChatTokenizer
) -> tuple[Int32, Bools] | None:
    """Returns None if the prompts have different tokens in generation, or if there are no offsets.

    Only replies that begin before max_length are checked, because the others are truncated.
    """
    if len(tokens.offsets) < len(tokens.ids):
        return None
    mask = np.zeros(len(tokens.ids), bool)
    for start, end in rendered.trained_spans:
        first, last = np.searchsorted(tokens.offsets[:, 1], (start, end), side="right")
        mask[first:last] = True
        if first >= tokenizer.settings.max_length:
            continue
        # Tokenizers split a text at special tokens first, so only the tokens after the last one can differ.
        ids = tokens.ids[:first].tolist()
        split = next((i for i in range(first - 1, 0, -1) if ids[i] in tokenizer.special_ids), 0)
        split_start = tokens.offsets[split, 0] if split else 0
        if tokenizer.token_ids(rendered.text[split_start:start]) != ids[split:]:
            return None
    return tokens.ids, mask


def _mask_from_pieces(rendered: RenderedSample, tokenizer: ChatTokenizer) -> tuple[Int32, Bools]:
    ids: list[int] = []
    mask: list[bool] = []
    text, previous_end = rendered.text, 0
    for start, end in [*rendered.trained_spans, (len(text), len(text))]:
        for piece, is_trained in ((text[previous_end:start], False), (text[start:end], True)):
            piece_ids = tokenizer.token_ids(piece) if piece else []
            ids += piece_ids
            mask += [is_trained] * len(piece_ids)
        previous_end = end
    return np.array(ids, np.int32), np.array(mask, bool)
