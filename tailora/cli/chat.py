"""`tailora chat` and `tailora generate`: answers of a model with or without adapters.

Answers go to stdout, everything else to stderr.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.flags import Json
from tailora.cli.main import log, print_json
from tailora.cli.models import (
    Adapters,
    Loaded,
    MaxNewTokens,
    Model,
    Quantize,
    Seed,
    Temperature,
    TopP,
    load_model,
    memory_errors,
    parse_adapters,
)
from tailora.errors import AdapterError, ConfigError, DataError, MemoryLimitError, nearest

# ---- `tailora chat`


HELP = """\
/adapter NAME [STRENGTH]   answer with this adapter; STRENGTH 0.7 scales it to 70%
/base                      answer without adapters
/reset                     forget the conversation
/help                      show these lines
/quit                      end (so does the end of the input)"""


@dataclass
class Conversation:
    loaded: Loaded
    sampling: dict[str, Any]  # arguments of `stream_reply`
    messages: list[dict[str, str]] = field(default_factory=list)


def chat(
    *,
    model: Model = "demo",
    adapter: Adapters = None,
    quantize: Quantize = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = 0,
) -> int:
    """Chat with a model, with or without adapters.

    The first adapter is active at the start. /help lists what can be typed.
    """
    loaded = load_model(model, parse_adapters(adapter or []), quantize=quantize)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    conversation = Conversation(loaded, sampling)
    if loaded.adapters:
        loaded.model.set_adapter(loaded.adapters[0])
    log(f"{model} with {' or '.join(loaded.adapters) or 'no adapter'}; /help lists the commands")
    for line in typed_lines():
        if line == "/quit":
            break
        if line.startswith("/"):
            run_command(conversation, line)
        else:
            answer(conversation, line)
    return 0


def typed_lines() -> Iterator[str]:
    """Yields what the user types, without empty lines, until the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def answer(conversation: Conversation, text: str) -> None:
    """Streams the answer. Ctrl-C ends it and keeps what there is; a message that cannot be answered is dropped."""
    from tailora.evaluation.generate import stream_reply

    loaded = conversation.loaded
    messages = [*conversation.messages, {"role": "user", "content": text}]
    reply = ""
    try:
        with memory_errors():
            for piece in stream_reply(loaded.model, loaded.tokenizer, messages, **conversation.sampling):
                reply += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        log("interrupted")
    except (DataError, MemoryLimitError) as error:
        print("\n" if reply else "", end="", flush=True)
        log(f"error: {error}\nthe message is dropped; /reset forgets the conversation and makes room")
        return
    print(flush=True)
    conversation.messages[:] = [*messages, {"role": "assistant", "content": reply}]


def run_command(conversation: Conversation, line: str) -> None:
    """Runs one /command; a mistake prints a message and changes nothing."""
    name, *words = line.split()
    if name not in COMMANDS:
        log(f"{name} is not a command{nearest(name, COMMANDS) or '; /help lists them'}")
        return
    try:
        log(COMMANDS[name](conversation, words))
    except (AdapterError, ConfigError) as error:
        log(str(error))


def _adapter(conversation: Conversation, words: list[str]) -> str:
    names = conversation.loaded.adapters
    if not names:
        raise ConfigError("no adapter is loaded: start with --adapter FOLDER")
    if not words:
        raise ConfigError(f"/adapter NAME [STRENGTH]; there are: {', '.join(names)}")
    name, strength = words[0], _strength(words[1:])
    conversation.loaded.model.set_adapter(name)
    conversation.loaded.model.set_scale(name, strength)
    return f"adapter {name} at {strength:g}"


def _strength(words: list[str]) -> float:
    try:
        (strength,) = [float(word) for word in words] or [1.0]
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ConfigError(f"a strength is one number such as 0.7; got {' '.join(words)}")
    return strength


def _base(conversation: Conversation, _words: list[str]) -> str:
    if conversation.loaded.adapters:
        conversation.loaded.model.set_adapter(None)
    return "no adapter"


def _reset(conversation: Conversation, _words: list[str]) -> str:
    conversation.messages.clear()
    return "the conversation starts again"


def _help(_conversation: Conversation, _words: list[str]) -> str:
    return HELP


COMMANDS = {"/adapter": _adapter, "/base": _base, "/reset": _reset, "/help": _help}


# ---- `tailora generate`


Prompts = Annotated[
    list[str] | None,
    Parameter(name="--prompt", negative=(), help="prompt to answer; repeatable; default: all of stdin"),
]


def generate(
    *,
    model: Model = "demo",
    adapter: Adapters = None,
    prompt: Prompts = None,
    system: Annotated[str | None, Parameter(help="system message")] = None,
    quantize: Quantize = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Answer prompts, each on its own.

    Several adapters are all active, and their updates add up.
    """
    prompts = prompt or [_stdin_prompt()]
    loaded = load_model(model, parse_adapters(adapter or []), quantize=quantize)
    from tailora.evaluation.generate import stream_reply

    sampling: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    first = [{"role": "system", "content": system}] if system else []
    answers = []
    for text in prompts:
        messages = [*first, {"role": "user", "content": text}]
        pieces = stream_reply(loaded.model, loaded.tokenizer, messages, **sampling)
        with memory_errors():
            answers.append({"prompt": text, "text": "".join(pieces) if json else _print_pieces(pieces)})
    if json:
        print_json({"model": model, "adapters": loaded.adapters, "answers": answers})
    return 0


def _print_pieces(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print(flush=True)
    return text


def _stdin_prompt() -> str:
    if sys.stdin.isatty():
        raise ConfigError("nothing to answer: give --prompt TEXT, or pipe a text in")
    text = sys.stdin.read().strip()
    if not text:
        raise ConfigError("nothing to answer: stdin is empty; give --prompt TEXT, or pipe a text in")
    return text
