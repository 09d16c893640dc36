"""Chat messages and tools of a row: read in the common formats, checked, and returned in OpenAI's format.

A message has role and content, and optionally tool_calls, tool_call_id and name. The content is a text, or a list of
parts if it has images. Reasoning is always stored as reasoning_content, whatever the row calls it. `train: false` or
`weight: 0` marks a reply that is read but not trained. ShareGPT's messages have from and value.

`text_value`, `short_repr`, `listed` and SURROGATE are for the values of any column.
"""

import json
import math
import re
import reprlib
from collections.abc import Collection
from itertools import islice
from typing import Any, TypeAlias

from tailora.errors import DataError, nearest

Messages: TypeAlias = list[dict[str, Any]]  # role, content, and other keys for the chat template
Tools: TypeAlias = list[dict[str, Any]]  # functions in OpenAI's format: type, and function with name and parameters
MarkedMessage: TypeAlias = tuple[dict[str, Any], bool | None]  # a message, and whether to train it; None if unmarked

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
REASONING = "reasoning_content"
TEXT_PART, IMAGE = "text", "image"  # types of a message's parts, and the keys of their values
IMAGE_VALUES = (IMAGE, "bytes", "path", "url")  # keys of an image's value in the common formats
IMAGE_TEXT = "[image]"  # of an image in a text for people
PLACEHOLDER = "<image>"  # in texts, of an image in a column: LLaVA, LLaMA-Factory, ms-swift, TRL
REASONING_KEYS = (REASONING, "thinking", "reasoning")  # vLLM and most templates; gpt-oss; OpenRouter


def read_messages(value: Any, name: str) -> Messages:
    """Returns messages of text without their marks. Raises DataError, like all functions here."""
    messages = [message for message, _ in marked_messages(value, name)]
    if has_images(messages):
        raise DataError(f"{name}: expected text, got an image; this task does not support images")
    return messages


def marked_messages(value: Any, name: str) -> list[MarkedMessage]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name}: expected a list of messages, got {short_repr(value)}")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def as_messages(value: Any, name: str, role: str) -> list[MarkedMessage]:
    """Returns a list of messages; a text becomes one message with this role."""
    if isinstance(value, list):
        return marked_messages(value, name)
    return [({"role": role, "content": text_value(value, name)}, None)]


def _message(message: Any, name: str) -> MarkedMessage:
    """Returns the message, and whether to train it; None if unmarked."""
    if not isinstance(message, dict) or not message.keys() & {"role", "from"}:
        raise DataError(
            f"{name}: expected an object with role and content, or with from and value, got {short_repr(message)}"
        )
    if "role" not in message:
        message = _from_sharegpt(message, name)
    message = {key: value for key, value in message.items() if value is not None}
    role = "tool" if message.get("role") == "function" else message.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{name}: unknown role {short_repr(role)}{hint}; known roles are {', '.join(ROLES)}")
    is_trained = _train_flag(message, role, name)
    special: dict[str, Any] = {"role": role}
    if calls := _tool_calls(message, name):
        if role != "assistant":
            raise DataError(f"{name}: only assistant messages can have tool calls, got role {role}")
        special["tool_calls"] = calls
    special["content"] = "" if calls and message.get("content") is None else _content(message, name)
    if reasoning := [message[key] for key in REASONING_KEYS if message.get(key)]:
        special[REASONING] = text_value(reasoning[0], f"{name}.{REASONING}")
    used = {"tool_calls", "function_call", "train", "weight", *special, *REASONING_KEYS}
    # Keep all other keys, such as name and tool_call_id, for the chat template.
    other = {
        key: text_value(value, f"{name}.{key}") if isinstance(value, str) else value
        for key, value in message.items()
        if key not in used
    }
    return {**other, **special}, is_trained


def _content(message: dict[str, Any], name: str) -> str | list[dict[str, Any]]:
    """Returns the text of a message; its parts if some are images: {"type": "text", "text"} or {"type", "image"}.

    The value of an image is None if a column next to the messages has it.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return text_value(content, f"{name}.content")
    parts = [_part(part, f"{name}.content[{index}]") for index, part in enumerate(content)]
    if all(part["type"] == TEXT_PART for part in parts):
        return "".join(part[TEXT_PART] for part in parts)
    if message["role"] != "user":
        raise DataError(f"{name}: only user messages can contain images, got role {message['role']}")
    return parts


def _part(part: Any, name: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == TEXT_PART:
        return {"type": TEXT_PART, TEXT_PART: text_value(part.get("text"), f"{name}.text")}
    if kind == "image_url":  # OpenAI's format
        url = part.get("image_url")
        return {"type": IMAGE, IMAGE: url.get("url") if isinstance(url, dict) else url}
    if kind == IMAGE:
        return {"type": IMAGE, IMAGE: next((part[key] for key in IMAGE_VALUES if part.get(key) is not None), None)}
    raise DataError(f"{name}: only text and images are supported, got {short_repr(part)}")


def has_images(messages: Messages) -> bool:
    return any(isinstance(message["content"], list) for message in messages)


def image_parts(messages: Messages) -> list[dict[str, Any]]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] == IMAGE]


def text_of(message: dict[str, Any]) -> str:
    """Returns the text of a message, with [image] for each image."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part[TEXT_PART] if part["type"] == TEXT_PART else IMAGE_TEXT for part in content)


def place_images(messages: Messages, images: list[Any]) -> Messages:
    """Puts the images of a row's column into its messages, where these have a part without value or <image>.

    If the messages have no images, all come before the text of the first user message, as in TRL.
    Raises DataError if their numbers differ, or if there is no user message.
    """
    split = [_split_placeholders(message) if message["role"] == "user" else message for message in messages]
    parts = image_parts(split)
    missing = sum(part[IMAGE] is None for part in parts)
    if images and not parts:
        first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise DataError("images: expected a user message that they belong to, got none")
        content = messages[first]["content"]
        content = [*({"type": IMAGE, IMAGE: image} for image in images), {"type": TEXT_PART, TEXT_PART: content}]
        return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
    if missing != (given := len(images)):
        raise DataError(f"images: expected {missing:,}, one for each {PLACEHOLDER} in the messages, got {given:,}")
    rest = iter(images)
    for part in parts:
        part[IMAGE] = next(rest) if part[IMAGE] is None else part[IMAGE]
    return split


def _split_placeholders(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message whose <image> are parts, with new objects for all parts."""
    content = message["content"]
    parts = [{"type": TEXT_PART, TEXT_PART: content}] if isinstance(content, str) else content
    split: list[dict[str, Any]] = []
    for part in parts:
        texts = part[TEXT_PART].split(PLACEHOLDER) if part["type"] == TEXT_PART else []
        for index, text in enumerate(texts):
            split += [{"type": IMAGE, IMAGE: None}] if index else []
            split += [{"type": TEXT_PART, TEXT_PART: text}] if text else []
        split += [] if texts else [dict(part)]
    return {**message, "content": split} if any(part["type"] == IMAGE for part in split) else message


def _train_flag(message: dict[str, Any], role: str, name: str) -> bool | None:
    """Returns the value of `train` or of OpenAI's `weight` for the message; None if it has neither."""
    given = {key: message[key] for key in ("train", "weight") if key in message}
    if type(given.get("train", True)) is not bool:
        raise DataError(f"{name}: expected true or false for train, got {short_repr(given['train'])}")
    if given.get("weight", 1) not in (0, 1):
        raise DataError(
            f"{name}: expected 0 or 1 for the weight of a message, got {short_repr(given['weight'])}; to weight the "
            "whole row, put weight next to messages"
        )
    flags = {bool(value) for value in given.values()}
    if len(flags) > 1:
        raise DataError(f"{name}: train and weight contradict each other; use only one")
    if True in flags and role != "assistant":
        raise DataError(f"{name}: only assistant messages can be trained, got role {role}; remove train or weight")
    return next(iter(flags), None)


def _tool_calls(message: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the calls in OpenAI's format; [] if there are none."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"{name}.tool_calls: expected a list of calls, got {short_repr(calls)}")
    if message.get("function_call"):  # OpenAI's older format, with one call
        calls = [*calls, message["function_call"]]
    return [_tool_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """Accepts a call with or without the object `function` around its name and arguments."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{name}: expected a function with name and arguments, got {short_repr(call)}")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else arguments
    parsed = _parsed(arguments, f"{name}.arguments") if isinstance(arguments, str) else arguments
    if not isinstance(parsed, dict):
        raise DataError(f"{name}.arguments: expected an object or its JSON text, got {short_repr(arguments)}")
    outer = {key: value for key, value in call.items() if value is not None} if function is not call else {}
    return {**outer, "type": "function", "function": {**function, "arguments": arguments}}


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text_value(text, name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: expected JSON text, got {short_repr(text)} ({error})") from None


def _from_sharegpt(turn: dict[str, Any], name: str) -> dict[str, Any]:
    sender, value = turn["from"], turn.get("value")
    if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
        raise DataError(f"{name}.from: unknown sender {short_repr(sender)}; use one of {', '.join(SHAREGPT_ROLES)}")
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message["role"] = SHAREGPT_ROLES[sender]
    if sender == "function_call":
        calls = _parsed(text_value(value, f"{name}.value"), f"{name}.value")
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    else:
        message["content"] = text_value(value, f"{name}.value")
    return message


# ---- Tools


def read_tools(values: dict[str, Any]) -> Tools | None:
    """Returns the tools available to the assistant, in OpenAI's format; None if there are none."""
    tools = values.get("tools")
    tools = _parsed(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"tools: expected a list of functions or its JSON text, got {short_repr(tools)}")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tools[{index}]: expected a function with name and parameters, got {short_repr(tool)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# ---- Values of any column

MESSAGES_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
NAMES_TEXT = re.compile(r"""\s*\[\s*[]"'\d-]""")
LIST_TEXTS = {  # key with lists -> how the text of a list begins in CSV, where every cell is text
    **dict.fromkeys(("messages", "conversations", "prompt", "completion", "chosen", "rejected"), MESSAGES_TEXT),
    **dict.fromkeys(("label", "tokens", "tags", "choices", "images"), NAMES_TEXT),
}


def parsed_list(value: Any, key: str) -> Any:
    """Parses a text that contains a list; returns other values unchanged. Raises DataError if the list is not JSON."""
    is_list = isinstance(value, str) and key in LIST_TEXTS and LIST_TEXTS[key].match(value)
    return _parsed(value, key) if is_list else value


def number_of(value: Any) -> float:
    """Returns a number, which may be a text as in CSV; NaN for other values."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


SURROGATE = re.compile("[\ud800-\udfff]")
SHORT = reprlib.Repr()  # abbreviates long and deeply nested values
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 200
MOST_NAMES = 20  # in a message


def text_value(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text, got {short_repr(value)}")
    if not value.isascii() and SURROGATE.search(value):
        raise DataError(
            f"{name} contains half of a surrogate pair, which no tokenizer accepts; repair the \\ud... escape"
        )
    return value


def short_repr(value: Any) -> str:
    return _shortened(SHORT.repr(value))


def listed(names: Collection[str]) -> str:
    """Returns the first names, and the number of further ones."""
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(_shortened, islice(names, MOST_NAMES))) + more


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
