"""The servers and hosted services that `export --to NAME` writes for: the format of each, its limits, its command.

    server        adapter as       what it does not take (then the whole model is merged)
    vllm          portable         embeddings, Conv1D, a rank above 512
    tgi           portable         other layers than the projections; a projection that some blocks lack is ignored
    llama-server  gguf             what GGUF cannot hold
    ollama        gguf             the same
    mlx           mlx              what mlx-lm cannot hold
    lm-studio     a merged model   adapters at all

DoRA, modules_to_save and trained biases are for none of them. The scale is always 1: the adapter's own is in its
weights.
A hosted service takes no whole model here, so what is beyond its limits is refused, all of it at once.

The flags and the limits are from the sources that `Target.sources` names, read on 2026-11-27.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tailora.core.layer_types import LINEAR
from tailora.errors import ConfigError, FormatError
from tailora.formats import low_rank_export
from tailora.formats.export import FORMATS, ExportReport, export, portable_rank
from tailora.formats.io import read_json_object
from tailora.formats.low_rank_export import MERGED, ExportSource
from tailora.formats.ollama_template import ollama_template
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    CHAT_TEMPLATE,
    FIREWORKS,
    GGUF_WEIGHTS,
    MODELFILE,
    SERVE_SCRIPT,
    TOKENIZER_CONFIG,
)

# ---- What a server has to be told


@dataclass(frozen=True)
class ServingSettings:
    """What neither the adapter nor its base model says.

    name: what clients call the adapter; None: the name of the folder.
    base: name or folder of the base model; None: as its config has it.
    stop_tokens: id -> text of the tokens that end an answer.
    chat_template: of the adapter's training, if the base's tokenizer has another one.
    trained_on: quantization of the base in the adapter's training, if this base has none: then merging is refused.
    """

    name: str | None = None
    base: str | None = None
    stop_tokens: Mapping[int, str] = field(default_factory=dict)
    chat_template: str | None = None
    trained_on: str | None = None


@dataclass(frozen=True)
class Serving:
    """How an exported folder is served.

    rank: of the adapter in the folder; None if it is merged.
    more_stop_tokens: those of stop_tokens at which a server does not stop by itself, since the base's generation config
        and its tokenizer do not name them.
    prepare: a command that is needed once, and the file that it makes.
    """

    target: str
    format: str
    name: str
    base: str
    rank: int | None
    context_length: int | None
    stop_tokens: Mapping[int, str]
    more_stop_tokens: Mapping[int, str]
    chat_template: str | None
    prepare: tuple[list[str], str] | None = None
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


# ---- The command of each server. folder: the exported one, as it is to be written in the command


def flag(name: str, value: object) -> list[str]:
    """Returns the flag with its value, or nothing for None."""
    return [] if value is None else [name, str(value)]


def vllm(serving: Serving, folder: str) -> list[list[str]]:
    context = flag("--max-model-len", serving.context_length)
    if serving.rank is None:
        return [["vllm", "serve", folder, "--served-model-name", serving.name, *context]]
    rank = max(serving.rank, 8)  # its older versions have no lower one
    adapters = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{serving.name}={folder}"]
    template = ["--chat-template", f"{folder}/{CHAT_TEMPLATE}"] if serving.chat_template else []
    return [["vllm", "serve", serving.base, *adapters, *template, *context]]


def tgi(serving: Serving, folder: str) -> list[list[str]]:
    context = flag("--max-total-tokens", serving.context_length)
    if serving.rank is None:
        return [["text-generation-launcher", "--model-id", folder, *context]]
    template = ["--tokenizer-config-path", f"{folder}/{TOKENIZER_CONFIG}"] if serving.chat_template else []
    adapter = ["--lora-adapters", f"{serving.name}={folder}"]
    return [["text-generation-launcher", "--model-id", serving.base, *adapter, *template, *context]]


def llama_server(serving: Serving, folder: str) -> list[list[str]]:
    adapter, template = [], []
    if serving.rank is not None:
        adapter = ["--lora", f"{folder}/{GGUF_WEIGHTS}"]
        template = ["--jinja", "--chat-template-file", f"{folder}/{CHAT_TEMPLATE}"] if serving.chat_template else []
    context = flag("--ctx-size", serving.context_length)
    model = ["-m", f"{folder}/{model_file(serving)}"]
    port = ["--port", str(TARGETS["llama-server"].port)]  # versions have other defaults
    return [["llama-server", *model, *adapter, "--alias", serving.name, *template, *context, *port]]


def ollama(serving: Serving, folder: str) -> list[list[str]]:
    return [["ollama", "create", serving.name, "-f", f"{folder}/{MODELFILE}"], ["ollama", "run", serving.name]]


def lm_studio(serving: Serving, folder: str) -> list[list[str]]:
    file, context = f"{folder}/{model_file(serving)}", flag("--context-length", serving.context_length)
    return [
        ["lms", "import", file, "--user-repo", f"tailora/{serving.name}", "--copy"],
        ["lms", "load", "--identifier", serving.name, *context],  # it asks which model
        ["lms", "server", "start"],
    ]


def mlx(serving: Serving, folder: str) -> list[list[str]]:
    if serving.rank is None:
        return [["mlx_lm.server", "--model", folder]]
    template = flag("--chat-template", serving.chat_template)
    return [["mlx_lm.server", "--model", serving.base, "--adapter-path", folder, *template]]


def fireworks(serving: Serving, folder: str) -> list[list[str]]:
    base = f"accounts/fireworks/models/{BASE_ID}"
    return [["firectl", "model", "create", serving.name, folder, "--base-model", base]]


def cloudflare(serving: Serving, folder: str) -> list[list[str]]:
    return [["npx", "wrangler", "ai", "finetune", "create", BASE_ID, serving.name, folder]]


def model_file(serving: Serving) -> str:
    """Returns the name of the GGUF file that llama.cpp's converter makes of the base, or of the merged model."""
    return "model.gguf" if serving.is_merged else "base.gguf"


def conversion(serving: Serving, folder: str) -> tuple[list[str], str]:
    """Returns the command that makes `model_file`, and the file."""
    file, source = f"{folder}/{model_file(serving)}", folder if serving.is_merged else serving.base
    remote = [] if serving.is_merged or Path(source).is_dir() else ["--remote"]  # a repository of the Hub
    return ["python", CONVERTER, source, "--outfile", file, *remote], file


CONVERTER = "convert_hf_to_gguf.py"
BASE_ID = "BASE_MODEL_ID"  # what a hosted service calls the base model

# ---- Other files that a target reads: name -> text


def no_files(_: Serving, __: ExportSource) -> dict[str, str]:
    return {}


def template_file(serving: Serving, _: ExportSource) -> dict[str, str]:
    """A merged model's tokenizer has the template already."""
    template = None if serving.is_merged else serving.chat_template
    return {CHAT_TEMPLATE: template} if template else {}


def tgi_files(serving: Serving, source: ExportSource) -> dict[str, str]:
    if serving.is_merged or not serving.chat_template:
        return {}
    tokens = {name: getattr(source.tokenizer, name, None) for name in ("bos_token", "eos_token")}
    return {TOKENIZER_CONFIG: to_json({**tokens, "chat_template": serving.chat_template})}


def ollama_files(serving: Serving, source: ExportSource) -> dict[str, str]:
    template = source.tokenizer and ollama_template(source.tokenizer)
    lines = [f"FROM ./{model_file(serving)}"]
    lines += [] if serving.is_merged else [f"ADAPTER ./{GGUF_WEIGHTS}"]
    lines += [f'TEMPLATE """{template}"""' if template else NO_TEMPLATE]
    lines += [] if serving.context_length is None else [f"PARAMETER num_ctx {serving.context_length}"]
    lines += [f'PARAMETER stop "{text}"' for text in serving.stop_tokens.values()]  # Ollama knows no escapes
    return {MODELFILE: "\n".join(lines) + "\n"}


NO_TEMPLATE = (
    "# The chat template cannot be written in Ollama's way. Compare what `ollama show --template` shows with it, and\n"
    "# write TEMPLATE here; llama-server takes the template as it is."
)


def fireworks_files(serving: Serving, _: ExportSource) -> dict[str, str]:
    template, stop = serving.chat_template, list(serving.more_stop_tokens.values())
    chat = {"conversation_config": {"style": "jinja", "args": {"template": template}}} if template else {}
    settings: dict[str, Any] = {**chat, **({"defaults": {"stop": stop}} if stop else {})}
    return {FIREWORKS: to_json(settings)} if settings else {}


# ---- What a target does not take


def vllm_problems(source: ExportSource) -> list[str]:
    types = low_rank_export.exported_layer_types(source)
    others = [path for path, kind in types.items() if kind is not LINEAR or path.rpartition(".")[2] == "lm_head"]
    return [f"{', '.join(others)}: not every model of vLLM takes an adapter there"] if others else []


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tgi_problems(source: ExportSource) -> list[str]:
    names = [path.rpartition(".")[2] for path in low_rank_export.exported_layer_types(source)]
    blocks = getattr(source.base_model.config, "num_hidden_layers", None)
    problems = []
    if others := sorted(set(names) - set(PROJECTIONS)):
        problems.append(f"{', '.join(others)}: TGI adapts only {', '.join(PROJECTIONS)}")
    if partial := [name for name in PROJECTIONS if name in names and names.count(name) != blocks]:
        problems.append(
            f"{', '.join(partial)}: TGI ignores the adapter of a projection that not all {blocks} blocks have"
        )
    return problems


@dataclass(frozen=True)
class Limits:
    """Of a hosted service.

    targets: last parts of the paths of layers; (): any.    bytes: the file of the weights must be smaller.
    model_types: transformers' model_type -> what the service calls it; {}: any.
    """

    lowest_rank: int
    highest_rank: int
    targets: Sequence[str] = ()
    bytes: int | None = None
    model_types: Mapping[str, str] = field(default_factory=dict)


FIREWORKS_LIMITS = Limits(4, 64, (*PROJECTIONS, "w1", "w2", "w3", "block_sparse_moe.gate"))
GEMMA = dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gemma")
CLOUDFLARE_LIMITS = Limits(1, 32, bytes=300_000_000, model_types={"llama": "llama", "mistral": "mistral", **GEMMA})


def service_problems(limits: Limits, source: ExportSource) -> list[str]:
    """Returns every limit of a hosted service that the adapter would break."""
    factors = low_rank_export.fold_scale(source)
    if not factors:
        return []
    rank = portable_rank(max(len(A) for A, _ in factors.values()))
    size = 4 * rank * sum(A.shape[1] + len(B) for A, B in factors.values())
    targets = sorted({path.rpartition(".")[2] for path in factors} - set(limits.targets))
    model_type = getattr(source.base_model.config, "model_type", None)
    problems = []
    if not limits.lowest_rank <= rank <= limits.highest_rank:
        shrink = f"; `tailora shrink --r {limits.highest_rank}` lowers it" if rank > limits.highest_rank else ""
        problems.append(f"its rank is {rank}; allowed are {limits.lowest_rank} to {limits.highest_rank}{shrink}")
    if limits.targets and targets:
        problems.append(f"it adapts {', '.join(targets)}; allowed are {', '.join(limits.targets)}")
    if limits.bytes is not None and size >= limits.bytes:
        problems.append(f"its file has {size / 1e6:,.0f} MB; allowed are less than {limits.bytes / 1e6:,.0f} MB")
    if limits.model_types and model_type not in limits.model_types:
        problems.append(f"its base is a {model_type}; allowed are {', '.join(limits.model_types)}")
    return problems


# ---- All targets


@dataclass(frozen=True)
class Target:
    """A server or a hosted service.

    title: its name in messages.    commands: those that serve the exported folder.
    problems: what of an adapter it does not take, besides what the format cannot hold.
    separators: characters that it reads as such in the path of an adapter.
    converts: it reads a base or merged model in GGUF.
    port: where a server listens if it is told no other; None for a service.
    limits: of a hosted service.    files: what it reads beside the weights, name -> text.
    """

    title: str
    format: str
    commands: Callable[[Serving, str], list[list[str]]]
    sources: tuple[str, ...]
    problems: Callable[[ExportSource], list[str]] = lambda _: []
    separators: str = ""
    converts: bool = False
    port: int | None = None
    limits: Limits | None = None
    files: Callable[[Serving, ExportSource], dict[str, str]] = no_files


LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/master/"
TARGETS = {
    "vllm": Target(
        "vLLM",
        "portable",
        vllm,
        ("https://docs.vllm.ai/en/latest/features/lora/", "https://docs.vllm.ai/en/latest/cli/serve/"),
        vllm_problems,
        separators=",=",
        port=8000,
        files=template_file,
    ),
    "tgi": Target(
        "TGI",
        "portable",
        tgi,
        (
            "https://huggingface.co/docs/text-generation-inference/conceptual/lora",
            "https://huggingface.co/docs/text-generation-inference/reference/launcher",
        ),
        tgi_problems,
        separators=",=@",
        port=3000,
        files=tgi_files,
    ),
    "llama-server": Target(
        "llama-server",
        "gguf",
        llama_server,
        (f"{LLAMA_CPP}tools/server/README.md", f"{LLAMA_CPP}{CONVERTER}"),
        separators=",",
        converts=True,
        port=8080,
        files=template_file,
    ),
    "ollama": Target(
        "Ollama",
        "gguf",
        ollama,
        ("https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx",),
        converts=True,
        port=11434,
        files=ollama_files,
    ),
    "lm-studio": Target(
        "LM Studio",
        "merged",
        lm_studio,
        (
            "https://lmstudio.ai/docs/cli/local-models/import",
            "https://lmstudio.ai/docs/cli/load",
            "https://github.com/lmstudio-ai/lms/issues/110",  # LoRA is not supported
        ),
        converts=True,
        port=1234,
    ),
    "mlx": Target(
        "mlx-lm",
        "mlx",
        mlx,
        ("https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/server.py",),
        port=8080,
    ),
    "fireworks": Target(
        "Fireworks",
        "portable",
        fireworks,
        ("https://docs.fireworks.ai/models/uploading-custom-models",),
        limits=FIREWORKS_LIMITS,
        files=fireworks_files,
    ),
    "cloudflare": Target(
        "Cloudflare Workers AI",
        "portable",
        cloudflare,
        ("https://developers.cloudflare.com/workers-ai/features/fine-tunes/loras/",),
        limits=CLOUDFLARE_LIMITS,
    ),
}

# ---- Writing


def check_target_path(target: str, folder: Path) -> None:
    """Raises ConfigError if the target would read the folder's path as something else."""
    if separators := sorted(set(str(folder)) & set(TARGETS[target].separators)):
        raise ConfigError(
            f"{folder}: {TARGETS[target].title} reads {' '.join(separators)} in a path as a separator; rename it"
        )


def export_for(
    source: ExportSource, folder: Path, target: str, settings: ServingSettings, *, overwrite: bool = False
) -> ServingExport:
    """Exports an adapter in the target's format, with a script that serves or uploads it, or merges it if it has to.

    Raises as `export` does, FormatError with all limits of a hosted service that the adapter breaks, and ConfigError
    for a path that the target cannot read, or a merge into a base that the adapter was not trained on.
    """
    check_target_path(target, folder)
    details = TARGETS[target]
    problems = [*FORMATS[details.format].problems(source), *details.problems(source)]
    to, changes = details.format, []
    if details.limits is not None:
        problems += service_problems(details.limits, source)
        low_rank_export.raise_problems(f"{details.title} does not take this adapter ({details.sources[0]})", problems)
    elif problems:
        to = "merged"
        reasons = "; ".join(problem.removesuffix(f"; {MERGED}") for problem in problems)
        cause = f"{details.title} cannot take this adapter beside its base: {reasons}"
        changes = [f"the whole model is merged, since {cause}"]
        if settings.trained_on is not None:
            raise ConfigError(
                f"{cause}. It was trained on a base in {settings.trained_on}: give --quantize "
                f"{settings.trained_on} to merge it into that, or --quantize none to merge it into the original weights"
            )
    elif to == "merged":
        changes = [f"the whole model is merged, since {details.title} takes no adapters"]
    serving = describe(source, folder, target, to, settings)
    if serving.chat_template and source.tokenizer is not None and to != "merged":
        changes.append("the chat template is that of the adapter's training; the base's tokenizer has another one")
    report = export(
        source, folder, to, overwrite=overwrite, write_more=lambda path: write_serving_files(path, source, serving)
    )
    serving = with_commands(serving, str(folder))
    return ServingExport(replace(report, changes=[*changes, *report.changes]), serving)


def describe(source: ExportSource, folder: Path, target: str, to: str, settings: ServingSettings) -> Serving:
    base_model: Any = source.base_model
    base = settings.base or getattr(base_model.config, "_name_or_path", "") or "BASE_MODEL"
    factors = {} if to == "merged" else low_rank_export.fold_scale(source)
    rank = max((len(A) for A, _ in factors.values()), default=None)
    end = getattr(base_model.generation_config, "eos_token_id", None)
    known = {*(end if isinstance(end, list) else [end]), getattr(source.tokenizer, "eos_token_id", None)}
    text_config = base_model.config.get_text_config()
    return Serving(
        target=target,
        format=to,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", settings.name or folder.resolve().name),
        base=str(Path(base).resolve()) if Path(base).is_dir() else base,
        rank=portable_rank(rank) if rank is not None and to == "portable" else rank,
        context_length=getattr(text_config, "max_position_embeddings", None),
        stop_tokens=settings.stop_tokens,
        more_stop_tokens={number: text for number, text in settings.stop_tokens.items() if number not in known},
        chat_template=settings.chat_template,
    )


def with_commands(serving: Serving, folder: str) -> Serving:
    """Returns it with the commands for a folder of this name."""
    details = TARGETS[serving.target]
    prepare = conversion(serving, folder) if details.converts else None
    return replace(serving, prepare=prepare, commands=details.commands(serving, folder))


def write_serving_files(folder: Path, source: ExportSource, serving: Serving) -> None:
    """Writes the script, and what else the target reads beside the weights."""
    files = {SERVE_SCRIPT: script(with_commands(serving, "."))} | TARGETS[serving.target].files(serving, source)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if serving.target != "ollama":
        (folder / MODELFILE).unlink(missing_ok=True)  # of the format gguf
    if serving.target == "cloudflare":
        base_model: Any = source.base_model
        model_type = CLOUDFLARE_LIMITS.model_types[base_model.config.model_type]
        config = {**read_json_object(folder / ADAPTER_CONFIG), "model_type": model_type}
        (folder / ADAPTER_CONFIG).write_text(to_json(config), encoding="utf-8")


def to_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def script(serving: Serving) -> str:
    """Returns serve.sh. serving: with commands that name the folder as `.`."""
    title, verb = TARGETS[serving.target].title, "Uploads" if TARGETS[serving.target].limits else "Serves"
    what = "the merged model" if serving.is_merged else f"the adapter, rank {serving.rank}, scale 1,"
    stops = ", ".join(f"{text} ({number})" for number, text in serving.stop_tokens.items())
    lines = [
        "#!/bin/sh",
        f"# {verb} {what} of {serving.base} with {title} as {serving.name}.",
        f"# Context: {serving.context_length or 'not known'} tokens. Stop tokens: {stops or 'not known'}.",
        *(f"# {note}" for note in notes(serving)),
        "set -e",
        *([] if serving.prepare is None else [ABSOLUTE_LLAMA_CPP]),
        'cd "$(dirname "$0")"',
    ]
    if serving.prepare is not None:
        command, file = serving.prepare
        converter = f': "${{LLAMA_CPP:?set it to the folder of llama.cpp, which has {CONVERTER}}}"'
        part = f"{file}.part"  # so that a conversion that is killed leaves no file that looks whole
        python, _, *arguments = (shlex.quote(part if word == file else word) for word in command)
        lines += [f"if [ ! -f {shlex.quote(file)} ]; then", f"  {converter}"]
        no_python = f"There is no {python} in PATH: activate the environment that has tailora."
        lines += [f"  {line}" for line in unless_program(python, [no_python])]
        lines += [f'  {python} "$LLAMA_CPP/{CONVERTER}" {" ".join(arguments)}']
        lines += [f"  mv {shlex.quote(part)} {shlex.quote(file)}", "fi"]
    lines += missing_program(serving)
    commands = [shlex.join(command).replace(BASE_ID, f'"${BASE_ID}"') for command in serving.commands]
    if TARGETS[serving.target].limits:
        lines.append(f': "${{{BASE_ID}:?set it to the name that {title} has for the base model}}"')
    return "\n".join([*lines, *commands]) + "\n"


# A path from where the user is, before the script goes to its own folder
ABSOLUTE_LLAMA_CPP = 'case "$LLAMA_CPP" in "" | /*) ;; *) LLAMA_CPP=$PWD/$LLAMA_CPP ;; esac'


def missing_program(serving: Serving) -> list[str]:
    """Returns the lines that end serve.sh if the program of its commands is missing, with what there is and what to do.

    The exit code is that of the shell for a command that is not found: nothing is served.
    """
    program = serving.commands[0][0]
    ready = "" if serving.prepare is None else f"{model_file(serving)} is ready. "
    lines = [f"{ready}There is no {program} in PATH: install it, or activate the environment that has it."]
    has_template_beside = bool(serving.chat_template) and not serving.is_merged  # llama-cpp-python takes no such file
    if serving.target == "llama-server" and not has_template_beside:
        adapter = "" if serving.is_merged else f" --lora_path '$PWD/{GGUF_WEIGHTS}'"
        files = f"--model '$PWD/{model_file(serving)}'{adapter}"
        name = f"--model_alias {serving.name} --port {TARGETS[serving.target].port}"
        lines.append(f"Or with llama-cpp-python: python -m llama_cpp.server {files} {name}")
    return unless_program(program, lines)


def unless_program(program: str, messages: Sequence[str]) -> list[str]:
    """Returns the lines that show these messages and end serve.sh if the program is missing."""
    shown = [f'  echo "{message}" >&2' for message in messages]
    return [f"command -v {program} > /dev/null || {{", *shown, "  exit 127", "}"]


def notes(serving: Serving) -> list[str]:
    """Returns what a client or a person has to know beside the commands."""
    more = serving.more_stop_tokens
    result = []
    if serving.target == "mlx":
        result.append('Clients ask for the model "default_model".')
    if more and serving.target == "vllm":
        result.append(f'Requests need "stop_token_ids": {json.dumps(list(more))}, which the base model does not name.')
    elif more and serving.target == "mlx":
        texts = json.dumps(list(more.values()), ensure_ascii=False)
        result.append(f'Requests need "stop": {texts}, which the base model does not name.')
    if serving.target == "lm-studio":
        result.append(f"`lms load` asks which model: choose tailora/{serving.name}.")
    if TARGETS[serving.target].limits:
        result.append(f"{BASE_ID} is the service's name of the base model; the script takes it from the environment.")
    return result


# ---- The chat template of an adapter's training


def adapter_chat_template(folder: Path) -> str | None:
    """Returns the chat template that other trainers save beside an adapter; None if there is none."""
    file, config = folder / CHAT_TEMPLATE, folder / TOKENIZER_CONFIG
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json_object(config).get("chat_template") if config.is_file() else None
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{config}: several chat templates, and no way to know which trained the adapter")
    return template
