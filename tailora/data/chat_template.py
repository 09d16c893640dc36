"""Renders a sample to text with the chat template, and finds the spans of the text that are trained.

The replies of the assistant, which may be tool calls, are found from the template itself:
  - a template with {% generation %} marks them;
  - any other is rendered twice per reply: up to the reply (as `generate` would begin) and up to its end. Both must be
    prefixes of the whole text. Where a template rewrites earlier turns they are not, and that reply is read but not
    trained.
A reply's span ends with its end-of-turn token; the model never generates what the template writes after it.

Templates leave out what they do not know. Tools, calls and results that a template does not write are an error.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

from jinja2.exceptions import TemplateError
from tokenizers.models import BPE, WordLevel, WordPiece
from transformers.utils.chat_template_utils import render_jinja_template

from tailora.data.messages import REASONING, SURROGATE, Messages, Tools
from tailora.data.schemas import Conversation, Pair, Sample, Text
from tailora.errors import DataError

# ---- A tokenizer and its chat template

MOST_CACHED = 100  # characters of a text whose ids are kept; the prompts of all rows would fill the memory


class Tokens(NamedTuple):
    """ids, and where each token starts and ends in the text, in characters; None if the tokenizer cannot tell."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How samples are written, and what of them is trained. The names are those of `TrainConfig`, and of TRL.

    documents: whether examples of plain texts hold one text each, or what lies side by side when all are joined.
    system: the system message of conversations that have none.
    assistant_only_loss: train the replies of a conversation, not all of it. completion_only_loss: train completions,
    not their prompts. None: yes to both, except that completion_only_loss=False trains everything.
    """

    system: str | None = None
    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    documents: Literal["isolated", "concatenated"] = "isolated"

    @property
    def trains_replies_alone(self) -> bool:
        if self.assistant_only_loss is not None:
            return self.assistant_only_loss
        return self.completion_only_loss is not False


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """What the steps below need to know about a tokenizer, looked up once, and how samples are to be written.

    bos_ids: what the tokenizer writes before a text, [BOS] or nothing.
    special_tokens: special tokens, which may end a turn.
    is_local: the tokens of a text do not depend on what comes much later in it. A Unigram model weighs the whole text.
    cache: ids by text, for short texts that are repeated, such as the header of a reply.
    """

    tokenizer: Any
    template: str | None
    bos_ids: list[int]
    eos: str | None
    eos_id: int | None
    special_ids: frozenset[int]
    special_tokens: tuple[str, ...]
    is_local: bool
    options: SampleOptions = SampleOptions()
    cache: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, options: SampleOptions | None = None) -> Self:
        """Raises DataError if the tokenizer has several chat templates and no default."""
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        try:
            template = str(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        except ValueError as error:
            raise DataError(f"the tokenizer has several chat templates and no default: {error}") from None
        bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        start = next((start for start in range(len(full)) if full[start : start + len(bare)] == bare), 0)
        return cls(
            tokenizer=tokenizer,
            template=template,
            bos_ids=list(full[:start]),
            eos=tokenizer.eos_token,
            eos_id=tokenizer.eos_token_id,
            special_ids=frozenset(special),
            special_tokens=tuple(sorted({str(name) for name in tokenizer.convert_ids_to_tokens(sorted(special))})),
            is_local=tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, BPE | WordPiece | WordLevel),
            options=options or SampleOptions(),
        )

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """Returns the tokens of every text as it is, without added special tokens."""
        if not texts:
            return []
        fast = self.tokenizer.is_fast
        output = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast, verbose=False
        )
        offsets = output["offset_mapping"] if fast else [None] * len(texts)
        return [Tokens(*pair) for pair in zip(output["input_ids"], offsets, strict=True)]

    def token_ids(self, text: str) -> list[int]:
        ids = self.cache.get(text)
        if ids is None:
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if len(text) <= MOST_CACHED:
                self.cache[text] = ids
        return ids

    def render(self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = False) -> str:
        """Returns the template's text for the messages. Raises DataError with the template's own words if it fails."""
        with _template_errors():
            options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "tools": tools}
            return _checked(str(self.tokenizer.apply_chat_template(_with_thinking(messages), **options)))

    def render_generation_spans(self, chat: Conversation) -> tuple[str, list["Span"]]:
        """Returns the template's text, and the spans between {% generation %} and {% endgeneration %}."""
        with _template_errors():
            (text,), (spans,) = render_jinja_template(
                conversations=[_with_thinking(chat.messages)],
                tools=chat.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            text = _checked(str(text))
        return text, [(start, end) for start, end in spans]


def _with_thinking(messages: Messages) -> Messages:
    """Returns messages with their reasoning under both names that templates read."""
    return [{"thinking": message[REASONING], **message} if REASONING in message else message for message in messages]


@contextmanager
def _template_errors() -> Iterator[None]:
    """Turns what the code in a template raises into a DataError."""
    try:
        yield
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        cause = str(error) or type(error).__name__
        raise DataError(f"the chat template refuses this conversation: {cause}") from None


def _checked(text: str) -> str:
    if not text.isascii() and SURROGATE.search(text):
        raise ValueError("it writes half of a surrogate pair, which no tokenizer reads")
    return text


# ---- A sample -> its text and the trained spans

Span = tuple[int, int]  # start and end, in characters
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class RenderedSample:
    """text, and the spans of it that are trained.

    add_bos: the tokenizer's BOS goes before the text, since no template has written it.
    add_eos: EOS goes after the text, since it does not end with one.
    untrained_replies: how many replies are not trained, because the template rewrites them or nothing comes before.
    """

    text: str
    trained_spans: list[Span]
    add_bos: bool = False
    add_eos: bool = False
    untrained_replies: int = 0

    def beginning(self, size: int) -> "RenderedSample":
        """Returns the first `size` characters, and the spans in them."""
        if len(self.text) <= size:
            return self
        spans = [(start, min(end, size)) for start, end in self.trained_spans if start < size]
        return replace(self, text=self.text[:size], trained_spans=spans, add_eos=False)


def render_sample(sample: Sample, tokenizer: ChatTokenizer) -> RenderedSample:
    """Raises DataError with the cause if the sample cannot be rendered or nothing of it can be trained."""
    if isinstance(sample, Text):
        return RenderedSample(sample.text, [(0, len(sample.text))], add_bos=True, add_eos=tokenizer.eos is not None)
    if tokenizer.template is not None:
        return _render_chat(to_conversation(sample), tokenizer)
    if isinstance(sample, Conversation):
        raise DataError(
            "the tokenizer has no chat template to write messages with: take the instruct version of the model, "
            "set tokenizer.chat_template, or give the data as prompt and completion"
        )
    if tokenizer.options.assistant_only_loss:
        raise DataError(
            "--assistant-only-loss needs messages, and the row is prompt and completion, for which there is no chat "
            "template: leave it out"
        )
    _check_eos(tokenizer)
    text = sample.prompt + sample.completion
    start = 0 if tokenizer.options.completion_only_loss is False else len(sample.prompt)
    return RenderedSample(text, [(start, len(text))], add_bos=True, add_eos=True)


def to_conversation(sample: Conversation | Pair) -> Conversation:
    """Returns a pair as a user turn and its reply, without the white space around them: the template writes its own."""
    if isinstance(sample, Conversation):
        return sample
    messages = [
        {"role": "user", "content": sample.prompt.strip()},
        {"role": "assistant", "content": sample.completion.strip()},
    ]
    return Conversation(messages, first=1)


def with_system(sample: Sample, tokenizer: ChatTokenizer) -> Sample:
    """Returns the sample with the system message of the options, unless it has one of its own or is plain text.

    Raises DataError if there is no chat template to write it with.
    """
    system = tokenizer.options.system
    if system is None or isinstance(sample, Text):
        return sample
    if tokenizer.template is None:
        raise DataError("--system needs a chat template, which the tokenizer does not have: leave it out")
    chat = to_conversation(sample)
    if any(message["role"] in ("system", "developer") for message in chat.messages):
        return chat
    return replace(
        chat,
        messages=[{"role": "system", "content": system}, *chat.messages],
        first=chat.first + (chat.first > 0),
        untrained=frozenset(index + 1 for index in chat.untrained),
    )


def _check_eos(tokenizer: ChatTokenizer) -> None:
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer has no EOS token, so the model could not learn to stop: set tokenizer.eos_token")


def _render_chat(chat: Conversation, tokenizer: ChatTokenizer) -> RenderedSample:
    chat = fit_to_template(chat, tokenizer)
    if tokenizer.options.completion_only_loss is False:
        chat = replace(chat, first=0)
    if not tokenizer.options.trains_replies_alone:
        return _render_all(chat, tokenizer)
    if _marks_replies(tokenizer):
        text, marked = tokenizer.render_generation_spans(chat)
        spans = _marked_reply_spans(chat, text, marked, tokenizer)
    else:
        text = tokenizer.render(chat.messages, tools=chat.tools)
        spans = [
            span for index in chat.trained_replies if (span := _reply_span(chat, index, text, tokenizer)) is not None
        ]
    all_turns = (_end_turn(text, span, tokenizer) for span in spans)
    turns = [(start, end, has_end) for start, end, has_end in all_turns if start < end]
    if not turns and any(chat.replies):
        raise DataError(
            "no reply can be located: with the reply in place, the chat template no longer begins with the prompt that "
            "generation begins with (some drop the system message then, the reasoning of calls before it, or a thought "
            "that they have opened); leave out what is dropped, or put {% generation %} ... {% endgeneration %} around "
            "the reply in the template"
        )
    if not turns:
        raise DataError("nothing to learn: the conversation has no reply, or only one that it begins with")
    _, last_end, has_end = turns[-1]
    if not has_end:
        _check_eos(tokenizer)
    return RenderedSample(
        text=text[:last_end],  # nothing is trained after it
        trained_spans=[(start, end) for start, end, _ in turns],
        add_eos=not has_end,
        untrained_replies=max(0, len(chat.trained_replies) - len(turns)),
    )


def _render_all(chat: Conversation, tokenizer: ChatTokenizer) -> RenderedSample:
    """Returns a conversation of which everything is trained, from its completion on if it has one."""
    if chat.untrained:
        raise DataError(
            f"message {min(chat.untrained)} is not to be trained, which is possible only where replies alone are: "
            "leave out --no-assistant-only-loss, or train and weight"
        )
    text = tokenizer.render(chat.messages, tools=chat.tools)
    last = chat.messages[-1]
    if last["role"] == "assistant" and (part := _left_out(last, text)) is not None:
        raise _not_written_error(part, len(chat.messages) - 1)
    begins_with_reply = chat.messages[chat.first]["role"] == "assistant"
    before = chat.messages[: chat.first]
    prompt = tokenizer.render(before, tools=chat.tools, add_generation_prompt=begins_with_reply) if before else ""
    if not text.startswith(prompt):
        raise DataError("the chat template rewrites the prompt once the completion is there: it cannot be told apart")
    start, end, has_end = _end_turn(text, (len(prompt), len(text)), tokenizer)
    if not has_end:
        _check_eos(tokenizer)
    return RenderedSample(text=text[:end], trained_spans=[(start, end)], add_eos=not has_end)


def _marks_replies(tokenizer: ChatTokenizer) -> bool:
    return GENERATION_MARK.search(tokenizer.template or "") is not None


def _marked_reply_spans(chat: Conversation, text: str, spans: list[Span], tokenizer: ChatTokenizer) -> list[Span]:
    """Returns the spans of the replies that are trained, of those that the template marks."""
    if len(spans) != len(chat.replies):
        if len(chat.trained_replies) < len(chat.replies):
            raise DataError(
                f"the chat template marks {len(spans)} replies where the conversation has {len(chat.replies)}"
            )
        return [_with_next_special(text, span, tokenizer) for span in spans]
    by_reply = dict(zip(chat.replies, spans, strict=True))
    trained = []
    for index in chat.trained_replies:
        start, end = by_reply[index]
        part = _left_out(chat.messages[index], text[start:end])
        if part is None:
            trained.append(_with_next_special(text, (start, end), tokenizer))
        elif index == len(chat.messages) - 1:
            raise _not_written_error(part, index)
    return trained


def _reply_span(chat: Conversation, index: int, text: str, tokenizer: ChatTokenizer) -> Span | None:
    """Returns the span of message `index` in the text, found by rendering the messages before it and up to its end.

    None if the template rewrites it when the chat goes on. Raises DataError if the template leaves a part of it out.
    """
    messages = chat.messages
    if index == 0:
        return None  # no model is ever asked to speak first
    before = tokenizer.render(messages[:index], tools=chat.tools, add_generation_prompt=True)
    if not text.startswith(before):
        return None
    is_last = index == len(messages) - 1
    up_to_end = text if is_last else tokenizer.render(messages[: index + 1], tools=chat.tools)
    # Some templates close the whole chat, not the turn, with EOS.
    for prefix in (up_to_end, up_to_end.removesuffix(tokenizer.eos or "")):
        if text.startswith(prefix) and len(prefix) >= len(before):
            if (part := _left_out(messages[index], prefix[len(before) :])) is not None:
                raise _not_written_error(part, index)
            span = len(before), len(prefix)
            return _with_next_special(text, span, tokenizer) if prefix == up_to_end else span
    return None


def _left_out(message: dict[str, Any], reply: str) -> str | None:
    """Returns which part of a message is not in the text that the template writes for it; None if all is."""
    if str(message.get(REASONING, "")).strip() not in reply:
        return REASONING
    if "tool_calls" in message and message["content"].strip() not in reply:
        return "content beside the tool calls"
    return None


def _not_written_error(part: str, index: int) -> DataError:
    return DataError(
        f"the chat template does not write the {part} of message {index}, so it could not be learned: remove it, or "
        "write it into the content, in the form in which the model is to write it"
    )


def _with_next_special(text: str, span: Span, tokenizer: ChatTokenizer) -> Span:
    """Returns a span that has no special token at its end up to the end of the one that follows, if any.

    It may stand outside of {% generation %}, or begin the next turn: GLM's replies end with the <|user|> after them.
    """
    start, end = span
    if text[start:end].rstrip().endswith(tokenizer.special_tokens):
        return span
    candidates = (token for token in tokenizer.special_tokens if token != tokenizer.tokenizer.bos_token)
    following = max((token for token in candidates if text.startswith(token, end)), key=len, default="")
    return start, end + len(following)


def _end_turn(text: str, span: Span, tokenizer: ChatTokenizer) -> tuple[int, int, bool]:
    """Ends the reply at EOS, or else at the first of the special tokens that close the span.

    Returns its start and end, and whether its last token tells generation to stop.
    """
    start, end = span
    # The special tokens at the end of the reply, with white space between them or not, and where each ends
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


# ---- Tools: arguments in the form that the template reads, and whether it writes all of them

MARK = "zqx{}xqz"  # stands in no template; numbered, and the number cannot be the beginning of another one


def fit_to_template(chat: Conversation, tokenizer: ChatTokenizer) -> Conversation:
    """Returns the conversation with the arguments of tool calls as the template reads them: objects, or JSON text.

    Raises DataError if the template does not write its tools, calls or results, or the calls are outside of the spans
    that it marks as generated.
    """
    is_tool_message = (message["role"] == "tool" or "tool_calls" in message for message in chat.messages)
    if not chat.tools and not any(is_tool_message):
        return chat
    problems = []
    for convert in (_arguments_as_objects, _arguments_as_text):
        candidate = replace(chat, messages=_convert_arguments(chat.messages, convert))
        try:
            missing = _not_written(candidate, convert, tokenizer)
        except DataError as error:
            problems.append(str(error))
            continue
        if not missing:
            return candidate
        problems.insert(0, f"the chat template does not write {missing}: {NO_TOOLS}")
    raise DataError(problems[0])


NO_TOOLS = (
    "take a model whose template supports tools, or write tools and calls into the contents, in the form in which the "
    "model is to call them"
)


def _arguments_as_objects(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _arguments_as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _convert_arguments(messages: Messages, convert: Callable[[Any], Any]) -> Messages:
    def converted(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": convert(function["arguments"])}}

    return [
        {**message, "tool_calls": [converted(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _not_written(chat: Conversation, convert: Callable[[Any], Any], tokenizer: ChatTokenizer) -> str:
    """Returns which tool, call or result the template leaves out, or writes as Python; "" if it writes all as they are.

    Each gets a mark, and the marks are looked for: a name or result may stand elsewhere in the text, too.
    """
    names: list[str] = []  # of what mark number i stands in

    def mark(name: str) -> str:
        names.append(name)
        return MARK.format(len(names) - 1)

    def marked_call(call: dict[str, Any], name: str) -> dict[str, Any]:
        function = call["function"]
        new_name, key = function["name"] + mark(name), mark(f"the arguments of {name}")
        arguments = convert({**_arguments_as_objects(function["arguments"]), key: key})
        return {**call, "function": {**function, "name": new_name, "arguments": arguments}}

    messages, of_calls = [], set[int]()
    for index, message in enumerate(chat.messages):
        if "tool_calls" in message:
            first = len(names)
            calls = [
                marked_call(call, f"tool call {i} of message {index}") for i, call in enumerate(message["tool_calls"])
            ]
            of_calls |= set(range(first, len(names))) if index in chat.trained_replies else set()
            messages.append({**message, "tool_calls": calls})
        elif message["role"] == "tool":
            messages.append({**message, "content": message["content"] + mark(f"the tool result, message {index}")})
        else:
            messages.append(message)
    tools = [
        {**tool, "function": {**tool["function"], "name": tool["function"]["name"] + mark(f"tool {index}")}}
        for index, tool in enumerate(chat.tools or [])
    ]
    marked = replace(chat, messages=messages, tools=tools or None)
    generated = None
    if _marks_replies(tokenizer):
        text, spans = tokenizer.render_generation_spans(marked)
        generated = "".join(text[start:end] for start, end in spans)
    else:
        text = tokenizer.render(messages, tools=marked.tools)
    for number, name in enumerate(names):
        written = MARK.format(number)
        if written not in text or f"'{written}': '{written}'" in text:
            return name
        if generated is not None and number in of_calls and written not in generated:
            return f"{name} between {{% generation %}} and {{% endgeneration %}}"
    return ""
