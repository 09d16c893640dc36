"""Chat messages and tools of a row: read from the forms that data comes in, checked, and returned in OpenAI's form.

A message has role and content, and may have tool_calls, tool_call_id and name. Reasoning is reasoning_content here,
whatever name the row has for it. `train: false` or `weight: 0` marks a reply that is read but not trained.
ShareGPT's messages have from and value.

`text_value`, `short_repr`, `listed` and SURROGATE are for the values of any column.
"""

import json
import re
import reprlib
from collections.abc import Collection
from itertools import islice
from typing import Any, TypeAlias

from tailora.errors import DataError, nearest

Messages: TypeAlias = list[dict[str, Any]]  # role and content, and what else the chat template may read
Tools: TypeAlias = list[dict[str, Any]]  # functions in OpenAI's form: type, and function with name and parameters
MarkedMessage: TypeAlias = tuple[dict[str, Any], bool | None]  # a message, and whether the row says to train it

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
REASONING_KEYS = (REASONING, "thinking", "reasoning")  # of vLLM and most templates; of gpt-oss; of OpenRouter


def read_messages(value: Any, name: str) -> Messages:
    """Returns the messages of a list without their marks. Raises DataError, as all functions here."""
    return [message for message, _ in marked_messages(value, name)]


def marked_messages(value: Any, name: str) -> list[MarkedMessage]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is {short_repr(value)} where a list of messages is needed")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def as_messages(value: Any, name: str, role: str) -> list[MarkedMessage]:
    """Returns a list of messages, or a text as a message of the role."""
    if isinstance(value, list):
        return marked_messages(value, name)
    return [({"role": role, "content": text_value(value, name)}, None)]


def _message(message: Any, name: str) -> MarkedMessage:
    """Returns the message, and whether it is to be trained; None if it does not say."""
    if not isinstance(message, dict) or not message.keys() & {"role", "from"}:
        raise DataError(
            f"{name} is {short_repr(message)} where an object with role and content, or from and value, is needed"
        )
    if "role" not in message:
        message = _from_sharegpt(message, name)
    message = {key: value for key, value in message.items() if value is not None}
    role = "tool" if message.get("role") == "function" else message.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{name}: role {short_repr(role)} is unknown{hint}; roles are {', '.join(ROLES)}")
    is_trained = _train_flag(message, role, name)
    special: dict[str, Any] = {"role": role}
    if calls := _tool_calls(message, name):
        if role != "assistant":
            raise DataError(f"{name}: only the assistant calls tools, and the role is {role}")
        special["tool_calls"] = calls
    special["content"] = "" if calls and message.get("content") is None else _content(message, name)
    if reasoning := [message[key] for key in REASONING_KEYS if message.get(key)]:
        special[REASONING] = text_value(reasoning[0], f"{name}.{REASONING}")
    used = {"tool_calls", "function_call", "train", "weight", *special, *REASONING_KEYS}
    # What else there is, such as name and tool_call_id, is left to the chat template.
    other = {
        key: text_value(value, f"{name}.{key}") if isinstance(value, str) else value
        for key, value in message.items()
        if key not in used
    }
    return {**other, **special}, is_trained


def _content(message: dict[str, Any], name: str) -> str:
    content = message.get("content")
    if not isinstance(content, list):
        return text_value(content, f"{name}.content")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(f"{name}.content holds {short_repr(part)}; only text parts can be learned from")
    return "".join(text_value(part.get("text"), f"{name}.content") for part in content)


def _train_flag(message: dict[str, Any], role: str, name: str) -> bool | None:
    """Returns what `train`, or OpenAI's `weight`, says about the message."""
    given = {key: message[key] for key in ("train", "weight") if key in message}
    if type(given.get("train", True)) is not bool:
        raise DataError(f"{name}: train is {short_repr(given['train'])} where a message has true or false")
    if given.get("weight", 1) not in (0, 1):
        raise DataError(
            f"{name}: weight is {short_repr(given['weight'])} where a message has 0 or 1; the weight of a whole row is "
            "a key beside messages"
        )
    flags = [bool(value) for value in given.values()]
    if len(set(flags)) > 1:
        raise DataError(f"{name}: train and weight contradict each other; give one")
    if True in flags and role != "assistant":
        raise DataError(f"{name}: only replies of the assistant are trained, and the role is {role}; leave out train")
    return flags[0] if flags else None


def _tool_calls(message: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the calls in OpenAI's form; [] if there are none."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"{name}.tool_calls is {short_repr(calls)} where a list of calls is needed")
    if message.get("function_call"):  # OpenAI's older form, with one call
        calls = [*calls, message["function_call"]]
    return [_tool_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """Accepts a call with or without the object `function` around its name and arguments."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{name} is {short_repr(call)} where a function with name and arguments is needed")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else arguments
    parsed = _parsed(arguments, f"{name}.arguments") if isinstance(arguments, str) else arguments
    if not isinstance(parsed, dict):
        raise DataError(f"{name}.arguments is {short_repr(arguments)} where an object, or its JSON text, is needed")
    outer = {key: value for key, value in call.items() if value is not None} if function is not call else {}
    return {**outer, "type": "function", "function": {**function, "arguments": arguments}}


def _parsed(text: str, name: str) -> Any:
    """Reads JSON text within a row."""
    try:
        return json.loads(text_value(text, name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is no JSON text: {error}: {short_repr(text)}") from None


def _from_sharegpt(turn: dict[str, Any], name: str) -> dict[str, Any]:
    sender, value = turn["from"], turn.get("value")
    if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
        raise DataError(f"{name}: from {short_repr(sender)} is unknown; values are {', '.join(SHAREGPT_ROLES)}")
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
    """Returns the functions that the row offers the assistant, in OpenAI's form; None if there are none."""
    tools = values.get("tools")
    tools = _parsed(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"tools is {short_repr(tools)} where a list of functions, or its JSON text, is needed")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tools[{index}] is {short_repr(tool)} where a function with name and parameters is needed")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# ---- Values of any column

MESSAGES_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
NAMES_TEXT = re.compile(r"""\s*\[\s*[]"'\d-]""")
LIST_TEXTS = {  # what the values of a key that may be lists begin with in CSV, whose cells are text
    **dict.fromkeys(("messages", "conversations", "prompt", "completion", "chosen", "rejected"), MESSAGES_TEXT),
    **dict.fromkeys(("label", "tokens", "tags", "choices"), NAMES_TEXT),
}


def parsed_list(value: Any, key: str) -> Any:
    """Returns the list that a text is, or else the value. Raises DataError for a list in another form than JSON."""
    is_list = isinstance(value, str) and key in LIST_TEXTS and LIST_TEXTS[key].match(value)
    return _parsed(value, key) if is_list else value


SURROGATE = re.compile("[\ud800-\udfff]")
SHORT = reprlib.Repr()  # neither long values nor deep ones are written out
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 200
MOST_NAMES = 20  # in a message


def text_value(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {short_repr(value)} where text is needed")
    if not value.isascii() and SURROGATE.search(value):
        raise DataError(f"{name} holds half of a surrogate pair (a broken \\ud... escape), which no tokenizer reads")
    return value


def short_repr(value: Any) -> str:
    return _shortened(SHORT.repr(value))


def listed(names: Collection[str]) -> str:
    """Returns the first of the names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(_shortened, islice(names, MOST_NAMES))) + more


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
