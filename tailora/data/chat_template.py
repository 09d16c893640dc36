"""The tokenizer and its chat template: messages to text, system messages, and tools in the form the template reads.

Templates leave out what they do not know. Tools, calls and results for which a template has no place become text.
`loss_mask` finds which parts of the text are trained.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tailora.data.dataset import Int32, Int64
from tailora.data.labels import Labels
from tailora.data.messages import REASONING, SURROGATE, Messages, Tools
from tailora.data.schemas import (
    AUTO,
    AnySample,
    Choices,
    Conversation,
    Feedback,
    Labelled,
    Pair,
    Preference,
    Tagged,
    Text,
)
from tailora.errors import DataError

# ---- A tokenizer, its chat template, and the settings by which rows become examples

Span = tuple[int, int]  # start and end, in characters
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
MOST_CACHED = 100  # characters of a text whose ids are kept; the prompts of all rows would fill the memory


class Tokens(NamedTuple):
    """The tokens of a text, and where each starts and ends in it, in characters."""

    ids: Int32  # (length,)
    offsets: Int64  # (length, 2); (0, 2) if the tokenizer cannot tell


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How rows become examples, and which examples are held out. `TrainConfig` and TRL use the same names.

    field: key of the schema -> column.
    task: decides which schemas rows may have; auto infers it from the rows.
    labels: what the head of the model predicts, for tasks that have one.
    max_length: most tokens of an example. Longer ones are cut, texts that are trained on are divided.
    system: the system message of conversations that have none.
    assistant_only_loss: train the replies of a conversation, not all of it. completion_only_loss: train completions,
        not their prompts. None: yes to both, except that completion_only_loss=False trains everything.
    documents: whether examples of plain texts hold one text each, or pieces of all texts joined.
    validation_split, seed: share of the examples to hold out, and which.
    skip_bad_rows: leave out rows that cannot be used, and report them, instead of raising an error.
    for_evaluation: read a pair of replies as choices, where the chosen one is right, to evaluate a language model.
    """

    field: Mapping[str, str] | None = None
    task: str = AUTO
    labels: Labels | None = None
    max_length: int = 1024
    system: str | None = None
    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    documents: Literal["isolated", "concatenated"] = "isolated"
    validation_split: float = 0.05
    seed: int = 0
    skip_bad_rows: bool = False
    for_evaluation: bool = False

    @property
    def trains_replies_alone(self) -> bool:
        if self.assistant_only_loss is not None:
            return self.assistant_only_loss
        return self.completion_only_loss is not False


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """What the steps below need to know about a tokenizer, looked up once, and the settings of the data.

    bos_ids: what the tokenizer writes before a text, [BOS] or nothing.
    special_tokens: special tokens, which may end a turn.
    cache: ids by text, for short texts that are repeated, such as the header of a reply.
    """

    tokenizer: Any
    template: str | None
    bos_ids: list[int]
    eos: str | None
    eos_id: int | None
    special_ids: frozenset[int]
    special_tokens: tuple[str, ...]
    settings: DataSettings
    cache: dict[str, list[int]] = field(default_factory=dict)

    @property
    def marks_replies(self) -> bool:
        """Whether the template marks the replies with {% generation %}."""
        return GENERATION_MARK.search(self.template or "") is not None

    @classmethod
    def of(cls, tokenizer: Any, settings: DataSettings | None = None) -> Self:
        """Raises DataError if the tokenizer has several chat templates and no default.

        A model with a head for labels reads no more tokens than the tokenizer allows.
        """
        settings = settings or DataSettings()
        if settings.labels is not None:
            most = min(settings.max_length, int(tokenizer.model_max_length))
            settings = replace(settings, task=settings.labels.task, max_length=most)
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
            settings=settings,
        )

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """Returns the tokens of every text as it is, without added special tokens."""
        if not texts:
            return []
        fast = self.tokenizer.is_fast
        output = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast, verbose=False
        )
        offsets = output["offset_mapping"] if fast else [[]] * len(texts)
        return [
            Tokens(np.array(ids, np.int32), np.array(pairs, np.int64).reshape(-1, 2))
            for ids, pairs in zip(output["input_ids"], offsets, strict=True)
        ]

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

    def render_generation_spans(self, chat: Conversation) -> tuple[str, list[Span]]:
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


def to_conversation(sample: Conversation | Pair) -> Conversation:
    """Returns a pair as a user turn and its reply, without the white space around them: the template writes its own."""
    if isinstance(sample, Conversation):
        return sample
    messages = [
        {"role": "user", "content": sample.prompt.strip()},
        {"role": "assistant", "content": sample.completion.strip()},
    ]
    return Conversation(messages, first=1)


def with_system(sample: AnySample, tokenizer: ChatTokenizer) -> AnySample:
    """Returns the sample with the system message of the settings, unless it has one of its own or is plain text.

    Raises DataError if there is no chat template to write it with.
    """
    match sample:
        case Choices():
            return replace(sample, options=tuple(_with_system(option, tokenizer) for option in sample.options))
        case Preference():
            return Preference(_with_system(sample.chosen, tokenizer), _with_system(sample.rejected, tokenizer))
        case Feedback():
            return replace(sample, reply=_with_system(sample.reply, tokenizer))
        case Text() | Labelled() | Tagged():
            return sample
    return _with_system(sample, tokenizer)


def _with_system(sample: Conversation | Pair, tokenizer: ChatTokenizer) -> Conversation | Pair:
    system = tokenizer.settings.system
    if system is None:
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


# ---- Tools: in the form that the template reads

MARK = "zqx{}xqz"  # stands in no template; numbered, and the number cannot be the beginning of another one
NO_TOOLS = (
    "use a model whose template supports tools, or write tools and calls into the contents, in the form in which the "
    "model is to call them"
)


def fit_to_template(chat: Conversation, tokenizer: ChatTokenizer) -> Conversation:
    """Returns the conversation with tools, calls and results in a form that the template writes.

    Arguments of calls become objects, or JSON text. If the template has no place for tools, they become text.
    Raises DataError if the template writes none of these forms, or calls outside of the spans that it marks as
    generated.
    """
    if not has_tools(chat):
        return chat
    template, forms = tokenizer.template or "", [_with_objects, _with_json]
    if "tool_calls" not in template or not re.search(r"\btools\b", template):
        forms.append(tools_as_text)
    problems = []
    for form in forms:
        try:
            missing = _not_written(chat, form, tokenizer)
        except DataError as error:
            problems.append(str(error))
            continue
        if not missing:
            return form(chat)
        problems.insert(0, f"the chat template does not write {missing}: {NO_TOOLS}")
    raise DataError(problems[0])


def has_tools(chat: Conversation) -> bool:
    return bool(chat.tools) or any(m["role"] == "tool" or "tool_calls" in m for m in chat.messages)


def _with_objects(chat: Conversation) -> Conversation:
    return _with_arguments(chat, lambda value: json.loads(value) if isinstance(value, str) else value)


def _with_json(chat: Conversation) -> Conversation:
    return _with_arguments(chat, _as_json)


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_arguments(chat: Conversation, convert: Callable[[Any], Any]) -> Conversation:
    def converted(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": convert(function["arguments"])}}

    messages = [
        {**message, "tool_calls": [converted(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in chat.messages
    ]
    return replace(chat, messages=messages)


# The form of Qwen 2.5 and Hermes
CALL_TEXT = '<tool_call>\n{{"name": {}, "arguments": {}}}\n</tool_call>'
TOOLS_TEXT = "You can call these functions:\n<tools>\n{}\n</tools>\nWrite a call as\n" + CALL_TEXT.replace("{}", "...")
RESULT_TEXT = "<tool_response>\n{}\n</tool_response>"


def tools_as_text(chat: Conversation) -> Conversation:
    """Returns tools as a part of the system message, calls as a part of the replies, and results as user messages."""
    messages: Messages = []
    numbers = []  # of each message, in the new list
    if chat.tools:
        messages.append({"role": "system", "content": TOOLS_TEXT.format("\n".join(map(_as_json, chat.tools)))})
    for index, message in enumerate(chat.messages):
        previous = messages[-1] if messages else None
        if message["role"] == "system" and previous and index == 0:
            previous["content"] = f"{message['content']}\n\n{previous['content']}"
        elif message["role"] == "tool":
            content = RESULT_TEXT.format(message["content"])
            if previous and chat.messages[index - 1]["role"] == "tool":
                previous["content"] += f"\n{content}"
            else:
                messages.append({"role": "user", "content": content})
        else:
            functions = [call["function"] for call in message.get("tool_calls", ())]
            calls = [CALL_TEXT.format(_as_json([f["name"]])[1:-1], _as_json(f["arguments"])) for f in functions]
            content = "\n".join(filter(None, [message["content"], *calls]))
            messages.append({k: v for k, v in message.items() if k != "tool_calls"} | {"content": content})
        numbers.append(len(messages) - 1)
    first = numbers[chat.first] if chat.first < len(numbers) else len(messages)
    return Conversation(messages, first, frozenset(numbers[index] for index in chat.untrained))


def _not_written(chat: Conversation, form: Callable[[Conversation], Conversation], tokenizer: ChatTokenizer) -> str:
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
        return {**call, "function": {**function, "name": new_name, "arguments": {**function["arguments"], key: key}}}

    messages, of_calls = [], set[int]()
    for index, message in enumerate(_with_objects(chat).messages):
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
    marked = form(replace(chat, messages=messages, tools=tools or None))
    generated = None
    if tokenizer.marks_replies:
        text, spans = tokenizer.render_generation_spans(marked)
        generated = "".join(text[start:end] for start, end in spans)
    else:
        text = tokenizer.render(marked.messages, tools=marked.tools)
    for number, name in enumerate(names):
        written = MARK.format(number)
        if written not in text or f"'{written}': '{written}'" in text:
            return name
        if generated is not None and number in of_calls and written not in generated:
            return f"{name} between {{% generation %}} and {{% endgeneration %}}"
    return ""
