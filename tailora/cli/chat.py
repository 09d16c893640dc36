"""`tailora chat` and `tailora generate`: answers from a model with or without adapters.

Answers go to stdout, everything else to stderr.
"""

import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.flags import Json, Overwrite
from tailora.cli.main import log, note, print_json, stderr, write_stdout
from tailora.cli.models import (
    Adapters,
    Device,
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
from tailora.data.messages import Messages, place_images
from tailora.data.readers import JSON_LINES, READERS, TXT, Row, RowProblem, data_error, read_file
from tailora.data.schemas import IMAGE_COLUMNS
from tailora.errors import AdapterError, ConfigError, DataError, MemoryLimitError, nearest
from tailora.formats.io import check_new_file, partial_file, write_lines
from tailora.formats.run_folder import adapter_folder, read_system_message, recorded_settings

IgnoreChatTemplate = Annotated[
    bool, Parameter(negative=(), show_default=False, help="continue the prompt as plain text, without a chat template")
]
Images = Annotated[
    list[Path] | None,
    Parameter(
        name="--image",
        negative=(),
        help="image to add to every prompt, at its image placeholders or before its text; repeatable",
    ),
]
System = Annotated[str | None, Parameter(help="system message; default: the one used in training; '': none")]
MEMORY_ADVICE = "try a shorter prompt, a smaller --max-new-tokens or --model, or close other programs"

# ---- `tailora chat`


HELP = """\
/adapter NAME [STRENGTH]   use this adapter; STRENGTH 0.7 scales it to 70%
/base                      use no adapter
/image FILE                attach an image to the next message
/reset                     start a new conversation
/help                      show these commands
/quit                      end the chat (or press Ctrl-D)"""
COMMANDS = [line.split()[0] for line in HELP.splitlines()]


@dataclass
class ChatSession:
    loaded: Loaded
    sampling: dict[str, Any]  # arguments of `stream_reply`
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
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = 0,
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
    from tailora.evaluation.generate import image_obstacle

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
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
        if line == "/quit":
            return 0
        if line.startswith("/"):
            try:
                log(run_command(session, line))
            except (AdapterError, ConfigError, DataError) as error:  # a typo; nothing has changed
                log(str(error))
        elif line:
            answer(session, line)


def attach_images(session: ChatSession, images: list[Any]) -> str:
    """Attaches images to the next message; returns their names and sizes. Raises ConfigError if it cannot have any."""
    check_accepts_images(session.obstacle, images)
    session.images += images
    return ", ".join(f"{image.name} ({image.width:,} x {image.height:,} pixels)" for image in session.images)


def answer(session: ChatSession, text: str) -> None:
    """Streams the answer. Ctrl-C ends it and keeps the text so far. If answering fails, the message is dropped."""
    from tailora.evaluation.generate import stream_reply
    from tailora.train.memory import explain_out_of_memory

    loaded = session.loaded
    system = [{"role": "system", "content": session.system}] if session.system else []
    images, session.images = session.images, []
    reply = ""
    try:
        messages = [*session.messages, *user_message(text, images, session.obstacle)]
        with explain_out_of_memory("answering", MEMORY_ADVICE):
            for piece in stream_reply(loaded.model, loaded.tokenizer, [*system, *messages], **session.sampling):
                reply += piece
                write_stdout(piece)
    except KeyboardInterrupt:
        log("interrupted")
    except (DataError, MemoryLimitError) as error:
        write_stdout("\n" if reply else "")
        log(f"error: {error}\nthe message was dropped; use /reset to start a new, shorter conversation")
        return
    write_stdout("\n")
    session.messages[:] = [*messages, {"role": "assistant", "content": reply}]


def run_command(session: ChatSession, line: str) -> str:
    """Runs one /command and returns what to show. Raises ConfigError or AdapterError."""
    model, names = session.loaded.model, session.loaded.adapters
    command, *words = line.split()
    match command:
        case "/adapter":
            if not names:
                raise ConfigError("no adapter is loaded; restart with --adapter FOLDER")
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
            if names:
                model.set_adapter(None)
            return f"no adapter{'; the conversation continues (/reset starts a new one)' if session.messages else ''}"
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


# ---- `tailora generate`


Prompts = Annotated[
    list[str] | None, Parameter(negative=(), help="prompt to answer; repeatable; default: text from stdin")
]

PromptsFile = Annotated[
    Path | None,
    Parameter(
        help="file of prompts: JSONL, JSON, CSV or Parquet with a prompt column, or text with one prompt per line"
    ),
]
OutputFile = Annotated[Path | None, Parameter(help="JSONL file to write prompts and answers to, instead of stdout")]


def generate(
    *,
    model: Model = None,
    adapter: Adapters = None,
    prompt: Prompts = None,
    prompts: PromptsFile = None,
    image: Images = None,
    system: System = None,
    ignore_chat_template: IgnoreChatTemplate = False,
    quantize: Quantize = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    output: OutputFile = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Answer each prompt independently. Images are added to every prompt.

    If you name several adapters, all of them are active, and their updates are added together.
    """
    if prompt and prompts is not None:
        raise ConfigError("--prompt and --prompts cannot be combined; use only one")
    if ignore_chat_template and system is not None:
        raise ConfigError(
            "--system needs the chat template, so it cannot be combined with --ignore-chat-template; put the system "
            "message into --prompt instead"
        )
    if ignore_chat_template and image:
        raise ConfigError("--image needs the chat template, so it cannot be combined with --ignore-chat-template")
    images = read_images(image)
    rows = [{"prompt": text} for text in prompt or [piped_text()]] if prompts is None else read_prompts(prompts)
    questions = [row["prompt"] for row in rows]
    if output is not None:
        check_answers_file(output, overwrite=overwrite)
    folders = parse_adapters(adapter or [])
    model = base_model_name(model, list(folders.values()))
    log("loading the model")
    loaded = load_model(model, folders, quantize=quantize, device=device)
    from tailora.cli.progress import counter
    from tailora.evaluation.generate import image_obstacle, stream_reply
    from tailora.train.memory import explain_out_of_memory

    obstacle = image_obstacle(loaded.model, loaded.tokenizer)
    check_accepts_images(obstacle, images)
    if not obstacle and any(row.get(column) for row in rows for column in IMAGE_COLUMNS):
        raise ConfigError(
            f"--prompts {prompts}: images in rows are not supported here; use --image for images that belong to every "
            "prompt, or `tailora eval` for rows with images and replies"
        )
    systems = {} if ignore_chat_template else training_systems(system, folders or {model: Path(model)})
    if len(set(systems.values())) > 1:
        note("the adapters were trained with different system messages, so none is used; set one with --system TEXT")
        systems = {}
    system = next(iter(systems.values()), None)
    first = [{"role": "system", "content": system}] if system else []
    sampling: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    named = {"images": [file.name for file in images]} if images else {}
    is_shown = output is None and not json
    answers = []
    with (
        counter(stderr(), "prompts") if output else nullcontext(lambda *_: None) as progress,
        partial_answers(output) if output else nullcontext(lambda _: None) as write,
    ):
        for number, text in enumerate(questions, 1):
            asked = text if ignore_chat_template else [*first, *user_message(text, images, obstacle)]
            reply = ""
            with explain_out_of_memory("answering", MEMORY_ADVICE):
                for piece in stream_reply(loaded.model, loaded.tokenizer, asked, **sampling):
                    reply += piece
                    if is_shown:
                        write_stdout(piece)
            answers.append({"prompt": text, **named, "text": reply})
            write(dumps(answers[-1], ensure_ascii=False))
            progress(number, len(questions))
            if is_shown:
                write_stdout("\n")
    if output is not None:
        log(f"{len(answers):,} answers written to {output}")
    if json:
        print_json({"model": model, "adapters": loaded.adapters, "answers": answers})
    return 0


def check_answers_file(output: Path, *, overwrite: bool) -> None:
    """Raises ConfigError if the file exists, or if its name has the suffix of a format other than JSON lines."""
    if (suffix := output.suffix.lower()) in READERS.keys() - {*JSON_LINES, TXT}:
        raise ConfigError(
            f"--output {output}: expected a .jsonl file, got {suffix[1:].upper()}; use {output.with_suffix('.jsonl')}"
        )
    for path in (output, partial_file(output)):
        check_new_file(path, overwrite=overwrite)


@contextmanager
def partial_answers(output: Path) -> Iterator[Callable[[str], None]]:
    """Yields the function of `write_lines`. If the block fails, prints where the answers so far are."""
    try:
        with write_lines(output) as write:
            yield write
    finally:
        if (partial := partial_file(output)).exists():
            log(f"the answers so far are in {partial}")


def piped_text() -> str:
    """Returns the text from stdin. Raises ConfigError if there is none."""
    text = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    if not text:
        raise ConfigError("no prompts to answer; use --prompt TEXT or --prompts FILE, or pipe text to stdin")
    return text


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a data file, or a row for each line of any other. Raises ConfigError or DataError."""
    if path.suffix.lower() not in READERS.keys() - {TXT}:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
            raise ConfigError(f"--prompts {path}: {cause}; use a readable UTF-8 text file") from None
        prompts = [{"prompt": line} for line in lines if line.strip()]
    else:
        rows = list(read_file(path))
        problems = [row for row in rows if isinstance(row, RowProblem)]
        fields = [row for row in rows if isinstance(row, Row)]
        problems += [
            row.problem(f"no text in column 'prompt'; columns: {', '.join(row.fields) or 'none'}")
            for row in fields
            if not (isinstance(row.fields.get("prompt"), str) and row.fields["prompt"].strip())
        ]
        if problems:
            raise data_error(problems)
        prompts = [row.fields for row in fields]
    if not prompts:
        raise ConfigError(f"--prompts {path} contains no prompts; write one per line")
    return prompts


# ---- What both share


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


def user_message(text: str, images: list[Any], obstacle: str) -> Messages:
    """Returns a message with the images where its text contains <image>, or before it. Raises DataError.

    obstacle: why there can be no images. Then <image> is ordinary text.
    """
    messages: Messages = [{"role": "user", "content": text}]
    return messages if obstacle else place_images(messages, images)


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
