"""`tailora chat`: a conversation with a model, with or without adapters.

Answers go to stdout, everything else to stderr.
"""

import math
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.main import log, note, write_stdout
from tailora.cli.models import (
    Adapters,
    Device,
    Loaded,
    Model,
    Quantize,
    Sampling,
    Temperature,
    TopP,
    base_model_name,
    load_model,
    parse_adapters,
)
from tailora.data.messages import Messages, place_images
from tailora.errors import AdapterError, ConfigError, DataError, MemoryLimitError, nearest
from tailora.formats.run_folder import adapter_folder, read_system_message, recorded_settings

Images = Annotated[
    list[Path] | None,
    Parameter(
        name="--image",
        help="image to add to every prompt, at its image placeholders or before its text; repeatable",
    ),
]
System = Annotated[str | None, Parameter(help="system message; default: the one used in training; '': none")]
MEMORY_ADVICE = "try a shorter prompt, a smaller --max-new-tokens or --model, or close other programs"

# ---- `tailora chat`


HELP = """\
/adapter NAME [STRENGTH]   use this adapter; STRENGTH 0.7 scales it to 70%
/base                      answer the last message again, with the adapter and without
/image FILE                attach an image to the next message
/reset                     start a new conversation
/help                      show these commands
/exit, /quit               end the chat (or press Ctrl-D)"""
COMMANDS = re.findall(r"/\w+", HELP)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ChatSampling(Sampling):
    temperature: Temperature = 0.7
    top_p: TopP = 0.9


DEFAULT_SAMPLING = ChatSampling()


@dataclass
class ChatSession:
    loaded: Loaded
    sampling: ChatSampling
    systems: dict[str, str | None]  # adapter -> its system message
    system: str | None  # of the active adapter
    obstacle: str  # why messages cannot contain images; "" if they can
    messages: Messages = field(default_factory=list)
    images: list[Any] = field(default_factory=list)  # for the next message


def chat(
    *,
    model: Model = None,
    adapter: Adapters = None,
    image: Images = None,
    system: System = None,
    quantize: Quantize = None,
    sampling: ChatSampling = DEFAULT_SAMPLING,
    device: Device = "auto",
) -> int:
    """Chat with a model, with or without adapters.

    The first adapter is active at the start, and images go to the first message. Type /help for the commands.
    """
    images = read_images(image)
    folders = parse_adapters(adapter or [])
    model = base_model_name(model, list(folders.values()))
    log("loading the model")
    loaded = load_model(model, folders, quantize=quantize, device=device)
    from tailora.train.generate import image_obstacle

    systems = training_systems(system, folders or {model: Path(model)})
    obstacle = image_obstacle(loaded.model, loaded.tokenizer)
    session = ChatSession(loaded, sampling, systems, next(iter(systems.values())), obstacle)
    attach_images(session, images)
    if loaded.adapters:
        loaded.model.set_adapter(loaded.adapters[0])
    log(f"{model} with {' or '.join(loaded.adapters) or 'no adapter'}; type /help for the commands")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # each Ctrl-C ends one answer, or the chat
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return 0
        if line in ("/exit", "/quit"):
            return 0
        if line.startswith("/"):
            try:
                log(run_command(session, line))
            except (AdapterError, ConfigError, DataError, MemoryLimitError) as error:  # a typo; nothing has changed
                log(str(error))
        elif line:
            answer(session, line)


def attach_images(session: ChatSession, images: list[Any]) -> str:
    """Attaches images to the next message; returns their names and sizes. Raises ConfigError if it cannot have any."""
    check_accepts_images(session.obstacle, images)
    session.images += images
    return ", ".join(f"{image.name} ({image.width:,} x {image.height:,} pixels)" for image in session.images)


def answer(session: ChatSession, text: str) -> None:
    """Streams the answer and adds it to the conversation. If answering fails, the message is dropped."""
    images, session.images = session.images, []
    try:
        asked: Messages = [{"role": "user", "content": text}]
        messages = [*session.messages, *(asked if session.obstacle else place_images(asked, images))]
        session.messages[:] = [*messages, {"role": "assistant", "content": stream(session, messages)}]
    except (DataError, MemoryLimitError) as error:
        log(f"error: {error}\nthe message was dropped; use /reset to start a new, shorter conversation")


def stream(session: ChatSession, messages: Messages) -> str:
    """Prints an answer and returns it; Ctrl-C ends it and keeps the text so far. Raises DataError, MemoryLimitError."""
    from tailora.train.generate import stream_reply
    from tailora.train.memory import explain_out_of_memory

    loaded, reply = session.loaded, ""
    system = [{"role": "system", "content": session.system}] if session.system else []
    try:
        with explain_out_of_memory("answering", MEMORY_ADVICE):
            for piece in stream_reply(loaded.model, loaded.tokenizer, [*system, *messages], **asdict(session.sampling)):
                reply += piece
                write_stdout(piece)
    except KeyboardInterrupt:
        log("interrupted")
    except (DataError, MemoryLimitError):
        write_stdout("\n" if reply else "")
        raise
    write_stdout("\n")
    return reply


def run_command(session: ChatSession, line: str) -> str:
    """Runs one /command and returns what to show. Raises ConfigError or AdapterError."""
    model, names = session.loaded.model, session.loaded.adapters
    command, *words = line.split()
    if command in ("/adapter", "/base") and not names:
        raise ConfigError("no adapter is loaded; restart with --adapter FOLDER")
    match command:
        case "/adapter":
            if not words:
                raise ConfigError(f"usage: /adapter NAME [STRENGTH]; available: {', '.join(names)}")
            try:
                strength = float(" ".join(words[1:]) or 1)
            except ValueError:
                strength = math.nan
            if not math.isfinite(strength):
                raise ConfigError(f"STRENGTH: expected one number such as 0.7, got {' '.join(words[1:])}")
            model.set_adapter(words[0])
            model.set_scale(words[0], strength)
            session.system = session.systems[words[0]]
            return f"adapter {words[0]} at {strength:g}"
        case "/base":
            if not session.messages:
                raise ConfigError("/base answers the last message again; send a message first")
            for name, adapter in ((model.active_adapters[0], nullcontext()), ("no adapter", model.disable_adapter())):
                log(f"with {name}:")
                with adapter:
                    stream(session, session.messages[:-1])
            return ""
        case "/image":
            if not words:
                raise ConfigError("usage: /image FILE, such as /image cat.png")
            file = line.removeprefix(command).strip().strip("'\"")  # some terminals quote a file that is dropped there
            return f"with the next message: {attach_images(session, read_images([Path(file).expanduser()]))}"
        case "/reset":
            session.messages.clear()
            session.images.clear()
            return "new conversation"
        case "/help":
            return HELP
    raise ConfigError(f"unknown command {command}{nearest(command, COMMANDS) or '; type /help for the commands'}")


# ---- What `tailora predict` shares


def read_images(files: Sequence[Path] | None) -> list[Any]:
    """Returns the images of these files. Raises DataError with all that cannot be used."""
    if not files:
        return []
    from tailora.data.images import read_image_files

    return read_image_files(files)


def check_accepts_images(obstacle: str, images: Sequence[Any]) -> None:
    """Raises ConfigError if there are images and an obstacle of `image_obstacle`."""
    if images and obstacle:
        raise ConfigError(f"this model cannot answer questions about images: {obstacle}; use a vision-language model")


def training_systems(given: str | None, sources: Mapping[str, Path]) -> dict[str, str | None]:
    """Returns the system message of each source: `given`, or the one used in training. Raises FormatError."""
    if given is not None:
        return dict.fromkeys(sources, given)
    systems = {name: read_system_message(folder) for name, folder in sources.items()}
    for name, text in systems.items():
        if text is not None:
            note(f"{name} uses its system message from training: {shorten(text, 60)}\nreplace it with --system TEXT")
        elif recorded_settings(adapter_folder(sources[name]), "data").get("messages", {}).get("system"):
            note(f"the training examples of {name} have different system messages; set one with --system TEXT")
    return systems
