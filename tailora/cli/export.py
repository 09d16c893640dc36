"""`tailora export ADAPTER --to NAME --output DIR`: writes an adapter for another program and checks the result."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter
from rich.console import Console

from tailora.cli.flags import Json, Overwrite
from tailora.cli.main import log, note, print_json, stdout
from tailora.cli.models import (
    AdapterPath,
    BaseModel,
    Device,
    Quantize,
    base_model_name,
    command_to_use,
    device_of_flag,
    fetch_sources,
    find_adapter,
    labels_of,
    quantize_method,
    task_of,
)
from tailora.cli.verify import create_passport
from tailora.data.demo import resolve_model
from tailora.data.schemas import CAUSAL_LM
from tailora.errors import ConfigError, DataError
from tailora.formats.run_folder import (
    EXPORTED_FILES,
    PASSPORT,
    SERVE_SCRIPT,
    SYSTEM,
    check_result_folder,
    read_system_message,
    write_system_message,
)
from tailora.report.blocks import Block, Code, Column, Paragraph, Section, Table
from tailora.report.terminal import print_section

if TYPE_CHECKING:
    from tailora.data.labels import Labels
    from tailora.formats.export import ExportReport
    from tailora.formats.serving_targets import Serving, ServingExport, ServingSettings
    from tailora.model import LoRAModel

Format = Literal["peft", "portable", "gguf", "merged"]
Server = Literal["vllm", "llama-server", "ollama", "mlx"]
FORMATS: tuple[str, ...] = get_args(Format)
IMAGE_FORMATS = ("peft", "portable", "merged")  # for vision-language models
SERVERS_OF_FORMAT = {"portable": "vllm", "gguf": "llama-server"}
To = Annotated[
    Literal[Format, Server],
    Parameter(
        help="format: peft, portable (PEFT for servers), gguf or merged (a full model); or a server, to also write "
        "the command that starts it"
    ),
]
Dtype = Annotated[
    Literal["stored", "float32", "bfloat16", "float16"],
    Parameter(help="precision of the base model or the merged model"),
]


def export(
    adapter: AdapterPath,
    /,
    *,
    to: To,
    output: Annotated[Path, Parameter(name=["--output", "--output-dir"], help="new folder for the result")],
    model: BaseModel = None,
    dtype: Dtype = "stored",
    quantize: Quantize = None,
    device: Device = "cpu",
    verification_file: Annotated[bool, Parameter(help="also write passport.json for `tailora verify`")] = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Export an adapter for llama.cpp, Ollama, vLLM, mlx-lm or PEFT, or merge it.

    The result is read back, and its logits must match the adapted model's. For a server, the folder
    also contains a script that starts it. Adapters that a server cannot load are merged into the base model.
    """
    path = find_adapter(adapter)
    check_result_folder(output, EXPORTED_FILES, overwrite=overwrite, sources=[path])
    base = base_model_name(model, [path])
    log("loading the model")
    from tailora.model import LoRAModel
    from tailora.quiet import quiet_transformers
    from tailora.train.model_loading import load_base

    trained_on = quantize_method([path], quantize)
    method = None if quantize is None and to != "merged" else trained_on  # the result does not contain base weights
    labels, task = labels_of(base, [path]), task_of(base, [path])
    if to not in FORMATS:
        check_target(to, path, output, base, labels, task)
    fetch_sources(base)
    loaded, tokenizer = load_base(base, dtype, device_of_flag(device), method, task=task, labels=labels)
    adapted = LoRAModel.from_pretrained(loaded, path)
    started = time.perf_counter()
    serving = None
    with quiet_transformers():
        if to in FORMATS:
            report = adapted.export(output, to, tokenizer=tokenizer, overwrite=overwrite)
            result: ExportReport | ServingExport = report
        else:
            settings = serving_settings(path, base, loaded, tokenizer, trained_on if method is None else None)
            result = adapted.export_for(output, to, settings=settings, tokenizer=tokenizer, overwrite=overwrite)
            report, serving = result.report, result.serving
    if (system := read_system_message(path)) is not None:
        write_system_message(report.folder, system)
        report.files[SYSTEM] = (report.folder / SYSTEM).stat().st_size
        report.changes.append(f"the system message used in training is in {SYSTEM}; answers without it can be worse")
    if verification_file and labels is None and task == CAUSAL_LM:
        add_passport(report, adapted, tokenizer)
    seconds = time.perf_counter() - started
    if json:
        print_json({**result.to_dict(), "model": base, "seconds": seconds})
        return 0
    code = commands_of_format(report, base, labels) if serving is None else commands_of_target(report, serving)
    show(stdout(), report, code, seconds)
    return 0


def check_target(to: str, adapter: Path, output: Path, base: str, labels: "Labels | None", task: str) -> None:
    """Raises ConfigError for an adapter or a path that a server does not support, before the model is loaded."""
    from tailora.formats.serving_targets import check_target_path
    from tailora.train.model_loading import read_config, reads_images

    check_target_path(to, output)
    if reads_images(read_config(base)):
        raise ConfigError(
            f"--to {to} does not support vision-language models such as {base}; use one of {', '.join(IMAGE_FORMATS)}"
        )
    if labels is not None or task != CAUSAL_LM:
        what = "predicts labels" if labels is not None else f"was trained for {task}"
        raise ConfigError(f"--to {to} is for language models, but {adapter} {what}; use one of {', '.join(FORMATS)}")


def add_passport(report: "ExportReport", adapted: "LoRAModel", tokenizer: Any) -> None:
    try:
        create_passport(report.folder, adapted, tokenizer)
        report.files[PASSPORT] = (report.folder / PASSPORT).stat().st_size
    except DataError as error:  # the export is complete
        note(f"{PASSPORT} was not written: {error}")


def serving_settings(adapter: Path, base: str, model: Any, tokenizer: Any, trained_on: str | None) -> "ServingSettings":
    """Returns the settings for a server. Sets the tokenizer's chat template to the one used in training."""
    from tailora.data.tokenize import stop_ids
    from tailora.formats.serving_targets import ServingSettings, adapter_chat_template

    template = adapter_chat_template(adapter) if adapter.is_dir() else None
    if template == tokenizer.chat_template:
        template = None
    if template is not None:
        tokenizer.chat_template = template
    stops = stop_ids(model, tokenizer)
    return ServingSettings(
        base=resolve_model(base),  # other programs do not know "demo"
        stop_tokens=dict(zip(stops, tokenizer.convert_ids_to_tokens(stops), strict=True)),
        chat_template=template,
        trained_on=trained_on,
        system=read_system_message(adapter),
    )


def show(console: Console, result: "ExportReport", code: list[Block], seconds: float) -> None:
    """code: the commands that use the files."""
    from tailora.train.memory import format_bytes

    files = [(str(result.folder / name), format_bytes(size)) for name, size in result.files.items()]
    changes = "; ".join(result.changes) or "the adapter is unchanged"
    logits = result.logits
    equal, differ = "are equal to", f"differ by {logits.difference:.1g} of their size from"
    comparison = (
        f"With the exported files, the logits {differ if logits.difference else equal} the live model's "
        f"(allowed: {logits.tolerance:.1g}). For scale, the adapter itself changes them by {logits.effect:.2g}."
    )
    contents: list[Block] = [
        Table([Column(""), Column("", numeric=True)], files),
        Paragraph(comparison),
        Paragraph(f"{changes[:1].upper()}{changes[1:]}."),  # for mlx-lm, a step before the command below
        *code,
    ]
    print_section(console, Section(f"Written in {seconds:.1f} s", "", contents))


def commands_of_target(result: "ExportReport", serving: "Serving") -> list[Block]:
    from tailora.formats.serving_targets import TARGETS, notes

    blocks: list[Block] = []
    if serving.prepare is not None:
        once = "Run llama.cpp's converter once (it needs `pip install sentencepiece`):"
        blocks.append(Code(shlex.join(serving.prepare[0]), title=once))
    title = f"To serve it, run {result.folder / SERVE_SCRIPT} or this command:"
    blocks.append(Code("\n".join(map(shlex.join, serving.commands)), title=title))
    blocks += [Paragraph(note) for note in notes(serving)]
    return [*blocks, *commands_to_verify(result, f"http://127.0.0.1:{TARGETS[serving.target].port}")]


def commands_of_format(result: "ExportReport", base: str, labels: "Labels | None") -> list[Block]:
    """Names the option that also writes the command of a server, if a server reads the format."""
    use: Block
    if result.format in SERVERS_OF_FORMAT:
        use = Paragraph(f"`--to {SERVERS_OF_FORMAT[result.format]}` also writes the command that serves the adapter.")
    else:
        folder = str(result.folder)
        model, adapter = (folder, None) if result.format == "merged" else (base, folder)
        use = Code(shlex.join(command_to_use(model, adapter, labels)), title="To use it:")
    return [use, *commands_to_verify(result, "URL")]


def commands_to_verify(result: "ExportReport", url: str) -> list[Block]:
    if PASSPORT not in result.files:
        return []
    ask = shlex.join(["tailora", "verify", url, "--adapter", str(result.folder)])
    return [Code(ask, title="To verify that the server uses it:")]
