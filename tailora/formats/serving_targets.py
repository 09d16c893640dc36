"""The servers that `export --to NAME` writes for: the adapter's format, the limits, and the command that starts it.

What a server cannot load as an adapter is merged into the model: for example DoRA, modules_to_save and trained biases.
The scale is 1 in every command, because the adapter's own scale is already in its weights.

Flags and limits are from these pages, read on 2026-11-27:

    https://docs.vllm.ai/en/latest/features/lora/ and https://docs.vllm.ai/en/latest/cli/serve/
    https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md and its convert_hf_to_gguf.py
    https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
    https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/server.py

Ollama's TEMPLATE is written by `ollama_template`, at the end of this file.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from tailora.core.layer_types import LINEAR
from tailora.errors import ConfigError, FormatError, nearest
from tailora.formats import fold_scale
from tailora.formats.export import FORMATS, ExportReport, export, portable_rank
from tailora.formats.fold_scale import MERGED, ExportSource
from tailora.formats.io import read_json_object
from tailora.formats.run_folder import CHAT_TEMPLATE, GGUF_WEIGHTS, MODELFILE, SERVE_SCRIPT, SYSTEM, TOKENIZER_CONFIG

# ---- The settings of a server


@dataclass(frozen=True)
class ServingSettings:
    """Settings that are neither in the adapter nor in its base model."""

    base: str | None = None  # name or folder of the base model; None: the name in its config
    stop_tokens: Mapping[int, str] = field(default_factory=dict)  # id -> text of the tokens that end an answer
    chat_template: str | None = None  # of the adapter's training, if the base's tokenizer has a different one
    trained_on: str | None = None  # quantization of the base in training, if this base has none; it is never merged
    system: str | None = None  # the most frequent system message of the training conversations


@dataclass(frozen=True)
class Serving:
    """How to serve an exported folder."""

    target: str
    format: str
    name: str
    base: str
    rank: int | None  # in the folder; None if the adapter is merged
    context_length: int | None
    stop_tokens: Mapping[int, str]
    more_stop_tokens: Mapping[int, str]  # at which a server does not stop by itself: the base model has none of them
    chat_template: str | None
    system: str | None
    prepare: tuple[list[str], str] | None = None  # a command to run once, and the file that it creates
    commands: list[list[str]] = field(default_factory=list)

    @property
    def is_merged(self) -> bool:
        return self.format == "merged"


@dataclass(frozen=True)
class ServingExport:
    report: ExportReport
    serving: Serving

    def to_dict(self) -> dict[str, Any]:
        return {**self.report.to_dict(), "serving": asdict(self.serving)}


# ---- The command of each server. folder: path of the exported folder, as the command shows it


def flag(name: str, value: object) -> list[str]:
    """Returns the flag with its value, or nothing for None."""
    return [] if value is None else [name, str(value)]


def vllm(serving: Serving, folder: str) -> list[list[str]]:
    context = flag("--max-model-len", serving.context_length)
    if serving.rank is None:
        return [["vllm", "serve", folder, "--served-model-name", serving.name, *context]]
    rank = max(serving.rank, 8)  # the minimum of older versions
    adapters = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{serving.name}={folder}"]
    template = ["--chat-template", f"{folder}/{CHAT_TEMPLATE}"] if serving.chat_template else []
    return [["vllm", "serve", serving.base, *adapters, *template, *context]]


def llama_server(serving: Serving, folder: str) -> list[list[str]]:
    adapter, template = [], []
    if serving.rank is not None:
        adapter = ["--lora", f"{folder}/{GGUF_WEIGHTS}"]
        template = ["--jinja", "--chat-template-file", f"{folder}/{CHAT_TEMPLATE}"] if serving.chat_template else []
    context = flag("--ctx-size", serving.context_length)
    model = ["-m", f"{folder}/{model_file(serving)}"]
    port = ["--port", str(TARGETS["llama-server"].port)]  # the default differs between versions
    return [["llama-server", *model, *adapter, "--alias", serving.name, *template, *context, *port]]


def ollama(serving: Serving, folder: str) -> list[list[str]]:
    return [["ollama", "create", serving.name, "-f", f"{folder}/{MODELFILE}"], ["ollama", "run", serving.name]]


def mlx(serving: Serving, folder: str) -> list[list[str]]:
    if serving.rank is None:
        return [["mlx_lm.server", "--model", folder]]
    template = flag("--chat-template", serving.chat_template)
    return [["mlx_lm.server", "--model", serving.base, "--adapter-path", folder, *template]]


def model_file(serving: Serving) -> str:
    """Returns the name of the GGUF file that llama.cpp's converter creates from the base or the merged model."""
    return "model.gguf" if serving.is_merged else "base.gguf"


def conversion(serving: Serving, folder: str) -> tuple[list[str], str]:
    """Returns the command that creates `model_file`, and the file."""
    file, source = f"{folder}/{model_file(serving)}", folder if serving.is_merged else serving.base
    remote = [] if serving.is_merged or Path(source).is_dir() else ["--remote"]  # a repository of the Hub
    return ["python", CONVERTER, source, "--outfile", file, *remote], file


CONVERTER = "convert_hf_to_gguf.py"

# ---- Other files that a server reads: name -> text


def template_file(serving: Serving, _: ExportSource) -> dict[str, str]:
    """A merged model's tokenizer has the template already."""
    template = None if serving.is_merged else serving.chat_template
    return {CHAT_TEMPLATE: template} if template else {}


def ollama_files(serving: Serving, source: ExportSource) -> dict[str, str]:
    template = source.tokenizer and ollama_template(source.tokenizer)
    lines = [f"FROM ./{model_file(serving)}"]
    lines += [] if serving.is_merged else [f"ADAPTER ./{GGUF_WEIGHTS}"]
    lines += [f'TEMPLATE """{template}"""' if template else NO_TEMPLATE]
    lines += [f'SYSTEM """{serving.system}"""'] if serving.system and '"""' not in serving.system else []
    lines += [] if serving.context_length is None else [f"PARAMETER num_ctx {serving.context_length}"]
    stops = [text for text in serving.stop_tokens.values() if len(text.splitlines()) == 1]
    lines += [f'PARAMETER stop "{text}"' for text in stops]  # Ollama knows no escapes
    return {MODELFILE: "\n".join(lines) + "\n"}


NO_TEMPLATE = (
    "# The chat template cannot be converted to Ollama's format. Compare it with the output of `ollama show\n"
    "# --template`, and write TEMPLATE here. llama-server uses the original template."
)


# ---- Unsupported by a server


def vllm_problems(source: ExportSource) -> list[str]:
    types = fold_scale.exported_layer_types(source)
    others = [path for path, kind in types.items() if kind is not LINEAR or path.rpartition(".")[2] == "lm_head"]
    return [f"{', '.join(others)}: not every vLLM model supports an adapter there"] if others else []


# ---- All targets


@dataclass(frozen=True)
class Target:
    title: str  # in messages
    format: str
    commands: Callable[[Serving, str], list[list[str]]]  # that serve the exported folder
    port: int
    problems: Callable[[ExportSource], list[str]] = lambda _: []  # what it does not support, beyond the format's limits
    separators: str = ""  # characters with a special meaning in the path of an adapter
    converts: bool = False  # whether it reads the base or merged model as GGUF
    files: Callable[[Serving, ExportSource], dict[str, str]] = lambda *_: {}  # that it reads, too: name -> text


TARGETS = {
    "vllm": Target("vLLM", "portable", vllm, 8000, vllm_problems, separators=",=", files=template_file),
    "llama-server": Target(
        "llama-server", "gguf", llama_server, 8080, separators=",", converts=True, files=template_file
    ),
    "ollama": Target("Ollama", "gguf", ollama, 11434, converts=True, files=ollama_files),
    "mlx": Target("mlx-lm", "mlx", mlx, 8080),
}

# ---- Writing


def check_target_path(target: str, folder: Path) -> None:
    """Raises ConfigError for an unknown target, and for a path that the server would misread."""
    if target not in TARGETS:
        raise ConfigError(f"unknown server {target!r}; available: {', '.join(TARGETS)}{nearest(target, TARGETS)}")
    if separators := sorted(set(str(folder)) & set(TARGETS[target].separators)):
        raise ConfigError(
            f"{folder}: {TARGETS[target].title} treats {' '.join(separators)} in paths as separators; rename the folder"
        )


def export_for(
    source: ExportSource, folder: Path, target: str, settings: ServingSettings, *, overwrite: bool = False
) -> ServingExport:
    """Exports an adapter in the server's format, or merged if the server cannot load it, with a script that serves it.

    Raises as `export` does, and ConfigError for an unknown target, for a path that the server cannot read, and for a
    merge into a base that the adapter was not trained on.
    """
    check_target_path(target, folder)
    details = TARGETS[target]
    problems = [*FORMATS[details.format].problems(source), *details.problems(source)]
    to, changes = details.format, []
    if problems:
        to = "merged"
        reasons = "; ".join(problem.removesuffix(f"; {MERGED}") for problem in problems)
        cause = f"{details.title} cannot load this adapter separately: {reasons}"
        changes = [f"the adapter is merged into the model, because {cause}"]
        if settings.trained_on is not None:
            raise ConfigError(
                f"{cause}. The adapter was trained on a base quantized as {settings.trained_on}; use --quantize "
                f"{settings.trained_on} to merge it into that base, or --quantize none for the original weights"
            )
    serving = describe(source, folder, target, to, settings)
    if serving.chat_template and source.tokenizer is not None and to != "merged":
        changes.append("the chat template is the one used in training; the base's tokenizer has a different one")

    def write_files(temporary: Path) -> None:
        files = {SERVE_SCRIPT: script(with_commands(serving, "."))} | details.files(serving, source)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")

    report = export(source, folder, to, overwrite=overwrite, write_more=write_files)
    serving = with_commands(serving, str(folder))
    return ServingExport(replace(report, changes=[*changes, *report.changes]), serving)


def describe(source: ExportSource, folder: Path, target: str, to: str, settings: ServingSettings) -> Serving:
    base_model: Any = source.base_model
    base = settings.base or getattr(base_model.config, "_name_or_path", "") or "BASE_MODEL"
    factors = {} if to == "merged" else fold_scale.fold_scale(source)
    rank = max((len(A) for A, _ in factors.values()), default=None)
    end = getattr(base_model.generation_config, "eos_token_id", None)
    known = {*(end if isinstance(end, list) else [end]), getattr(source.tokenizer, "eos_token_id", None)}
    text_config = base_model.config.get_text_config()
    return Serving(
        target=target,
        format=to,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name),
        base=str(Path(base).resolve()) if Path(base).is_dir() else base,
        rank=portable_rank(rank) if rank is not None and to == "portable" else rank,
        context_length=getattr(text_config, "max_position_embeddings", None),
        stop_tokens=settings.stop_tokens,
        more_stop_tokens={number: text for number, text in settings.stop_tokens.items() if number not in known},
        chat_template=settings.chat_template,
        system=settings.system,
    )


def with_commands(serving: Serving, folder: str) -> Serving:
    """Returns a copy with the commands for a folder of this name."""
    details = TARGETS[serving.target]
    prepare = conversion(serving, folder) if details.converts else None
    return replace(serving, prepare=prepare, commands=details.commands(serving, folder))


def script(serving: Serving) -> str:
    """Returns serve.sh. serving: with commands for the folder `.`."""
    what = "the merged model" if serving.is_merged else f"the adapter, rank {serving.rank}, scale 1,"
    stops = ", ".join(f"{text} ({number})" for number, text in serving.stop_tokens.items())
    lines = [
        "#!/bin/sh",
        f"# Serves {what} of {serving.base} with {TARGETS[serving.target].title} as {serving.name}.",
        f"# Context: {serving.context_length or 'unknown'} tokens. Stop tokens: {stops or 'unknown'}.",
        *(f"# {note}" for note in notes(serving)),
        "set -e",
        *([] if serving.prepare is None else [ABSOLUTE_LLAMA_CPP]),
        'cd "$(dirname "$0")"',
    ]
    # a line break in a token of a hostile model would end the comment
    lines = [" ".join(line.splitlines()) for line in lines]
    if serving.prepare is not None:
        command, file = serving.prepare
        converter = f': "${{LLAMA_CPP:?set it to the folder of llama.cpp with {CONVERTER}}}"'
        part = f"{file}.part"  # so that an interrupted conversion leaves no file that looks complete
        python, _, *arguments = (shlex.quote(part if word == file else word) for word in command)
        lines += [f"if [ ! -f {shlex.quote(file)} ]; then", f"  {converter}"]
        lines += [f'  {python} "$LLAMA_CPP/{CONVERTER}" {" ".join(arguments)}']
        lines += [f"  mv {shlex.quote(part)} {shlex.quote(file)}", "fi"]
    return "\n".join([*lines, *map(shlex.join, serving.commands)]) + "\n"


# Makes a relative path absolute before the script changes the folder
ABSOLUTE_LLAMA_CPP = 'case "$LLAMA_CPP" in "" | /*) ;; *) LLAMA_CPP=$PWD/$LLAMA_CPP ;; esac'


def notes(serving: Serving) -> list[str]:
    """Returns what users and clients need to know in addition to the commands."""
    result = ['Clients must request the model "default_model".'] if serving.target == "mlx" else []
    ids, texts = list(serving.more_stop_tokens), list(serving.more_stop_tokens.values())
    fields = {"vllm": f'"stop_token_ids": {ids}', "mlx": f'"stop": {json.dumps(texts, ensure_ascii=False)}'}
    if ids and serving.target in fields:
        result.append(f"Requests need {fields[serving.target]}, which the base model does not set.")
    if serving.system and (serving.target != "ollama" or '"""' in serving.system):
        title = TARGETS[serving.target].title
        result.append(f"Requests need the system message used in training ({SYSTEM}): {title} cannot store it.")
    return result


# ---- The chat template of an adapter's training


def adapter_chat_template(folder: Path) -> str | None:
    """Returns the chat template that other trainers save with an adapter; None if there is none."""
    file, config = folder / CHAT_TEMPLATE, folder / TOKENIZER_CONFIG
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json_object(config).get("chat_template") if config.is_file() else None
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{config} contains several chat templates; keep the one that the adapter was trained with")
    return template


# ---- Ollama's TEMPLATE, in Go's template language, from the chat template of a tokenizer, in Jinja's
#
# Ollama recognizes some chat templates in a GGUF file by their text. With any other, it sends the bare prompt to the
# model. So the text around the messages is extracted from a rendered conversation. If that fails, there is no TEMPLATE:
#
#     {{ if .System }}BEFORE{{ .System }}AFTER{{ else }}START{{ end }}
#     {{ range .Messages }}{{ if eq .Role "user" }}USER{{ .Content }}REPLY
#     {{ else if eq .Role "assistant" }}{{ .Content }}END{{ end }}{{ end }}
#
# A BOS token at the start is omitted if the tokenizer adds one, because llama.cpp then adds one too. Tools are omitted.

Message = dict[str, str]
SYSTEM_TEXT, FIRST, ANSWER, SECOND = "systemtext", "firstquestion", "firstanswer", "secondquestion"
QUESTIONS: list[Message] = [
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
]
WITH_SYSTEM: list[Message] = [{"role": "system", "content": SYSTEM_TEXT}, *QUESTIONS]


@dataclass(frozen=True)
class Frame:
    """The text around the messages of a conversation."""

    start: str  # without a system message
    before: str | None  # before a system message; None: it is omitted
    after: str  # after a system message
    user: str  # before a question
    reply: str  # after a question, where the answer begins
    end: str  # after an answer

    def render(self, messages: Sequence[Message]) -> str:
        """Returns Ollama's result for the template."""
        text = self.start
        for message in messages:
            if message["role"] == "system":
                text = self.start if self.before is None else self.before + message["content"] + self.after
            elif message["role"] == "user":
                text += self.user + message["content"] + self.reply
            else:
                text += message["content"] + self.end
        return text

    def to_go(self) -> str:
        start = self.start
        if self.before is not None:
            start = f"{{{{ if .System }}}}{self.before}{{{{ .System }}}}{self.after}"
            start += f"{{{{ else }}}}{self.start}{{{{ end }}}}" if self.start else "{{ end }}"
        user = f'{{{{ if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}{self.reply}'
        assistant = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{self.end}'
        return f"{start}{{{{ range .Messages }}}}{user}{assistant}{{{{ end }}}}{{{{ end }}}}"


def ollama_template(tokenizer: Any) -> str | None:
    """Returns the text for TEMPLATE; None for a chat template that cannot be converted."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" in template:  # it would keep today's date for ever
        return None
    frame = _frame(tokenizer)
    if frame is None or any("{{" in text or '"""' in text for text in vars(frame).values() if text):
        return None
    systems = [[], *([WITH_SYSTEM[:1]] if frame.before is not None else [])]
    chats = [system + QUESTIONS[:length] for system in systems for length in (1, 3)]
    return frame.to_go() if all(_render(tokenizer, chat) == frame.render(chat) for chat in chats) else None


def _frame(tokenizer: Any) -> Frame | None:
    parts = _split(_render(tokenizer, QUESTIONS), FIRST, ANSWER, SECOND)
    answered = _split(_render(tokenizer, QUESTIONS[:2], ends_with_answer=True), FIRST, ANSWER)
    if not parts or not answered:
        return None
    (start, reply, between, _), end = parts, answered[2]
    user = between.removeprefix(end)
    with_system = _split(_render(tokenizer, WITH_SYSTEM), SYSTEM_TEXT, FIRST, ANSWER, SECOND)
    before, after = with_system[:2] if with_system else (None, user)
    return Frame(start.removesuffix(user), before, after.removesuffix(user), user, reply, end)


def _render(tokenizer: Any, messages: list[Message], *, ends_with_answer: bool = False) -> str | None:
    """Returns the conversation up to the next answer, without a BOS that llama.cpp adds; None if it is refused."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not ends_with_answer)
    except TemplateError:
        return None
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(text).removeprefix(tokenizer.bos_token if adds_bos else "")


def _split(text: str | None, *contents: str) -> Sequence[str]:
    """Returns the text before, between and after the contents; () unless all occur in this order."""
    match = re.fullmatch("(.*)".join(["", *contents, ""]), text or "", re.DOTALL)
    return match.groups() if match else ()
