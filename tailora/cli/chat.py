"""`tailora chat`: a conversation on a terminal or from a pipe. Replies go to stdout, all else to stderr."""

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
    enough_memory,
    load,
)
from tailora.errors import AdapterError, ConfigError, DataError, MemoryLimitError, nearest

HELP = """\
/adapter NAME [STRENGTH]   answer with this adapter; STRENGTH 0.7 turns it down to 70%
/base                      answer without adapters
/reset                     forget the conversation
/help                      these lines
/quit                      end (so does the end of the input)"""
DROPPED = "the message is dropped; /reset forgets what was said before and makes room"


@dataclass
class Talk:
    loaded: Loaded
    sampling: dict[str, Any]  # for `reply`
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
    """Talk to a model, with or without adapters. /help lists what can be typed."""
    loaded = load(model, adapter or [], quantize)
    talk = Talk(loaded, {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed})
    if loaded.adapters:
        loaded.model.set_adapter(loaded.adapters[0])
    log(f"{model} with {' or '.join(loaded.adapters) or 'no adapter'}; /help lists the commands")
    for line in typed():
        if line == "/quit":
            break
        if line.startswith("/"):
            command(talk, line)
        else:
            answer(talk, line)
    return 0


def typed() -> Iterator[str]:
    """What the user types, line by line, until the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def answer(talk: Talk, text: str) -> None:
    """Streams the reply; Ctrl-C cuts it short and keeps what was said. What cannot be answered is dropped."""
    from tailora.evaluation.generate import stream_reply

    asked = [*talk.messages, {"role": "user", "content": text}]
    said = ""
    try:
        with enough_memory():
            for piece in stream_reply(talk.loaded.model, talk.loaded.tokenizer, asked, **talk.sampling):
                said += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        log("cut short")
    except (DataError, MemoryLimitError) as error:
        print("\n" if said else "", end="", flush=True)
        log(f"error: {error}\n{DROPPED}")
        return
    print(flush=True)
    talk.messages[:] = [*asked, {"role": "assistant", "content": said}]


def command(talk: Talk, line: str) -> None:
    """One /command; a mistake is told and changes nothing."""
    name, *words = line.split()
    if name not in COMMANDS:
        log(f"{name} is not a command{nearest(name, COMMANDS) or '; /help lists them'}")
        return
    try:
        log(COMMANDS[name](talk, words))
    except (AdapterError, ConfigError) as error:
        log(str(error))


def _adapter(talk: Talk, words: list[str]) -> str:
    names = talk.loaded.adapters
    if not names:
        raise ConfigError("no adapter is loaded: start with --adapter FOLDER")
    if not words:
        raise ConfigError(f"/adapter NAME [STRENGTH]; there are: {', '.join(names)}")
    name, strength = words[0], _strength(words[1:])
    talk.loaded.model.set_adapter(name)
    talk.loaded.model.set_scale(name, strength)
    return f"adapter {name} at {strength:g}"


def _strength(words: list[str]) -> float:
    try:
        (strength,) = [float(word) for word in words] or [1.0]
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ConfigError(f"a strength is one number such as 0.7; got {' '.join(words)}")
    return strength


def _base(talk: Talk, _words: list[str]) -> str:
    if talk.loaded.adapters:
        talk.loaded.model.set_adapter(None)
    return "no adapter"


def _reset(talk: Talk, _words: list[str]) -> str:
    talk.messages.clear()
    return "the conversation starts again"


def _help(_talk: Talk, _words: list[str]) -> str:
    return HELP


COMMANDS = {"/adapter": _adapter, "/base": _base, "/reset": _reset, "/help": _help}


# ---- `tailora generate`: answers to prompts, once.


Prompts = Annotated[
    list[str] | None, Parameter(name="--prompt", negative=(), help="repeatable; without it stdin is one prompt")
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
    """Answer prompts once; several adapters add up."""
    prompts = prompt or [_piped()]
    loaded = load(model, adapter or [], quantize)
    from tailora.evaluation.generate import stream_reply

    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    first = [{"role": "system", "content": system}] if system else []
    answers = []
    for text in prompts:
        messages = [*first, {"role": "user", "content": text}]
        pieces = stream_reply(loaded.model, loaded.tokenizer, messages, **sampling)
        with enough_memory():
            answers.append({"prompt": text, "text": "".join(pieces) if json else _streamed(pieces)})
    if json:
        print_json({"model": model, "adapters": loaded.adapters, "answers": answers})
    return 0


def _streamed(pieces: Iterable[str]) -> str:
    said = ""
    for piece in pieces:
        said += piece
        print(piece, end="", flush=True)
    print(flush=True)
    return said


def _piped() -> str:
    if sys.stdin.isatty():
        raise ConfigError("nothing to answer: give --prompt TEXT, or pipe a text in")
    text = sys.stdin.read().strip()
    if not text:
        raise ConfigError("nothing to answer: stdin is empty; give --prompt TEXT, or pipe a text in")
    return text
