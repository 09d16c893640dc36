"""`tailora export ADAPTER --to FORMAT --output DIR`: the adapter for another program, read back and compared."""

import json as json_module
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailora.cli.adapters import Base
from tailora.cli.flags import Json
from tailora.cli.main import print_json, stdout
from tailora.cli.models import WAYS, chosen_method, named
from tailora.errors import ConfigError

if TYPE_CHECKING:
    from tailora.formats.export import ExportReport

Source = Annotated[str, Parameter(name="adapter", help="folder of an adapter or of a run, or a LoRA's .safetensors")]
To = Annotated[Literal["peft", "portable", "gguf", "mlx", "merged"], Parameter(help="for whom")]
Output = Annotated[Path, Parameter(name=["--output", "--output-dir"], help="a new folder")]
Quantize = Annotated[
    str | None,
    Parameter(help=f"how the base is stored: {WAYS}; without it, a merge takes that of the adapter's run"),
]
Dtype = Annotated[
    Literal["stored", "float32", "bfloat16", "float16"], Parameter(help="of the base, and so of a merged model")
]
SETTINGS = "adapter_config.json"
NAMED_IN = ("base_model_name_or_path", "model")  # by PEFT, by mlx-lm


def export(
    adapter: Source,
    /,
    *,
    to: To,
    output: Output,
    model: Base = None,
    dtype: Dtype = "stored",
    quantize: Quantize = None,
    json: Json = False,
) -> int:
    """Write an adapter for another program. What was written is read back and must compute the same."""
    (path,) = named([f"one={adapter}"]).values()
    base = model or named_base(path)
    from tailora.formats.export import check_new_folder
    from tailora.model import LoRAModel
    from tailora.quiet import quiet_transformers
    from tailora.train.model_loading import load_base

    check_new_folder(output)
    loaded, tokenizer = load_base(base, dtype, quantize=chosen_method([path], _asked(quantize, to)))
    adapted = LoRAModel.from_pretrained(loaded, path)
    started = time.perf_counter()
    with quiet_transformers():
        done = adapted.export(output, to, tokenizer=tokenizer)
    seconds = time.perf_counter() - started
    if json:
        print_json({**done.to_dict(), "model": base, "seconds": seconds})
    else:
        show(stdout(), done, base, seconds)
    return 0


def _asked(quantize: str | None, to: str) -> str | None:
    """Only a merge holds the base's weights: those that the adapter was trained on."""
    return "none" if quantize is None and to != "merged" else quantize


def named_base(path: Path) -> str:
    """The base model that the adapter names. Raises ConfigError where it names none."""
    try:
        settings = json_module.loads((path / SETTINGS).read_text(encoding="utf-8"))
        found = next((settings[key] for key in NAMED_IN if settings.get(key)), None)
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None  # reading the adapter says what is wrong with it
    if not isinstance(found, str):
        raise ConfigError(f"{path} does not name the model that it was made for; give --model FOLDER")
    return found


def show(console: Console, done: "ExportReport", base: str, seconds: float) -> None:
    table = Table("", "", title=f"Written in {seconds:.1f} s", show_header=False, box=None, title_justify="left")
    for name, size in done.files.items():
        table.add_row(Text(str(done.folder / name), overflow="fold"), f"{size / 1e6:,.1f} MB")
    said = "; ".join(done.changes) or "nothing is changed"
    found = done.logits
    compared = (
        f"Read back: logits differ from the live model's by {found.difference:.1g} of their size "
        f"(allowed {found.tolerance:.1g}; the adapter itself changes them by {found.effect:.2g})."
    )
    lines = (Text(f"{said[:1].upper()}{said[1:]}."), Text(compared), Text("To use it:"), Text(following(done, base)))
    console.print(table, *lines, sep="\n", soft_wrap=True)


def following(done: "ExportReport", base: str) -> str:
    """A command to be copied."""
    folder, name = str(done.folder), done.folder.resolve().name
    rank = _rank(done.folder) if done.format == "portable" else ""
    adapters = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"{name}={folder}"]
    commands = {
        "peft": ["tailora", "chat", "--model", base, "--adapter", folder],
        "portable": ["vllm", "serve", base, *adapters],
        "gguf": ["ollama", "create", name, "-f", str(done.folder / "Modelfile")],
        "mlx": ["mlx_lm.generate", "--model", base, "--adapter-path", folder, "--prompt", "Hello"],
        "merged": ["tailora", "chat", "--model", folder],
    }
    return shlex.join(commands[done.format])


def _rank(folder: Path) -> str:
    return str(json_module.loads((folder / SETTINGS).read_text(encoding="utf-8"))["r"])
