"""`tailora export ADAPTER --to FORMAT --output DIR`: writes an adapter for another program, and checks the result."""

import json as json_module
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from tailora.cli.flags import Json, Overwrite
from tailora.cli.main import log, print_json, stdout
from tailora.cli.models import (
    METHODS,
    AdapterPath,
    BaseModel,
    Device,
    base_model_name,
    command_to_use,
    device_of_flag,
    find_adapter,
    labels_of,
    quantize_method,
    task_of,
)
from tailora.data.demo import resolve_demo
from tailora.formats.run_folder import ADAPTER_CONFIG, EXPORTED_FILES, GGUF_WEIGHTS, check_result_folder
from tailora.report.blocks import Block, Code, Column, Paragraph, Section, Table
from tailora.report.terminal import print_section

if TYPE_CHECKING:
    from tailora.data.labels import Labels
    from tailora.formats.export import ExportReport

To = Annotated[
    Literal["peft", "portable", "gguf", "mlx", "merged"],
    Parameter(help="format: PEFT, PEFT that vLLM reads, llama.cpp and Ollama, mlx-lm, or a whole model"),
]
Output = Annotated[Path, Parameter(name=["--output", "--output-dir"], help="new folder for the result")]
Quantize = Annotated[
    str | None,
    Parameter(help=f"quantization of the base model: {METHODS}; default: merged: as in the adapter's run"),
]
Dtype = Annotated[
    Literal["stored", "float32", "bfloat16", "float16"], Parameter(help="precision of the base, and of a merged model")
]


def export(
    adapter: AdapterPath,
    /,
    *,
    to: To,
    output: Output,
    model: BaseModel = None,
    dtype: Dtype = "stored",
    quantize: Quantize = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Export an adapter to llama.cpp, Ollama, vLLM, mlx-lm or PEFT, or merge it.

    The result is read back and must compute the same as the model with its adapter.
    """
    path = find_adapter(adapter)
    check_result_folder(output, EXPORTED_FILES, overwrite=overwrite, sources=[path])
    base = base_model_name(model, [path])
    log("reading the model")
    from tailora.model import LoRAModel
    from tailora.quiet import quiet_transformers
    from tailora.train.model_loading import load_base

    if quantize is None and to != "merged":
        quantize = "none"  # the base's weights are not in the result
    method, labels = quantize_method([path], quantize), labels_of(base, [path])
    loaded, tokenizer = load_base(
        base, dtype, device_of_flag(device), method, task=task_of(base, [path]), labels=labels
    )
    adapted = LoRAModel.from_pretrained(loaded, path)
    started = time.perf_counter()
    with quiet_transformers():
        result = adapted.export(output, to, tokenizer=tokenizer, overwrite=overwrite)
    seconds = time.perf_counter() - started
    if json:
        print_json({**result.to_dict(), "model": base, "seconds": seconds})
    else:
        show(stdout(), result, base, labels, seconds)
    return 0


def show(console: Console, result: "ExportReport", base: str, labels: "Labels | None", seconds: float) -> None:
    from tailora.train.memory import format_bytes

    files = [(str(result.folder / name), format_bytes(size)) for name, size in result.files.items()]
    changes = "; ".join(result.changes) or "nothing is changed"
    logits = result.logits
    equal, differ = "are equal to", f"differ by {logits.difference:.1g} of their size from"
    comparison = (
        f"Read back: the logits {differ if logits.difference else equal} the live model's "
        f"(allowed: {logits.tolerance:.1g}; the adapter itself changes them by {logits.effect:.2g})."
    )
    contents: list[Block] = [
        Table([Column(""), Column("", numeric=True)], files),
        Paragraph(comparison),
        Paragraph(f"{changes[:1].upper()}{changes[1:]}."),  # of mlx-lm it says what to do before the command below
        Code(next_command(result, base, labels), title="To use it:"),
    ]
    if result.format == "gguf":
        contents.append(Code(llama_cpp_commands(result, base), title="Or with llama.cpp, which has both programs:"))
    print_section(console, Section(f"Written in {seconds:.1f} s", "", contents))


def llama_cpp_commands(result: "ExportReport", base: str) -> str:
    """Returns the commands that convert the base model to GGUF and run it with the adapter."""
    convert = ["python", "convert_hf_to_gguf.py", resolve_demo(base, "model"), "--outfile", "BASE.gguf"]
    return "\n".join(
        map(shlex.join, [convert, ["llama-cli", "-m", "BASE.gguf", "--lora", str(result.folder / GGUF_WEIGHTS)]])
    )


def next_command(result: "ExportReport", base: str, labels: "Labels | None") -> str:
    """Returns a command that uses the result, to be copied."""
    folder, name = str(result.folder), result.folder.resolve().name
    base_folder = resolve_demo(base, "model")  # other programs do not know "demo"
    if result.format == "portable":
        rank = str(json_module.loads((result.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])
        adapters = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"{name}={folder}"]
        return shlex.join(["vllm", "serve", base_folder, *adapters])
    commands = {
        "peft": command_to_use(base, folder, labels),
        "gguf": ["ollama", "create", name, "-f", str(result.folder / "Modelfile")],
        "mlx": ["mlx_lm.generate", "--model", base_folder, "--adapter-path", folder, "--prompt", "Hello"],
        "merged": command_to_use(folder, None, labels),
    }
    return shlex.join(commands[result.format])
