"""The tokenizer and its chat template: messages to text, system messages, and tools in the format of the template.

Templates drop everything they do not know. If a template does not support tools, then tools, calls and results are
written as text. `loss_mask` determines which parts of the text are trained.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from tailora.data.dataset import Int32, Int64
from tailora.data.image_processor import added_start, text_tokenizer
from tailora.data.image_tokens import image_placeholders, media_ids
from tailora.data.images import Image, images_of, replace_images
from tailora.data.labels import Labels
from tailora.data.messages import REASONING, SURROGATE, TEXT_PART, Messages, Tools
from tailora.data.samples import Choices, Conversation, Feedback, Pair, Preference, Prompt
from tailora.data.schemas import AUTO
from tailora.errors import DataError

# ---- A tokenizer, its chat template, and the settings of the data

Span = tuple[int, int]  # start and end, in characters
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
PIECE = 2**16  # characters to tokenize at once: many megabytes would take minutes, and gigabytes of memory
MOST_CACHED = 100  # characters of a cached text; caching the prompts of all rows would fill the memory
MOST_SIZES = 256  # sizes whose placeholders are kept; the text of many large images has megabytes


class Tokens(NamedTuple):
    """The tokens of a text, with start and end of each in characters."""

    ids: Int32  # (length,)
    offsets: Int64  # (length, 2); (0, 2) if the tokenizer has no offsets


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Settings for converting rows to examples and for the split. `TrainConfig` and TRL use the same names."""

    field: Mapping[str, str] | None = None  # key of the schema -> column
    task: str = AUTO  # determines the possible schemas
    labels: Labels | None = None  # of the model's head, for tasks that have one
    max_length: int = 1024  # tokens per example; longer ones are truncated, training texts are split
    system: str | None = None  # the system message for conversations without one
    assistant_only_loss: bool | None = None  # train only replies; None: yes, unless completion_only_loss=False
    completion_only_loss: bool | None = None  # train only completions, not their prompts; None: yes
    documents: Literal["isolated", "concatenated"] = "isolated"  # one plain text per example, or blocks of all of them
    validation_split: float | None = None  # share of the examples to hold out; None: see `split_examples`
    seed: int = 0  # for selecting them
    skip_bad_rows: bool = False  # skip and report unusable rows instead of raising an error
    image_folder: str | None = None  # for paths in rows; None: the folder of the data file
    for_evaluation: bool = False  # read a pair of replies as choices, with the chosen one as the answer


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer, its properties needed below, and the settings of the data."""

    tokenizer: Any
    template: str | None
    bos_ids: list[int]  # that the tokenizer adds before a text, [BOS] or nothing
    eos: str | None
    eos_id: int | None
    special_ids: frozenset[int]
    special_tokens: tuple[str, ...]  # which may end a turn
    settings: DataSettings
    processor: ProcessorMixin | None = None  # of a vision-language model
    media_tokens: tuple[str, ...] = ()  # models look for an image, video or audio for each, so texts must not have them
    cache: dict[str, list[int]] = field(default_factory=dict)  # of short texts, such as the header of a reply
    placeholders: Callable[..., list[str]] = field(default_factory=lambda: lru_cache(MOST_SIZES)(image_placeholders))

    @property
    def marks_replies(self) -> bool:
        """Whether the template marks the replies with {% generation %}."""
        return GENERATION_MARK.search(self.template or "") is not None

    @classmethod
    def of(cls, tokenizer: Any, settings: DataSettings | None = None) -> Self:
        """Raises DataError if the tokenizer has several chat templates and no default.

        tokenizer: a tokenizer, or the processor of a vision-language model.
        With labels, the tokenizer's own limit also applies to max_length.
        """
        settings = settings or DataSettings()
        processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
        tokenizer = text_tokenizer(tokenizer)
        if settings.labels is not None:
            most = min(settings.max_length, int(tokenizer.model_max_length))
            settings = replace(settings, task=settings.labels.task, max_length=most)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        try:
            of_processor = getattr(processor, "chat_template", None)
            template: str | None = of_processor.get("default") if isinstance(of_processor, dict) else of_processor
            if template is None and tokenizer.chat_template:
                template = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise DataError(f"the tokenizer has several chat templates and no default: {error}") from None
        return cls(
            tokenizer=tokenizer,
            template=template,
            bos_ids=added_start(processor or tokenizer),
            eos=tokenizer.eos_token,
            eos_id=tokenizer.eos_token_id,
            special_ids=frozenset(special),
            special_tokens=tuple(sorted({str(name) for name in tokenizer.convert_ids_to_tokens(sorted(special))})),
            settings=settings,
            processor=processor,
            media_tokens=tuple(map(str, tokenizer.convert_ids_to_tokens(media_ids(processor)))),
        )

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """Returns the tokens of every text, without adding special tokens."""
        most = sys.maxsize if self.processor else PIECE  # never within the placeholders of images
        short = iter(self._tokenize([text for text in texts if len(text) <= most]))
        return [next(short) if len(text) <= most else self._tokenize_long(text) for text in texts]

    def _tokenize_long(self, text: str) -> Tokens:
        """Tokenizes a text in pieces of at most PIECE characters that begin with the space before a word.

        Tokenizers split texts there anyway, so the tokens stay the same unless a piece has no such space.
        """
        starts = [0]
        while starts[-1] + PIECE < len(text):
            spaces = [match.start() for match in re.finditer(r"(?<=\w) (?=\w)", text[starts[-1] : starts[-1] + PIECE])]
            starts.append(starts[-1] + (spaces[-1] if spaces else PIECE))
        pieces = self._tokenize([text[start:end] for start, end in pairwise([*starts, len(text)])])
        offsets = [piece.offsets + start for piece, start in zip(pieces, starts, strict=True)]
        return Tokens(np.concatenate([piece.ids for piece in pieces]), np.concatenate(offsets))

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
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

    def chat_ids(self, text: str) -> list[int]:
        """Returns the ids of a rendered chat. Processors add the BOS that a template omits, tokenizers do not."""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # a server sees many
        return ids if self.processor is None or ids[: len(self.bos_ids)] == self.bos_ids else self.bos_ids + ids

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Returns the ids of a chat up to its next reply."""
        return self.chat_ids(self.render(messages, tools=tools, add_generation_prompt=True))

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        expand: bool = True,
    ) -> str:
        """Renders the messages with the chat template. Raises DataError with the template's message if it fails.

        expand: write as many placeholders as the images have tokens; False writes one for each image.
        """
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt, "tokenize": False}
        options |= {} if self.processor is None else {"chat_template": self.template}
        with _template_errors():
            renderer = self.tokenizer if self.processor is None else self.processor
            text = str(renderer.apply_chat_template(self._for_template(messages), **options))
        return "".join(self._expanded(text, images_of(messages))) if expand else text

    def render_generation_spans(self, chat: Conversation) -> tuple[str, list[Span]]:
        """Renders a conversation. Returns the text and the spans between {% generation %} and {% endgeneration %}."""
        with _template_errors():
            (text,), (spans,) = render_jinja_template(
                conversations=[self._for_template(chat.messages)],
                tools=chat.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        pieces = self._expanded(text, images_of(chat.messages))
        token: str = getattr(self.processor, "image_token", "")

        def moved(position: int) -> int:
            images = text.count(token, 0, position) if token else 0
            return position + sum(len(placeholders) - len(token) for placeholders in pieces[1 : 2 * images : 2])

        return "".join(pieces), [(moved(start), moved(end)) for start, end in spans]

    def _for_template(self, messages: Messages) -> Messages:
        """Returns messages in the format of the template: reasoning under both names, and parts for images.

        Templates of vision-language models read lists of parts, and many read nothing else.
        """
        messages = [{"thinking": m[REASONING], **m} if REASONING in m else m for m in messages]
        if self.processor is None:
            return messages
        return [
            {**message, "content": [{"type": TEXT_PART, TEXT_PART: message["content"]}]}
            if isinstance(message["content"], str) and message["role"] != "tool"
            else message
            for message in replace_images(messages)
        ]

    def _expanded(self, text: str, images: Sequence[Image]) -> list[str]:
        """Returns the text in pieces: every second one is the placeholders of an image."""
        if not text.isascii() and SURROGATE.search(text):
            raise DataError("the chat template writes half of a surrogate pair, which no tokenizer accepts")
        if self.processor is None:
            return [text]
        token = self.processor.image_token
        pieces = text.split(token)
        if (written := len(pieces) - 1) != len(images):
            remedy = f"use a chat template that writes {token} for every image"
            if written > len(images):
                remedy = f"remove {token} from the messages, because it stands for an image"
            raise DataError(f"the text has {written:,} {token}, but there are {len(images):,} images; {remedy}")
        for medium in self.media_tokens:
            if any(medium in piece for piece in pieces):
                raise DataError(f"the text has {medium}, which stands for an image, a video or audio; remove it")
        sizes = tuple((image.width, image.height) for image in images)
        texts = self.placeholders(self.processor, sizes) if sizes else []
        expanded = [pieces[0]]
        for piece, placeholders in zip(pieces[1:], texts, strict=True):
            expanded += [placeholders, piece]
        return expanded


@contextmanager
def _template_errors() -> Iterator[None]:
    """Converts errors of the template's code into DataError."""
    try:
        yield
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        cause = str(error) or type(error).__name__
        raise DataError(f"the chat template rejects this conversation: {cause}") from None


def to_conversation(sample: Conversation | Pair) -> Conversation:
    """Returns a pair as a user turn and its reply. Surrounding whitespace is removed, as the template adds its own."""
    if isinstance(sample, Conversation):
        return sample
    messages = [
        {"role": "user", "content": sample.prompt.strip()},
        {"role": "assistant", "content": sample.completion.strip()},
    ]
    return Conversation(messages, first=1)


def with_system(sample: Any, tokenizer: ChatTokenizer) -> Any:
    """Returns the sample with the system message of the settings, unless it already has one or contains no chat.

    Raises DataError without a chat template.
    """
    system = tokenizer.settings.system
    if system is None:
        return sample
    match sample:
        case Choices():
            return replace(sample, options=tuple(with_system(option, tokenizer) for option in sample.options))
        case Preference():
            return Preference(with_system(sample.chosen, tokenizer), with_system(sample.rejected, tokenizer))
        case Feedback():
            return replace(sample, reply=with_system(sample.reply, tokenizer))
        case Prompt():
            return replace(sample, chat=with_system(sample.chat, tokenizer))
        case Conversation() | Pair():
            if tokenizer.template is None:
                raise DataError("--system needs a chat template, but the tokenizer has none; remove --system")
            chat = to_conversation(sample)
            if any(message["role"] in ("system", "developer") for message in chat.messages):
                return chat
            messages = [{"role": "system", "content": system}, *chat.messages]
            untrained = frozenset(index + 1 for index in chat.untrained)
            return replace(chat, messages=messages, first=chat.first + (chat.first > 0), untrained=untrained)
    return sample


# ---- Tools: in the format of the template

MARK = "zqx{}xqz"  # occurs in no template; numbered, and no number is the beginning of a different one


def fit_to_template(chat: Conversation, tokenizer: ChatTokenizer) -> Conversation:
    """Returns the conversation with tools, calls and results in a format that the template supports.

    Arguments of calls become objects or JSON text. If the template does not support tools, they become text. Raises
    DataError if the template renders none of these formats, or renders calls outside of its generation spans.
    """
    if not has_tools(chat):
        return chat
    template = tokenizer.template or ""
    forms: list[Callable[[Conversation], Conversation]] = [_with_objects, lambda chat: _with_arguments(chat, _as_json)]
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
        remedy = "use a model whose template supports tools, or write tools and calls into the message contents"
        problems.insert(0, f"the chat template does not render {missing}: {remedy}")
    raise DataError(problems[0])


def has_tools(chat: Conversation) -> bool:
    return bool(chat.tools) or any(m["role"] == "tool" or "tool_calls" in m for m in chat.messages)


def _with_objects(chat: Conversation) -> Conversation:
    return _with_arguments(chat, lambda value: json.loads(value) if isinstance(value, str) else value)


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


# The format of Qwen 2.5 and Hermes
CALL_TEXT = '<tool_call>\n{{"name": {}, "arguments": {}}}\n</tool_call>'
TOOLS_TEXT = "You can call these functions:\n<tools>\n{}\n</tools>\nWrite a call as\n" + CALL_TEXT.replace("{}", "...")
RESULT_TEXT = "<tool_response>\n{}\n</tool_response>"


def tools_as_text(chat: Conversation) -> Conversation:
    """Moves tools into the system message and calls into the replies, and turns results into user messages."""
    messages: Messages = []
    numbers = []  # new index of each message
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
            content = "\n".join(filter(None, [message["content"], *calls])) if calls else message["content"]
            messages.append({k: v for k, v in message.items() if k != "tool_calls"} | {"content": content})
        numbers.append(len(messages) - 1)
    first = numbers[chat.first] if chat.first < len(numbers) else len(messages)
    return Conversation(messages, first, frozenset(numbers[index] for index in chat.untrained))


def _not_written(chat: Conversation, form: Callable[[Conversation], Conversation], tokenizer: ChatTokenizer) -> str:
    """Returns the first tool, call or result that the template drops or renders as Python; "" if there is none.

    Each one gets a unique mark to search for, because a name or result may also occur elsewhere in the text.
    """
    names: list[str] = []  # what the mark with this number belongs to

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
            messages.append({**message, "content": message["content"] + mark(f"the tool result in message {index}")})
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
