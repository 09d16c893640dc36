"""`tailora chat` and `tailora generate`: answers of a model with or without adapters.

Answers go to stdout, everything else to stderr.
"""

import math
import sys
from contextlib import AbstractContextManager
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
    base_model_name,
    load_model,
    parse_adapters,
)
from tailora.errors import AdapterError, ConfigError, DataError, MemoryLimitError, nearest

MEMORY_ADVICE = "what helps: a shorter prompt, a smaller --max-new-tokens, a smaller --model, closing other programs"

# ---- `tailora chat`


HELP = """\
/adapter NAME [STRENGTH]   answer with this adapter; STRENGTH 0.7 scales it to 70%
/base                      answer without adapters
/reset                     forget the conversation
/help                      show these lines
/quit                      end the chat, as the end of the input does"""
COMMANDS = [line.split()[0] for line in HELP.splitlines()]


@dataclass
class ChatSession:
    loaded: Loaded
    sampling: dict[str, Any]  # arguments of `stream_reply`
    messages: list[dict[str, str]] = field(default_factory=list)


def chat(
    *,
    model: Model = None,
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
    folders = parse_adapters(adapter or [])
    model = base_model_name(model, list(folders.values()))
    loaded = load_model(model, folders, quantize=quantize)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    session = ChatSession(loaded, sampling)
    if loaded.adapters:
        loaded.model.set_adapter(loaded.adapters[0])
    log(f"{model} with {' or '.join(loaded.adapters) or 'no adapter'}; /help lists the commands")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if line.startswith("/"):
            try:
                log(run_command(session, line))
            except (AdapterError, ConfigError) as error:  # a typing mistake; nothing has changed
                log(str(error))
        elif line:
            answer(session, line)


def answer(session: ChatSession, text: str) -> None:
    """Streams the answer. Ctrl-C ends it and keeps the text so far; a message that cannot be answered is dropped."""
    from tailora.evaluation.generate import stream_reply

    loaded = session.loaded
    messages = [*session.messages, {"role": "user", "content": text}]
    reply = ""
    try:
        with explained_memory_errors():
            for piece in stream_reply(loaded.model, loaded.tokenizer, messages, **session.sampling):
                reply += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        log("interrupted")
    except (DataError, MemoryLimitError) as error:
        print("\n" if reply else "", end="", flush=True)
        log(f"error: {error}\nthe message is dropped; /reset forgets the conversation and makes room")
        return
    print(flush=True)
    session.messages[:] = [*messages, {"role": "assistant", "content": reply}]


def run_command(session: ChatSession, line: str) -> str:
    """Runs one /command and returns what to show. Raises ConfigError or AdapterError."""
    model, names = session.loaded.model, session.loaded.adapters
    command, *words = line.split()
    match command:
        case "/adapter":
            if not names:
                raise ConfigError("no adapter is loaded: start with --adapter FOLDER")
            if not words:
                raise ConfigError(f"/adapter NAME [STRENGTH]; there are: {', '.join(names)}")
            strength = parse_strength(words[1:])
            model.set_adapter(words[0])
            model.set_scale(words[0], strength)
            return f"adapter {words[0]} at {strength:g}"
        case "/base":
            if names:
                model.set_adapter(None)
            return "no adapter"
        case "/reset":
            session.messages.clear()
            return "the conversation starts again"
        case "/help":
            return HELP
    raise ConfigError(f"{command} is not a command{nearest(command, COMMANDS) or '; /help lists them'}")


def parse_strength(words: list[str]) -> float:
    try:
        (strength,) = [float(word) for word in words] or [1.0]
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ConfigError(f"a strength is one number such as 0.7; got {' '.join(words)}")
    return strength


# ---- `tailora generate`


Prompts = Annotated[
    list[str] | None,
    Parameter(name="--prompt", negative=(), help="prompt to answer; repeatable; default: all of stdin"),
]


def generate(
    *,
    model: Model = None,
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
    prompts = prompt or ["" if sys.stdin.isatty() else sys.stdin.read().strip()]
    if prompts == [""]:
        raise ConfigError("nothing to answer: give --prompt TEXT, or pipe a text in")
    folders = parse_adapters(adapter or [])
    model = base_model_name(model, list(folders.values()))
    loaded = load_model(model, folders, quantize=quantize)
    from tailora.evaluation.generate import stream_reply

    sampling: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    first = [{"role": "system", "content": system}] if system else []
    answers = []
    for text in prompts:
        messages = [*first, {"role": "user", "content": text}]
        reply = ""
        with explained_memory_errors():
            for piece in stream_reply(loaded.model, loaded.tokenizer, messages, **sampling):
                reply += piece
                if not json:
                    print(piece, end="", flush=True)
        answers.append({"prompt": text, "text": reply})
        if not json:
            print(flush=True)
    if json:
        print_json({"model": model, "adapters": loaded.adapters, "answers": answers})
    return 0


# ---- What both share


def explained_memory_errors() -> AbstractContextManager[None]:
    """Within the block, running out of memory raises MemoryLimitError with the cause and what helps."""
    from tailora.train.memory import explain_out_of_memory

    return explain_out_of_memory("answering", lambda: MEMORY_ADVICE)
